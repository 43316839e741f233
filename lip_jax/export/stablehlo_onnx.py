"""Networks as StableHLO and ONNX files: weights inside, for any number of images.

A StableHLO file is for CPU, CUDA and TPU: a ZIP archive, not compressed, with `network.bin`, which
`jax.export.deserialize` takes, and `config.json`, which says what classes there are and how images
are prepared. Without lip_jax:

    archive = zipfile.ZipFile("network.stablehlo")
    network = jax.export.deserialize(bytearray(archive.read("network.bin")))
    logits = network.call(images)  # uint8 [N, 224, 224, 3]

JAX promises to read what an older version exported for six months. The exported folder lasts
longer: keep it.

An ONNX file, which needs lip-jax[onnx], has one input, `images`, and one output, `logits`. The
entry `config` of its metadata is the same JSON text. Files of detectors also take `sizes`, height
and width of each image in the batch, and give `boxes`, `scores`, `labels` and `valid`.
"""

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from lip_jax.errors import UsageError, one_line
from lip_jax.export.inference import InferenceFunction, checking_device
from lip_jax.training.json_files import parse_json

PLATFORMS = ("cpu", "cuda", "tpu")

_NETWORK, _CONFIG = "network.bin", "config.json"  # in a StableHLO file
_CONFIG_ENTRY = "config"  # of an ONNX file's metadata
_TIME = (1980, 1, 1, 0, 0, 0)  # the same network gives the same file

# Images [N, S, S, 3] -> logits float32 [N, num_classes]; and the config of the `InferenceFunction`.
# Of a detector: images and their sizes [N, 2] -> the arrays that config["outputs"] names.
Loaded = tuple[Callable[..., Any], dict[str, Any]]


def to_stablehlo(network: InferenceFunction) -> tuple[bytes, str]:
  """What is written to a StableHLO file, and what `load_stablehlo` will run it by."""
  exported = jax.export.export(jax.jit(network.function), platforms=PLATFORMS)(
    *network.symbolic_arguments
  )
  file = io.BytesIO()
  with zipfile.ZipFile(file, "w") as archive:
    text = json.dumps(network.config, indent=2) + "\n"
    archive.writestr(zipfile.ZipInfo(_CONFIG, _TIME), text)
    archive.writestr(zipfile.ZipInfo(_NETWORK, _TIME), bytes(exported.serialize()))
  return file.getvalue(), f"jax {jax.__version__} on {checking_device().platform}"


def load_stablehlo(path: str | Path) -> Loaded:
  """The network in a StableHLO file, and what is known of it.

  It is a program, which XLA compiles and runs: read files of those you trust only.

  Returns:
    The network, from images [N, S, S, 3] to logits float32 [N, num_classes], compiled for each
    number of images, on JAX's default device; and `inference.InferenceFunction.config`.

  Raises:
    UsageError: there is no such file, or it is damaged, or another version of JAX is needed.
  """
  path = _existing(path)
  try:
    with zipfile.ZipFile(path) as archive:
      config = parse_json(archive.read(_CONFIG).decode(), f"{_CONFIG} in {path}")
      exported = jax.export.deserialize(bytearray(archive.read(_NETWORK)))
  except UsageError:
    raise
  except Exception as error:  # bytes of something else can raise anything in JAX's reader
    raise UsageError(
      f"cannot read {path}: it is damaged, no StableHLO of lip_jax, or of a version that this JAX "
      f"({jax.__version__}) does not read ({one_line(error, 200)}); export the network again"
    ) from error
  call = jax.jit(exported.call)
  return lambda *inputs: jax.tree.map(np.asarray, call(*map(jnp.asarray, inputs))), config


def to_onnx(network: InferenceFunction) -> tuple[bytes, str]:
  """As `to_stablehlo`, of an ONNX file, in float32 or float16.

  Raises:
    UsageError: a package is missing, or ONNX has no such network.
  """
  runtime = _onnxruntime()
  from onnx import helper

  from lip_jax.export import onnx_graph

  if network.more and network.config["dtype"] != "float32":
    raise UsageError(
      f"detectors as ONNX compute in float32 only, not {network.config['dtype']}: what is found "
      "would not be what the model finds; leave out the dtype, or write StableHLO"
    )
  if network.config["dtype"] not in ("float32", "float16"):
    raise UsageError(
      f"ONNX Runtime has no {network.config['dtype']} convolutions; write float32 or float16"
    )
  names = {key: network.config[key] for key in ("inputs", "outputs") if key in network.config}
  model = onnx_graph.to_onnx(network.function, *network.symbolic_arguments, **names)
  helper.set_model_props(model, {_CONFIG_ENTRY: json.dumps(network.config)})
  return model.SerializeToString(), f"onnxruntime {runtime.__version__}"


def load_onnx(path: str | Path) -> Loaded:
  """As `load_stablehlo`, of an ONNX file, run by ONNX Runtime on the CPU."""
  path = _existing(path)
  runtime = _onnxruntime()
  try:
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    text = session.get_modelmeta().custom_metadata_map[_CONFIG_ENTRY]
  except Exception as error:  # ONNX Runtime's have no class of their own to catch
    raise UsageError(
      f"cannot read {path}: it is damaged, no ONNX model of lip_jax, or has operations that "
      f"onnxruntime {runtime.__version__} lacks ({one_line(error)}); export the network again"
    ) from error
  config = parse_json(text, f"the metadata of {path}")
  names = [one.name for one in session.get_inputs()]

  def call(*inputs: Any) -> Any:
    found = session.run(None, dict(zip(names, map(np.asarray, inputs), strict=True)))
    return tuple(found) if "outputs" in config else found[0]

  return call, config


def _existing(path: str | Path) -> Path:
  path = Path(path)
  if not path.is_file():
    raise UsageError(f"there is no file {path}; give one that lip-jax export wrote")
  return path


def _onnxruntime() -> Any:
  try:
    import onnx  # noqa: F401
    import onnxruntime
  except ImportError as error:
    raise UsageError(f"ONNX needs the packages of lip-jax[onnx] ({error}); install it") from None
  return onnxruntime
