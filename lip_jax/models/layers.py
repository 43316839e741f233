"""Convolution, normalization and the dtype policy that every model shares.

Parameters and batch statistics are float32 (float64 in float64 models) whatever the compute dtype;
normalizations compute in that precision and cast their output. Paddings are explicit: at even sizes
"SAME" pads differently from the networks that the published weights come from.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.typing import Dtype
from jax import lax

from lip_jax.errors import UsageError
from lip_jax.models import padding
from lip_jax.ops.by_image import by_image
from lip_jax.ops.convolution import of_groups, of_images
from lip_jax.ops.deform_conv import deform_conv
from lip_jax.ops.kernels.dispatch import targets
from lip_jax.ops.normalization import apply_moments, normalize, varying_alike

# He et al. 2015 with fan-out, as fb.resnet.torch and torchvision initialise convolutions.
kaiming_fan_out = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")
# The same with fan-in: DenseNets.
kaiming_fan_in = nnx.initializers.variance_scaling(2.0, "fan_in", "normal")
# Uniform in +-1 / sqrt(fan_in): what PyTorch gives a linear layer's weight.
linear_uniform = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")

BATCH_NORM = "batch_norm"  # the scope in which one is evaluated, which `lip_jax.models.cost` counts


def param_dtype(dtype: Dtype) -> Dtype:
  """Dtype of the parameters and statistics of a model that computes in `dtype`."""
  return jnp.promote_types(dtype, jnp.float32)


def check_sizes(least: int = 1, **sizes: Any) -> None:
  """Raises UsageError unless all are whole numbers, at least `least`."""
  for name, value in sizes.items():
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < least:
      bound = "positive" if least == 1 else f"at least {least}"
      raise UsageError(f"{name} must be a whole number and {bound}, got {value!r}")


def check_choice(valid: Sequence[str], **choice: Any) -> None:
  """Raises UsageError unless what is chosen is one of the valid names."""
  ((name, value),) = choice.items()
  if value not in valid:
    raise UsageError(f"unknown {name} {value!r}; choose one of {', '.join(valid)}")


def check_four(name: str, sizes: Any) -> None:
  """Raises UsageError unless `sizes` are four positive whole numbers, one per stage."""
  if not isinstance(sizes, (tuple, list)) or len(sizes) != 4:
    raise UsageError(f"{name} must be four positive numbers, got {sizes!r}")
  check_sizes(**{f"{name}[{index}]": size for index, size in enumerate(sizes)})


def apply(module: Callable[..., jax.Array], *inputs: jax.Array, remat: bool) -> jax.Array:
  """`module(*inputs)`; with `remat`, gradients keep only the inputs and compute the rest again."""
  if not remat:
    return module(*inputs)
  return nnx.remat(lambda module, *inputs: module(*inputs))(module, *inputs)


def call_by_image(
  module: nnx.Module, method: Callable[..., Any], *images: jax.Array, **options: Any
) -> Any:
  """`method(module, *images, **options)` by `lip_jax.ops.by_image`; for evaluation."""
  graph, state = nnx.split(module)

  def function(*args):
    *images, state = args
    return method(nnx.merge(graph, state), *images, **options)

  return by_image(function, images, state)


@jax.custom_jvp
def relu(x: jax.Array) -> jax.Array:
  """`nnx.relu`, whose gradient reads the result, which the next layer has in memory anyway.

  For sums, of which XLA would read all parts once more.
  """
  return nnx.relu(x)


@relu.defjvp
def _relu_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
  (x,), (tangent,) = primals, tangents
  y = relu(x)
  return y, jnp.where(y != 0, tangent, 0)  # XLA would turn y > 0 into x > 0


def fork(x: jax.Array, norm: Callable[..., jax.Array]) -> tuple[jax.Array, jax.Array]:
  """X twice: for a convolution, which `norm` follows, and for all else that reads it.

  On GPUs the convolution's gradient comes first in the sum of both, so that XLA adds the other as
  it writes it. Reverse mode alone, and so only where that of a norm by the batch's statistics is.
  """
  by_batch = type(norm) is BatchNorm and not (norm.use_running_average or norm.frozen)
  return _fork(x) if by_batch and "cuda" in targets() else (x, x)


@jax.custom_vjp
def _fork(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  return x, x


_fork.defvjp(lambda x: ((x, x), None), lambda _, gs: (gs[0] + gs[1],))


class BatchNorm(nnx.Module):
  """Batch normalization over groups of consecutive images.

  In training each group of `group_size` images along the batch axis is normalized by its own mean
  and variance, as if it were alone on one GPU: the statistics of a recipe ("batch norm over 32
  images") then hold on any number of devices, and need no traffic between devices whenever a group
  fits on one. The running statistics follow the average over the groups, with the unbiased
  variance (n / (n - 1)), as PyTorch's do.

  Gradients are reverse mode (`jax.grad`, `jax.vjp`).

  `mean` and `var` are [C]. Given as [groups, C] instead, each group keeps its own, so that these
  need no traffic either; evaluation takes their average, which is the same.

  Args:
    features: C of the input [N, H, W, C].
    group_size: images per group; None or 0 for the whole batch.
    axis_name: inside `jax.shard_map`, the mesh axes over which each group is spread; every device
      then has an equal part of one group.
    frozen: also in training normalize by the running statistics, and leave them as they are: what
      detectors call FrozenBatchNorm. Scale and bias have gradients as ever; whether they are
      trained is up to the optimizer.
    affine: whether scale and bias are parameters; if not, they belong to the statistics.
  """

  def __init__(
    self,
    features: int,
    *,
    group_size: int | None = None,
    axis_name: tuple[str, ...] | None = None,
    frozen: bool = False,
    affine: bool = True,
    momentum: float = 0.9,
    epsilon: float = 1e-5,
    zero_init: bool = False,
    dtype: Dtype = jnp.float32,
  ):
    kept = param_dtype(dtype)
    kind = nnx.Param if affine else nnx.BatchStat
    self.scale = kind((jnp.zeros if zero_init else jnp.ones)((features,), kept))
    self.bias = kind(jnp.zeros((features,), kept))
    self.mean = nnx.BatchStat(jnp.zeros((features,), kept))
    self.var = nnx.BatchStat(jnp.ones((features,), kept))
    self.group_size = group_size
    self.axis_name = axis_name
    self.frozen = frozen
    self.momentum = momentum
    self.epsilon = epsilon
    self.dtype = dtype
    self.use_running_average = False  # what model.eval() and model.train() set

  def __call__(self, x: jax.Array, relu: bool = False) -> jax.Array:
    if self.use_running_average or self.frozen:
      mean, var, scale, bias = self._fixed()
      with jax.named_scope(BATCH_NORM):
        y = apply_moments(x, mean, var, scale, bias, self.epsilon, self.dtype)
      return padding.blank(nnx.relu(y) if relu else y)
    n = x.shape[0]
    here = n if self.axis_name or not self.group_size else self.group_size
    if n % here:
      raise ValueError(
        f"batch norm over groups of {here} images needs a batch that is a multiple of {here}, got "
        f"{n} images; change the batch size or bn_group_size (0: the whole batch is one group)"
      )
    groups = x.reshape(n // here, here, *x.shape[1:])
    scale, bias = varying_alike(x, self.scale[...], self.bias[...])
    y, mean, var = normalize(
      groups, scale, bias, self.epsilon, self.dtype, (1, 2, 3), self.axis_name, None, relu
    )
    devices = jax.lax.axis_size(self.axis_name) if self.axis_name else 1
    count = devices * here * x.shape[1] * x.shape[2]
    self._update(self.mean, mean)
    self._update(self.var, var * (count / max(count - 1, 1)))
    return padding.blank(y.reshape(x.shape))

  def factors(self) -> tuple[jax.Array, jax.Array]:
    """What evaluation does as one gain and one offset per channel: y = gain * x + offset."""
    mean, var, scale, bias = self._fixed()
    gain = jax.lax.rsqrt(var + self.epsilon) * scale
    return gain, bias - mean * gain

  def _fixed(self) -> list[jax.Array]:
    """Running mean and variance, scale and bias, [C]."""
    arrays = (self.mean[...], self.var[...], self.scale[...], self.bias[...])
    return [array.reshape(-1, array.shape[-1]).mean(axis=0) for array in arrays]

  def _update(self, running: nnx.BatchStat, groups: jax.Array):
    batch = groups.reshape(len(groups), -1)
    if running.ndim == 1:
      batch = batch.mean(axis=0)
    running[...] = self.momentum * running[...] + (1 - self.momentum) * batch


def make_batch_norm(
  bn_group_size: int | None = None,
  bn_axis_name: tuple[str, ...] | None = None,
  bn_frozen: bool = False,
  bn_affine: bool = True,
  bn_epsilon: float = 1e-5,
) -> Callable[..., BatchNorm]:
  """What makes a network's batch norms: (features, zero_init=, dtype=) -> `BatchNorm`.

  Args:
    bn_group_size: images per batch-norm group in training; None or 0 for the whole batch.
    bn_axis_name: `BatchNorm`'s axis_name.
    bn_affine: whether scale and bias are parameters; not so in torchvision's detectors. A network
      without them needs bn_frozen.
    bn_epsilon: added to the variance; 0 in torchvision's detectors.
  """
  check_sizes(least=0, bn_group_size=0 if bn_group_size is None else bn_group_size)
  for name, value in (("bn_frozen", bn_frozen), ("bn_affine", bn_affine)):
    if not isinstance(value, bool):
      raise UsageError(f"{name} must be True or False, got {value!r}")
  if not (bn_affine or bn_frozen):
    raise UsageError("bn_affine=False is for networks with bn_frozen=True; give both or neither")
  if not isinstance(bn_epsilon, (int, float)) or not 0 <= bn_epsilon < math.inf:
    raise UsageError(f"bn_epsilon must be a number and at least 0, got {bn_epsilon!r}")
  return functools.partial(
    BatchNorm,
    group_size=bn_group_size,
    axis_name=bn_axis_name,
    frozen=bn_frozen,
    affine=bn_affine,
    epsilon=bn_epsilon,
  )


class LayerFactory(NamedTuple):
  """Makes a network's layers, of one compute dtype and from one source of initial weights."""

  dtype: Dtype
  rngs: nnx.Rngs
  init: nnx.Initializer = kaiming_fan_out  # of convolutions
  norm_layer: Callable[..., BatchNorm] = BatchNorm  # (features, zero_init=, dtype=) -> norm
  zero_init_residual: bool = False
  # Of the 3x3 convolutions inside of blocks: how many groups of channels there are that do not mix,
  # and whether the places that are read are learned.
  groups: int = 1
  deformable: bool = False

  @property
  def options(self) -> dict[str, Any]:
    """What makes a layer of its own needs."""
    return {"dtype": self.dtype, "rngs": self.rngs}

  def conv(
    self,
    in_features: int,
    out_features: int,
    size: int,
    stride: int = 1,
    *,
    use_bias: bool = False,
    groups: int = 1,
  ) -> nnx.Conv:
    """Square convolution, [N, H, W, in] -> [N, ceil(H / stride), ..., out], odd sizes."""
    function: Callable[..., jax.Array] = lax.conv_general_dilated
    if groups > 1:
      function = of_groups
    elif in_features <= 4 < size:
      function = of_images
    return nnx.Conv(
      in_features,
      out_features,
      (size, size),
      strides=stride,
      padding=((size // 2, size // 2),) * 2,
      use_bias=use_bias,
      feature_group_count=groups,
      param_dtype=param_dtype(self.dtype),
      kernel_init=self.init,
      conv_general_dilated=function,
      **self.options,
    )

  def conv3x3(
    self, in_features: int, out_features: int, stride: int = 1
  ) -> "nnx.Conv | DeformableConv":
    """What a block has for its 3x3 convolution, by `groups` and `deformable`."""
    if not self.deformable:
      return self.conv(in_features, out_features, 3, stride, groups=self.groups)
    return DeformableConv(in_features, out_features, stride, self)

  def norm(self, features: int, ends_branch: bool = False) -> BatchNorm:
    """Batch norm; `ends_branch`: it is the last of a residual branch."""
    zero_init = ends_branch and self.zero_init_residual
    return self.norm_layer(features, zero_init=zero_init, dtype=self.dtype)

  def instance_norm(self, features: int) -> "InstanceNorm":
    return InstanceNorm(features, dtype=self.dtype)

  def classifier(self, features: int, num_classes: int) -> nnx.Linear | None:
    """[N, C] -> [N, num_classes], in the parameters' precision; None for no classes."""
    if num_classes == 0:
      return None
    kept = param_dtype(self.dtype)
    return nnx.Linear(
      features,
      num_classes,
      dtype=kept,
      param_dtype=kept,
      kernel_init=linear_uniform,
      rngs=self.rngs,
    )


class DeformableConv(nnx.Module):
  """3x3 convolution that learns where to read: [N, H, W, in] -> [N, ceil(H / stride), ..., out].

  Version 1 of Dai et al., ICCV 2017: a convolution, zero at first, predicts the offsets of the nine
  taps. Reads are bilinear, of zeros outside; where offsets are zero in the padding they have no
  gradient, as in mmdetection 0.6.
  """

  def __init__(self, in_features: int, out_features: int, stride: int, make: LayerFactory):
    shape = (3, 3, in_features // make.groups, out_features)
    kept = param_dtype(make.dtype)
    self.kernel = nnx.Param(make.init(make.rngs.params(), shape, kept))
    zeros = make._replace(init=nnx.initializers.zeros)
    self.offset = zeros.conv(in_features, 18, 3, stride, use_bias=True)
    self.stride = stride
    self.dtype = make.dtype

  def __call__(self, x: jax.Array) -> jax.Array:
    return deform_conv(
      x,
      self.offset(x),
      self.kernel[...].astype(self.dtype),
      stride=self.stride,
      border_gradient=False,
    )


class InstanceNorm(nnx.Module):
  """Normalization of each channel of each image over its pixels, with a learned scale and bias.

  Ulyanov et al. 2016; the same computation in training and evaluation. A constant channel becomes
  the bias. Gradients are reverse mode. `features` is C of the input [N, H, W, C]. Pixels that are
  not `padding.inside` do not count.
  """

  def __init__(self, features: int, *, epsilon: float = 1e-5, dtype: Dtype = jnp.float32):
    kept = param_dtype(dtype)
    self.scale = nnx.Param(jnp.ones((features,), kept))
    self.bias = nnx.Param(jnp.zeros((features,), kept))
    self.epsilon = epsilon
    self.dtype = dtype

  def __call__(self, x: jax.Array, relu: bool = False) -> jax.Array:
    scale, bias = varying_alike(x, self.scale[...], self.bias[...])
    mask = padding.inside(x)
    y = normalize(x, scale, bias, self.epsilon, self.dtype, (1, 2), None, mask, relu)[0]
    return y if mask is None else padding.blank(y)


def rectified(norm: Callable[..., jax.Array], x: jax.Array) -> jax.Array:
  """`nnx.relu(norm(x))`.

  On GPUs a norm of this module and the ReLU have one gradient, which reads g and x alone and
  rectifies again rather than keep the result: fewer bytes there, and more on TPUs.
  """
  if type(norm) in (BatchNorm, InstanceNorm) and "cuda" in targets():
    return norm(x, relu=True)
  return nnx.relu(norm(x))
