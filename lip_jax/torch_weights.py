"""Weights in the authors' PyTorch names and layouts <-> our parameter tree."""

import re
from collections.abc import Iterator, Mapping

import jax.numpy as jnp
import numpy as np
from flax import nnx

from lip_jax.errors import UsageError

# Our path, dots between its parts -> the authors' name. Applied in order, each at most once.
_RESNET_RULES = (
  (r"^pool\.logits\.(conv|norm)", r"maxpool.logit.\1"),
  (r"\.spatial\.trunk\.(conv|norm)(\d)", r".bottleneck_shared.logit.\1\2"),
  (r"\.spatial\.residual_pool\.logits\.", ".conv2.0.postprocessing."),
  (r"\.spatial\.shortcut_pool\.logits\.", ".downsample.lip.postprocessing."),
  (r"\.spatial\.shortcut_conv\.", ".downsample.conv."),
  (r"\.shortcut_bn\.", ".downsample.bn."),
)
# Instance norms are called bn there.
_LEAF_RULES = (
  (r"\bnorm(\d?)\.", r"bn\1."),
  (r"\.kernel$", ".weight"),
  (r"\.scale$", ".weight"),
  (r"\.mean$", ".running_mean"),
  (r"\.var$", ".running_var"),
)
# torchvision's plain networks count the parts of the shortcut instead of naming them.
_TORCHVISION = (("downsample.conv.", "downsample.0."), ("downsample.bn.", "downsample.1."))


def load_torch_weights(model: nnx.Module, state_dict: Mapping[str, np.ndarray]) -> None:
  """Replaces all parameters and running statistics of `model`, in place.

  Understands the published LIP networks and torchvision's plain ResNets, also with the prefix
  `module.` that training on several GPUs leaves. `num_batches_tracked` entries are ignored.

  Args:
    model: a network of `create_model`.
    state_dict: arrays under the authors' (or torchvision's) names, in PyTorch's layouts:
      convolutions [O, I, H, W], linear layers [O, I].

  Raises:
    UsageError: names that are missing or left over, and shapes that differ: all of them in one
      message. The model is then unchanged.
  """
  source = {
    k.removeprefix("module."): v
    for k, v in state_dict.items()
    if not k.endswith("num_batches_tracked")
  }
  for named, counted in _TORCHVISION:
    source = {k.replace(counted, named): v for k, v in source.items()}
  faults: list[str] = []
  found: list[tuple[nnx.Variable, np.ndarray]] = []
  for name, variable in torch_names(model):
    if name not in source:
      faults.append(f"missing {name}")
      continue
    value = _to_our_layout(np.asarray(source.pop(name)))
    if value.shape != variable.shape:
      faults.append(f"shape of {name} is {value.shape}, expected {variable.shape} (our layout)")
    found.append((variable, value))
  faults += [f"unexpected {name}" for name in source]
  if faults:
    raise UsageError(
      f"the weights do not fit the model ({len(faults)} faults; is it another depth, width or "
      f"number of classes?): {'; '.join(faults)}"
    )
  for variable, value in found:
    variable.set_value(jnp.asarray(value, variable.dtype))


def torch_names(model: nnx.Module) -> Iterator[tuple[str, nnx.Variable]]:
  """(The authors' name, our variable) for each parameter and running statistic of a ResNet."""
  for path, variable in nnx.to_flat_state(nnx.state(model, (nnx.Param, nnx.BatchStat))):
    name = ".".join(map(str, path))
    # Behind a pooling, the convolution of the residual branch is the second part of conv2.
    behind_pool = variable.ndim == 4 and variable.shape[0] == 1
    name = name.replace(".spatial.residual_conv.", ".conv2.1." if behind_pool else ".conv2.")
    for pattern, replacement in (*_RESNET_RULES, *_LEAF_RULES):
      name = re.sub(pattern, replacement, name)
    yield name, variable


def _to_our_layout(value: np.ndarray) -> np.ndarray:
  """[O, I, H, W] -> [H, W, I, O] and [O, I] -> [I, O]; vectors as they are."""
  if value.ndim == 4:
    return value.transpose(2, 3, 1, 0)
  return value.T
