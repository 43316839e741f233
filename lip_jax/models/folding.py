"""Batch norms in evaluation are part of the convolutions before them: `lip_jax.fold_batch_norm`."""

import functools
from typing import Any, TypeVar

import jax
from flax import nnx

from lip_jax.models import padding
from lip_jax.models.layers import BatchNorm
from lip_jax.ops.convolution import conv_general_dilated

Model = TypeVar("Model", bound=nnx.Module)


class Folded(nnx.Module):
  """What is left of a batch norm: padding stays blank."""

  def __call__(self, x: jax.Array) -> jax.Array:
    return padding.blank(x)


def fold_batch_norm(model: Model, *, for_cpu: bool = True) -> Model:
  """A copy of a network for evaluation alone, in which convolutions do what batch norms did.

  Each convolution whose output goes into a batch norm takes the latter's running statistics, scale
  and bias into its kernel and a bias of its own: the same results up to rounding, without the batch
  norm. What is folded are batch norms in evaluation mode, or frozen ones, of the networks of this
  library, those inside of detectors, too; others stay, such as a DenseNet's in front of a ReLU.
  Works inside of `jax.jit`, too. Convolutions of the copy are those of `lip_jax.ops.convolution`.

  The copy has other parameters than its name says: keep and save the network itself.

  Args:
    for_cpu: on CPUs compute float32's convolutions in forms that are quicker there, and LIP few
      images at a time, up to rounding. False: as everywhere else, for programs that are given away.
  """
  graph, state = nnx.split(model)
  copy = nnx.merge(graph, state, copy=True)
  for _, module in list(nnx.iter_modules(copy)):
    if for_cpu and type(module) is nnx.Conv:
      module.conv_general_dilated = conv_general_dilated
    if for_cpu and hasattr(module, "by_image"):
      module.by_image = True
    for name, source in getattr(module, "norm_inputs", {}).items():
      norm = getattr(module, name)
      conv: Any = functools.reduce(getattr, source.split("."), module)
      # Others stand there in networks that their owners changed.
      if type(norm) is not BatchNorm or type(conv) is not nnx.Conv:
        continue
      if norm.use_running_average or norm.frozen:
        _fold(conv, norm)
        setattr(module, name, Folded())
  return copy


def _fold(conv: nnx.Conv, norm: BatchNorm) -> None:
  gain, offset = norm.factors()
  # In the precision of the statistics, which kernels of half the size do not have.
  conv.kernel = nnx.Param(conv.kernel[...] * gain.reshape(1, 1, 1, -1))
  if conv.bias is None:
    conv.bias = nnx.Param(offset)
    conv.use_bias = True
  else:
    conv.bias[...] = conv.bias[...] * gain + offset
