"""Networks as ONNX models, for ONNX Runtime and other runtimes; needs lip-jax[onnx].

One input, `images`, and one output, `logits`; the number of images is open. The metadata has the
entry `config`, a JSON text that says what classes there are and how images are prepared.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from lip_jax.errors import UsageError
from lip_jax.export import inference, validation

_CONFIG = "config"


def save(
  path: str | Path,
  model: nnx.Module,
  config: Mapping[str, Any],
  *,
  image_size: int | None = None,
  overwrite: bool = False,
) -> inference.Report:
  """Writes `model` as ONNX, for any number of images of one size.

  The file appears under its name only after ONNX Runtime has read it and agrees with the model.

  Args:
    path: of the file, usually `.onnx`.
    model: of `create_model`, with weights, computing in float32 or float16.
    config: as for `lip_jax.export.stablehlo.save`.
    image_size: height and width in pixels; None: those of config["preprocess"].
    overwrite: replace a file.

  Raises:
    UsageError: packages are missing, the file cannot be written or does not agree, or no image size
      is known. Nothing is left then.
  """
  path = Path(path)
  inference.check_target(path, overwrite=overwrite)
  runtime = _runtime()
  from onnx import helper

  from lip_jax.export import onnx_graph

  network = inference.prepare(model, config, image_size)
  if network.config["dtype"] not in ("float32", "float16"):
    raise UsageError(
      f"ONNX Runtime has no {network.config['dtype']} convolutions; write float32 or float16"
    )
  with inference.tracing(network), inference.checking_device():
    converted = onnx_graph.convert(network.function, network.symbolic_images)
  helper.set_model_props(converted, {_CONFIG: json.dumps(network.config)})
  return inference.write_checked(
    path,
    network,
    lambda temporary: temporary.write_bytes(converted.SerializeToString()),
    load,
    f"onnxruntime {runtime.__version__}",
  )


def load(path: str | Path) -> tuple[Callable[[np.ndarray], np.ndarray], dict[str, Any]]:
  """The network in a file that `save` wrote, run by ONNX Runtime on the CPU; what is known of it.

  Args:
    path: of the file.

  Returns:
    The network, from images [N, S, S, 3] to logits float32 [N, num_classes]; and
    `portable.Network.config`.

  Raises:
    UsageError: there is no such file, it is damaged, or ONNX Runtime is missing.
  """
  path = Path(path)
  runtime = _runtime()
  if not path.is_file():
    raise UsageError(f"there is no file {path}; give one that lip-jax export wrote")
  try:
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    text = session.get_modelmeta().custom_metadata_map[_CONFIG]
  except Exception as error:  # ONNX Runtime's have no class of their own to catch
    reason = " ".join(str(error).split())[:300]
    raise UsageError(
      f"cannot read {path}: it is damaged or no ONNX model of lip_jax ({reason}); export the "
      "network again"
    ) from error
  config = validation.parse_json(text, f"the metadata of {path}")
  return lambda images: session.run(["logits"], {"images": np.asarray(images)})[0], config


def _runtime() -> Any:
  try:
    import onnx  # noqa: F401
    import onnxruntime
  except ImportError as error:
    raise UsageError(f"ONNX needs the packages of lip-jax[onnx] ({error}); install it") from None
  return onnxruntime
