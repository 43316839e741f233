"""What all exported forms share: images in, logits out, and the check of what was written."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import lip_jax
from lip_jax.errors import UsageError
from lip_jax.models.folding import fold_batch_norm
from lip_jax.ops.images import normalize

FORMAT = 1

# From the largest difference to the largest logit. In half precision two orders of the same sums
# differ by what the dtype rounds.
_TOLERANCES = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}


class InferenceFunction(NamedTuple):
  """A network as a function of images alone, and what is known of it.

  Attributes:
    function: from [N, H, W, C] of the dtype in config["input"] to logits float32 [N, num_classes].
    config: what the written file says of itself: "format", "lip_jax" (version), "model",
      "num_classes", "preprocess", "class_names", "source", "dtype" (of the computation), "input".
    shape: H, W, C of an image.
  """

  function: Callable[[jax.Array], jax.Array]
  config: dict[str, Any]
  shape: tuple[int, int, int]

  @property
  def symbolic_images(self) -> jax.ShapeDtypeStruct:
    """Shape and dtype of any number of images."""
    (batch,) = jax.export.symbolic_shape("batch")
    return jax.ShapeDtypeStruct((batch, *self.shape), np.dtype(self.config["input"]["dtype"]))


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
  height, width = (size, size) if isinstance(size, int) else size
  graph, state = nnx.split(model)
  network: Any
  with jax.default_device(checking_device()):  # weights on the host: they become part of the file
    network = nnx.merge(graph, jax.tree.map(jnp.asarray, jax.device_get(state)))
    network.eval()
    network = fold_batch_norm(network)

  def function(images: jax.Array) -> jax.Array:
    if preprocess is None:
      return network(images.astype(jnp.float32))
    return network(normalize(images, preprocess["mean"], preprocess["std"]))

  shape = (height, width, network.in_channels)
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
        "shape": ["batch", *shape],
        "normalized": preprocess is None,
      },
    },
    shape,
  )


def resized(preprocess: Mapping[str, Any] | None, image_size: int | None) -> dict[str, Any] | None:
  """How images of another size are prepared: the same part of the image, at `image_size` pixels."""
  if preprocess is None:
    return None
  if image_size is None or image_size == preprocess["image_size"]:
    return dict(preprocess)
  if not isinstance(preprocess["image_size"], int):
    raise UsageError(
      f"the network takes images of {preprocess['image_size']} px, height and width; leave out the "
      "image size"
    )
  resize = round(preprocess["resize"] * image_size / preprocess["image_size"])
  return {**preprocess, "image_size": image_size, "resize": max(resize, image_size)}


def checking_device() -> jax.Device:
  """The CPU where JAX has it, as accelerators round float32 products."""
  try:
    return jax.local_devices(backend="cpu")[0]
  except RuntimeError:  # JAX_PLATFORMS names others only
    return jax.local_devices()[0]


def check(
  call: Callable[[np.ndarray], np.ndarray], network: InferenceFunction
) -> tuple[float, float]:
  """Compares `call`, what was written, with the network, in batches of 1 and 3 images.

  Returns:
    The largest difference, relative to the largest logit, and what it may be.

  Raises:
    UsageError: it is larger, or there are other logits, or ones that are not finite.
  """
  images = _images(network.shape, np.dtype(network.config["input"]["dtype"]))
  with jax.default_device(checking_device()):
    expected = np.asarray(jax.jit(network.function)(jnp.asarray(images)), np.float64)
    if not np.isfinite(expected).all():
      raise UsageError("the network's own logits are not finite; nothing is written")
    found = np.concatenate([call(batch) for batch in (images[:1], images[1:])], dtype=np.float64)
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


def _images(shape: tuple[int, int, int], dtype: np.dtype) -> np.ndarray:
  """Different images, [4, H, W, C]: noise, a slope, a chequered disc and stripes."""
  rng = np.random.default_rng(0)
  height, width, channels = shape
  y, x = np.mgrid[:height, :width]
  y, x = y / height, x / width
  disc = (np.hypot(y - 0.4, x - 0.6) < 0.3) * (0.5 + 0.5 * ((16 * y).astype(int) % 2))
  patterns = [rng.random((height, width)), (x + y) / 2, disc, np.sin(40 * (x + 0.3 * y)) / 2 + 0.5]
  images = np.stack(patterns)[..., None] * rng.uniform(0.4, 1.0, (4, 1, 1, channels))
  return (255 * images if dtype == np.uint8 else 4 * images - 2).astype(dtype)
