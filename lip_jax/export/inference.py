"""What all exported forms share: images in, and the check of what was written."""

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


Arrays = tuple[np.ndarray, ...]
Compared = tuple[float, float, str]  # the largest difference, what it may be, and of what, in words


def _images_alone(images: np.ndarray) -> Arrays:
  return (images,)


def compare_logits(found: Arrays, expected: Arrays, dtype: str) -> Compared:
  """The largest difference of arrays, each in parts of its largest number."""
  difference = max(
    np.abs(one - other).max() / max(np.abs(other).max(), 1e-30)
    for one, other in zip(found, expected, strict=True)
  )
  return float(difference), _TOLERANCES[dtype], "of the largest logit"


class InferenceFunction(NamedTuple):
  """A network as a function of images alone, and what is known of it.

  Attributes:
    function: from [N, H, W, C] of the dtype in config["input"] to logits float32 [N, num_classes],
      or for a detector, with the images' sizes, to several arrays.
    config: what the written file says of itself: "format", "lip_jax" (version), "model",
      "num_classes", "preprocess", "class_names", "source", "dtype" (of the computation), "input".
    shape: H, W, C of an image.
    more: shapes and dtypes of what the function takes of each image beside it.
    examples: what it takes, of images.
    compare: two results; None: they tell too little.
    inside: what the results are chosen from, to compare where they tell too little.
  """

  function: Callable[..., Any]
  config: dict[str, Any]
  shape: tuple[int, int, int]
  more: tuple[jax.ShapeDtypeStruct, ...] = ()
  examples: Callable[[np.ndarray], Arrays] = _images_alone
  compare: Callable[[Arrays, Arrays, str], Compared | None] = compare_logits
  inside: Any = None  # another `InferenceFunction` of the same arguments

  @property
  def symbolic_arguments(self) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Shapes and dtypes of what it takes, of any number of images."""
    (batch,) = jax.export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct(self.shape, np.dtype(self.config["input"]["dtype"]))
    return tuple(
      jax.ShapeDtypeStruct((batch, *one.shape), one.dtype) for one in (images, *self.more)
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
  height, width = (size, size) if isinstance(size, int) else size
  network = on_host(model)

  def function(images: jax.Array) -> jax.Array:
    if preprocess is None:
      return network(images.astype(jnp.float32))
    return network(normalize(images, preprocess["mean"], preprocess["std"]))

  shape = (height, width, network.in_channels)
  return InferenceFunction(function, described(config, network.dtype, preprocess, shape), shape)


def on_host(model: nnx.Module) -> Any:
  """A copy for evaluation, batch norms folded, with weights on the host, as parts of a file."""
  graph, state = nnx.split(model)
  with jax.default_device(checking_device()):
    network = nnx.merge(graph, jax.tree.map(jnp.asarray, jax.device_get(state)))
    network.eval()
    return fold_batch_norm(network, for_cpu=False)


def described(
  config: Mapping[str, Any],
  dtype: Any,
  preprocess: Mapping[str, Any] | None,
  shape: tuple[int, int, int],
) -> dict[str, Any]:
  """`InferenceFunction.config`."""
  keys = ("model", "num_classes", "class_names", "source")
  return {
    "format": FORMAT,
    "lip_jax": lip_jax.__version__,
    **{key: config.get(key) for key in keys},
    "preprocess": preprocess,
    "dtype": np.dtype(dtype).name,
    "input": {
      "dtype": "float32" if preprocess is None else "uint8",
      "shape": ["batch", *shape],
      "normalized": preprocess is None,
    },
  }


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
  write: Callable[[InferenceFunction], Callable[..., Any]], network: InferenceFunction
) -> Compared:
  """Compares what is written with the network, in batches of 1 and 3 images.

  Args:
    write: writes such a function, and gives what was written to call it.

  Raises:
    UsageError: it is larger, or there are other results, or ones that are not finite.
  """
  found = _check(write(network), network)
  return found or check(write, network.inside)


def _check(call: Callable[..., Any], network: InferenceFunction) -> Compared | None:
  images = _images(network.shape, np.dtype(network.config["input"]["dtype"]))
  arguments = network.examples(images)
  with jax.default_device(checking_device()):
    expected = _arrays(jax.jit(network.function)(*map(jnp.asarray, arguments)))
    if not all(np.isfinite(array).all() for array in expected):
      raise UsageError("the network's own results are not finite; nothing is written")
    parts = [_arrays(call(*(one[part] for one in arguments))) for part in (np.s_[:1], np.s_[1:])]
  found = tuple(map(np.concatenate, zip(*parts, strict=True)))
  shapes = [[array.shape for array in result] for result in (found, expected)]
  if shapes[0] != shapes[1]:
    raise UsageError(f"what was written gives arrays {shapes[0]}, expected {shapes[1]}")
  compared = network.compare(found, expected, network.config["dtype"])
  if compared is None:
    return None
  difference, tolerance, unit = compared
  if not difference <= tolerance:
    raise UsageError(
      f"what was written differs from the model by {difference:.1e} {unit}, at most {tolerance:g} "
      "is allowed; nothing is kept. Please report this with the versions of jax and of the runtime"
    )
  return compared


def _arrays(result: Any) -> Arrays:
  """One or several arrays, numbers as float64."""
  arrays = map(np.asarray, result if isinstance(result, tuple | list) else [result])
  return tuple(a if a.dtype == bool else a.astype(np.float64) for a in arrays)


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
