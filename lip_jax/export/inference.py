"""What StableHLO and ONNX files share: images in, logits out, and the check of what was written."""

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import lip_jax
from lip_jax.errors import UsageError
from lip_jax.export import folders
from lip_jax.ops.images import normalize

FORMAT = 1

# From the largest difference to the largest logit. In half precision two orders of the same sums
# differ by what the dtype rounds.
_TOLERANCES = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}
_BATCHES = (1, 3)


class Network(NamedTuple):
  """A network from images to logits.

  Attributes:
    function: from [N, S, S, 3] of the dtype in config["input"] to logits float32 [N, num_classes].
    config: what the written file says of itself: "format", "lip_jax" (version), "model",
      "num_classes", "preprocess", "class_names", "source", "dtype" (of the computation), "input".
    image_size: S in pixels.
  """

  function: Callable[[jax.Array], jax.Array]
  config: dict[str, Any]
  image_size: int

  @property
  def input_dtype(self) -> np.dtype:
    return np.dtype(self.config["input"]["dtype"])

  @property
  def symbolic_images(self) -> jax.ShapeDtypeStruct:
    """Shape and dtype of any number of images."""
    (batch,) = jax.export.symbolic_shape("batch")
    return jax.ShapeDtypeStruct((batch, self.image_size, self.image_size, 3), self.input_dtype)


class Report(NamedTuple):
  """What was written, and how it was checked.

  Attributes:
    path: of the file or folder.
    size: in bytes.
    difference: largest difference to the model's logits, relative to the largest logit.
    tolerance: what it is allowed to be.
    runtime: what ran it, for example "onnxruntime 1.32".
    takes: what it wants, in words.
  """

  path: Path
  size: int
  difference: float
  tolerance: float
  runtime: str
  takes: str

  def __str__(self) -> str:
    return (
      f"{self.path}: {self.size / 1e6:.1f} MB, takes {self.takes}; read back and run by "
      f"{self.runtime}, its logits differ from the model's by at most {self.difference:.1e} of the "
      f"largest ({self.tolerance:g} is allowed)"
    )


def prepare(model: nnx.Module, config: Mapping[str, Any], image_size: int | None = None) -> Network:
  """The function that a file holds: uint8 images as they are, normalization inside.

  Nobody can get the normalization wrong this way. Without "preprocess" in the config it is not
  known, and the function takes float32 images that are normalized already.

  Args:
    model: of `create_model`, with weights; it is left as it is.
    config: of the model, as from `lip_jax.load`.
    image_size: height and width in pixels; None: those of config["preprocess"].

  Raises:
    UsageError: neither has an image size.
  """
  preprocess = resized(config.get("preprocess"), image_size)
  size = image_size if preprocess is None else preprocess["image_size"]
  if size is None:
    raise UsageError(
      "the network does not say how its images are prepared; give the image size (--image-size), "
      "and the file will take float32 images that are normalized already"
    )
  graph, state = nnx.split(model)
  network: Any
  with checking_device():  # weights on the host: they become part of the file
    network = nnx.merge(graph, jax.tree.map(jnp.asarray, jax.device_get(state)))
  network.eval()

  def function(images: jax.Array) -> jax.Array:
    if preprocess is None:
      return network(images.astype(jnp.float32))
    return network(normalize(images, preprocess["mean"], preprocess["std"]))

  keys = ("model", "num_classes", "class_names", "source")
  return Network(
    function,
    {
      "format": FORMAT,
      "lip_jax": lip_jax.__version__,
      **{key: config.get(key) for key in keys},
      "preprocess": preprocess,
      "dtype": np.dtype(network.dtype).name,
      "input": {
        "dtype": "float32" if preprocess is None else "uint8",
        "shape": ["batch", size, size, 3],
        "normalized": preprocess is None,
      },
    },
    size,
  )


def resized(preprocess: Mapping[str, Any] | None, image_size: int | None) -> dict[str, Any] | None:
  """How images of another size are prepared: the same part of the image, at `image_size` pixels."""
  if preprocess is None:
    return None
  if image_size is None or image_size == preprocess["image_size"]:
    return dict(preprocess)
  resize = round(preprocess["resize"] * image_size / preprocess["image_size"])
  return {**preprocess, "image_size": image_size, "resize": max(resize, image_size)}


@contextlib.contextmanager
def checking_device() -> Iterator[str]:
  """Computes on the CPU where JAX has it, as accelerators round float32 products; its platform."""
  try:
    device = jax.local_devices(backend="cpu")[0]
  except RuntimeError:  # JAX_PLATFORMS names others only
    device = jax.local_devices()[0]
  with jax.default_device(device):
    yield device.platform


def check(
  call: Callable[[np.ndarray], np.ndarray],
  reference: Callable[[jax.Array], jax.Array],
  config: Mapping[str, Any],
  image_size: int,
) -> tuple[float, float]:
  """Compares what was written with the model, in batches of 1 and 3, noise and patterns.

  Args:
    call: what was written, from images to logits.
    reference: the same of the model.
    config: of the network, as `Network.config`.
    image_size: in pixels.

  Returns:
    The largest difference, relative to the largest logit, and what it may be.

  Raises:
    UsageError: it is larger, or there are other logits, or ones that are not finite.
  """
  images = _images(sum(_BATCHES), image_size, np.dtype(config["input"]["dtype"]))
  with checking_device():
    expected = np.asarray(jax.jit(reference)(jnp.asarray(images)), np.float64)
    if not np.isfinite(expected).all():
      raise UsageError("the network's own logits are not finite; nothing is written")
    start, parts = 0, []
    for count in _BATCHES:
      parts.append(np.asarray(call(images[start : start + count]), np.float64))
      start += count
  found = np.concatenate(parts)
  tolerance = _TOLERANCES[config["dtype"]]
  if found.shape != expected.shape:
    raise UsageError(f"what was written gives logits {found.shape}, expected {expected.shape}")
  difference = float(np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-30))
  if not difference <= tolerance:
    raise UsageError(
      f"what was written differs from the model by {difference:.1e} of the largest logit, at most "
      f"{tolerance:g} is allowed; nothing is kept. Please report this with the versions of jax and "
      "of the runtime"
    )
  return difference, tolerance


@contextlib.contextmanager
def tracing(network: Network) -> Iterator[None]:
  """Context that turns a network into a program; what its image size makes fail is one line."""
  try:
    yield
  except UsageError:
    raise
  except (ValueError, TypeError) as error:
    reason = str(error).splitlines()[0]
    raise UsageError(
      f"the network cannot take images of {network.image_size} px: {reason}"
    ) from error


def write_checked(
  path: Path,
  network: Network,
  write: Callable[[Path], object],
  load: Callable[[Path], tuple[Callable[[np.ndarray], np.ndarray], dict[str, Any]]],
  runtime: str,
) -> Report:
  """Writes a file, which appears under its name only after it was read back and agrees.

  Args:
    path: of the file.
    network: what it is to hold.
    write: writes it to the path that it is given.
    load: reads it; gives what `check` calls, and its config.
    runtime: what runs it then, for the report.

  Raises:
    UsageError: the file cannot be written, or does not agree.
  """
  with folders.replacing(path) as temporary:
    write(temporary)
    call, written = load(temporary)
    difference, tolerance = check(call, network.function, written, network.image_size)
    size = temporary.stat().st_size
  return Report(path, size, difference, tolerance, runtime, describe_input(written))


def check_target(path: Path, *, overwrite: bool) -> None:
  """Raises UsageError if a file may not be written to `path`."""
  if re.match(r"\w+:/", str(path)):
    raise UsageError(f"{path} is not a local path; write to a local one and copy it from there")
  if path.is_dir():
    raise UsageError(f"{path} is a folder; name a file")
  if path.exists() and not overwrite:
    raise UsageError(f"{path} exists; choose another file, or say to overwrite it")


def describe_input(config: Mapping[str, Any]) -> str:
  """What a file takes, in words."""
  size = config["input"]["shape"][1]
  if config["input"]["normalized"]:
    return f"normalized float32 images [N, {size}, {size}, 3]"
  return f"uint8 RGB images [N, {size}, {size}, 3]"


def _images(count: int, size: int, dtype: np.dtype) -> np.ndarray:
  """Different images, [count, S, S, 3]: noise, a slope, a chequered disc and stripes in turn."""
  rng = np.random.default_rng(0)
  y, x = np.mgrid[:size, :size] / size
  disc = (np.hypot(y - 0.4, x - 0.6) < 0.3) * (0.5 + 0.5 * ((16 * y).astype(int) % 2))
  patterns = [rng.random((size, size)), (x + y) / 2, disc, np.sin(40 * (x + 0.3 * y)) / 2 + 0.5]
  colours = rng.uniform(0.4, 1.0, (count, 3))
  images = np.stack([patterns[k % 4][..., None] * colours[k] for k in range(count)])
  if dtype == np.uint8:
    return (255 * images).astype(np.uint8)
  return (4 * images - 2).astype(dtype)
