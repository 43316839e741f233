"""Networks as StableHLO, through `jax.export`: one file for CPU, CUDA and TPU, weights inside.

The file is a ZIP archive, not compressed, with `network.bin`, which `jax.export.deserialize` takes,
and `config.json`, which says what classes there are and how images are prepared. Without lip_jax:

    archive = zipfile.ZipFile("network.stablehlo")
    network = jax.export.deserialize(bytearray(archive.read("network.bin")))
    logits = network.call(images)  # uint8 [N, 224, 224, 3]

JAX promises to read what an older version exported for six months. The exported folder lasts
longer: keep it.
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

from lip_jax.errors import UsageError
from lip_jax.export import inference, validation

PLATFORMS = ("cpu", "cuda", "tpu")

_NETWORK = "network.bin"
_CONFIG = "config.json"
_TIME = (1980, 1, 1, 0, 0, 0)  # the same network gives the same file


def save(
  path: str | Path,
  model: nnx.Module,
  config: Mapping[str, Any],
  *,
  image_size: int | None = None,
  overwrite: bool = False,
) -> inference.Report:
  """Writes `model` as StableHLO, for any number of images of one size.

  The file appears under its name only after it has been read back and agrees with the model.

  Args:
    path: of the file, usually `.stablehlo`.
    model: of `create_model`, with weights.
    config: of the model, as from `lip_jax.load`; with "preprocess", the file takes uint8 images and
      normalizes them itself, without, it takes float32 images that are normalized already.
    image_size: height and width in pixels; None: those of config["preprocess"].
    overwrite: replace a file.

  Raises:
    UsageError: the file cannot be written or does not agree, or no image size is known. Nothing is
      left then.
  """
  path = Path(path)
  inference.check_target(path, overwrite=overwrite)
  network = inference.prepare(model, config, image_size)
  with inference.tracing(network):
    exported = jax.export.export(jax.jit(network.function), platforms=PLATFORMS)(
      network.symbolic_images
    )

  def write(temporary: Path) -> None:
    with zipfile.ZipFile(temporary, "w") as archive:
      text = json.dumps(network.config, indent=2) + "\n"
      archive.writestr(zipfile.ZipInfo(_CONFIG, _TIME), text)
      archive.writestr(zipfile.ZipInfo(_NETWORK, _TIME), bytes(exported.serialize()))

  with inference.checking_device() as platform:
    return inference.write_checked(
      path, network, write, load, f"jax {jax.__version__} on {platform}"
    )


def load(path: str | Path) -> tuple[Callable[[np.ndarray], np.ndarray], dict[str, Any]]:
  """The network in a file that `save` wrote, and what is known of it.

  It is a program, which XLA compiles and runs: read files of those you trust only.

  Args:
    path: of the file.

  Returns:
    The network, from images [N, S, S, 3] to logits float32 [N, num_classes], compiled for each
    number of images, on JAX's default device; and `portable.Network.config`.

  Raises:
    UsageError: there is no such file, or it is damaged, or another version of JAX is needed.
  """
  path = Path(path)
  if not path.is_file():
    raise UsageError(f"there is no file {path}; give one that lip-jax export wrote")
  try:
    with zipfile.ZipFile(path) as archive:
      config = validation.parse_json(archive.read(_CONFIG).decode(), f"{_CONFIG} in {path}")
      exported = jax.export.deserialize(bytearray(archive.read(_NETWORK)))
  except UsageError:
    raise
  except Exception as error:  # bytes of something else can raise anything in JAX's reader
    reason = " ".join(str(error).split())[:200]
    raise UsageError(
      f"cannot read {path}: it is damaged, no StableHLO of lip_jax, or of a version that this JAX "
      f"({jax.__version__}) does not read ({reason}); export the network again"
    ) from error
  call = jax.jit(exported.call)
  return lambda images: np.asarray(call(jnp.asarray(images))), config
