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
entry `config` of its metadata is the same JSON text.
"""

import json
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lip_jax.errors import UsageError, one_line
from lip_jax.export import inference
from lip_jax.export.destination import check_file
from lip_jax.training.json_files import parse_json

PLATFORMS = ("cpu", "cuda", "tpu")

_NETWORK = "network.bin"
_CONFIG_FILE = "config.json"
_CONFIG_ENTRY = "config"
_TIME = (1980, 1, 1, 0, 0, 0)  # the same network gives the same file

# Images [N, S, S, 3] -> logits float32 [N, num_classes]; and the config of the `InferenceFunction`.
Loaded = tuple[Callable[[np.ndarray], np.ndarray], dict[str, Any]]


def save_stablehlo(
  path: str | Path,
  model: nnx.Module,
  config: Mapping[str, Any],
  *,
  image_size: int | None = None,
  overwrite: bool = False,
) -> inference.ExportReport:
  """Writes `model`, for images of one size, once the file was read back and agrees with it.

  Args:
    config: of the model, as from `lip_jax.load`; with "preprocess", the file takes uint8 images and
      normalizes them itself, without, it takes float32 images that are normalized already.
    image_size: height and width in pixels; None: those of config["preprocess"].

  Raises:
    UsageError: the file cannot be written or does not agree, or no image size is known. Nothing is
      left then.
  """
  path = Path(path)
  check_file(path, overwrite=overwrite)
  network = inference.prepare(model, config, image_size)
  with inference.tracing(network):
    exported = jax.export.export(jax.jit(network.function), platforms=PLATFORMS)(
      network.symbolic_images
    )

  def write(temporary: Path) -> None:
    with zipfile.ZipFile(temporary, "w") as archive:
      text = json.dumps(network.config, indent=2) + "\n"
      archive.writestr(zipfile.ZipInfo(_CONFIG_FILE, _TIME), text)
      archive.writestr(zipfile.ZipInfo(_NETWORK, _TIME), bytes(exported.serialize()))

  with inference.checking_device() as platform:
    runtime = f"jax {jax.__version__} on {platform}"
    return inference.write_checked(path, network, write, load_stablehlo, runtime)


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
      config = parse_json(archive.read(_CONFIG_FILE).decode(), f"{_CONFIG_FILE} in {path}")
      exported = jax.export.deserialize(bytearray(archive.read(_NETWORK)))
  except UsageError:
    raise
  except Exception as error:  # bytes of something else can raise anything in JAX's reader
    raise UsageError(
      f"cannot read {path}: it is damaged, no StableHLO of lip_jax, or of a version that this JAX "
      f"({jax.__version__}) does not read ({one_line(error, 200)}); export the network again"
    ) from error
  call = jax.jit(exported.call)
  return lambda images: np.asarray(call(jnp.asarray(images))), config


def save_onnx(
  path: str | Path,
  model: nnx.Module,
  config: Mapping[str, Any],
  *,
  image_size: int | None = None,
  overwrite: bool = False,
) -> inference.ExportReport:
  """As `save_stablehlo`, but as ONNX, run by ONNX Runtime to check it; in float32 or float16."""
  path = Path(path)
  check_file(path, overwrite=overwrite)
  runtime = _onnxruntime()
  from onnx import helper

  from lip_jax.export import onnx_graph

  network = inference.prepare(model, config, image_size)
  if network.config["dtype"] not in ("float32", "float16"):
    raise UsageError(
      f"ONNX Runtime has no {network.config['dtype']} convolutions; write float32 or float16"
    )
  with inference.tracing(network), inference.checking_device():
    onnx_model = onnx_graph.to_onnx(network.function, network.symbolic_images)
  helper.set_model_props(onnx_model, {_CONFIG_ENTRY: json.dumps(network.config)})
  content = onnx_model.SerializeToString()
  return inference.write_checked(
    path,
    network,
    lambda temporary: temporary.write_bytes(content),
    load_onnx,
    f"onnxruntime {runtime.__version__}",
  )


def load_onnx(path: str | Path) -> Loaded:
  """As `load_stablehlo`, of an ONNX file, run by ONNX Runtime on the CPU."""
  path = _existing(path)
  runtime = _onnxruntime()
  try:
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    text = session.get_modelmeta().custom_metadata_map[_CONFIG_ENTRY]
  except Exception as error:  # ONNX Runtime's have no class of their own to catch
    raise UsageError(
      f"cannot read {path}: it is damaged or no ONNX model of lip_jax ({one_line(error)}); export "
      "the network again"
    ) from error
  config = parse_json(text, f"the metadata of {path}")
  return lambda images: session.run(["logits"], {"images": np.asarray(images)})[0], config


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
