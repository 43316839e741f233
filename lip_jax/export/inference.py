"""What all exported forms share: images in, logits out, and the check of what was written."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import lip_jax
from lip_jax.errors import UsageError
from lip_jax.export.destination import replacing
from lip_jax.ops.images import normalize

FORMAT = 1

# From the largest difference to the largest logit. In half precision two orders of the same sums
# differ by what the dtype rounds.
_TOLERANCES = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}
_BATCHES = (1, 3)


class InferenceFunction(NamedTuple):
  """A network as a function of images alone, and what is known of it.

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
  def symbolic_images(self) -> jax.ShapeDtypeStruct:
    """Shape and dtype of any number of images."""
    (batch,) = jax.export.symbolic_shape("batch")
    shape = (batch, self.image_size, self.image_size, 3)
    return jax.ShapeDtypeStruct(shape, np.dtype(self.config["input"]["dtype"]))


class ExportReport(NamedTuple):
  """What was written, and how it was checked."""

  path: Path  # of the file or folder
  size: int  # in bytes
  difference: float  # largest one to the model's logits, relative to the largest logit
  tolerance: float  # what it is allowed to be
  runtime: str  # what ran it, for example "onnxruntime 1.32"
  takes: str  # what it wants, in words

  def __str__(self) -> str:
    return (
      f"{self.path}: {self.size / 1e6:.1f} MB, takes {self.takes}; read back and run by "
      f"{self.runtime}, its logits differ from the model's by at most {self.difference:.1e} of the "
      f"largest ({self.tolerance:g} is allowed)"
    )


def prepare(
  model: nnx.Module, config: Mapping[str, Any], image_size: int | None = None
) -> InferenceFunction:
  """The function that a file holds: uint8 images as they are, normalization inside.

  Nobody can get the normalization wrong this way. Without "preprocess" in the config it is not
  known, and the function takes float32 images that are normalized already.

  Args:
    model: of `create_model`, with weights; it is left as it is.
    image_size: in pixels; None: that of config["preprocess"].

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
  return InferenceFunction(
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
  call: Callable[[np.ndarray], np.ndarray], network: InferenceFunction
) -> tuple[float, float]:
  """Compares `call`, what was written, with the network, in batches of 1 and 3 images.

  Returns:
    The largest difference, relative to the largest logit, and what it may be.

  Raises:
    UsageError: it is larger, or there are other logits, or ones that are not finite.
  """
  dtype = np.dtype(network.config["input"]["dtype"])
  images = _images(sum(_BATCHES), network.image_size, dtype)
  with checking_device():
    expected = np.asarray(jax.jit(network.function)(jnp.asarray(images)), np.float64)
    if not np.isfinite(expected).all():
      raise UsageError("the network's own logits are not finite; nothing is written")
    start, parts = 0, []
    for count in _BATCHES:
      parts.append(np.asarray(call(images[start : start + count]), np.float64))
      start += count
  found = np.concatenate(parts)
  tolerance = _TOLERANCES[network.config["dtype"]]
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
def tracing(network: InferenceFunction) -> Iterator[None]:
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
  network: InferenceFunction,
  write: Callable[[Path], object],
  load: Callable[[Path], tuple[Callable[[np.ndarray], np.ndarray], dict[str, Any]]],
  runtime: str,
) -> ExportReport:
  """Writes a file, which appears under its name only after it was read back and agrees.

  Args:
    load: reads it; gives what `check` calls, and its config.

  Raises:
    UsageError: the file cannot be written, or does not agree.
  """
  with replacing(path) as temporary:
    write(temporary)
    call, written = load(temporary)
    difference, tolerance = check(call, network)
    size = temporary.stat().st_size
  images = "normalized float32" if written["input"]["normalized"] else "uint8 RGB"
  takes = f"{images} images [N, {network.image_size}, {network.image_size}, 3]"
  return ExportReport(path, size, difference, tolerance, runtime, takes)


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
