"""Weights in the authors' PyTorch names and layouts <-> our parameter tree."""

import functools
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Set

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lip_jax.errors import UsageError
from lip_jax.models.densenet import DenseNet
from lip_jax.models.description import check_weights
from lip_jax.models.lan import LIP
from lip_jax.models.network import Network
from lip_jax.models.resnet import ResNet

log = logging.getLogger("lip_jax")

# Patterns and what takes their places, as of `re.sub`.
Rules = tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...]

# Our path, dots between its parts -> the authors' name. Applied in order, each at most once;
# {conv} is the convolution of a block that the transition replaces.
_RESNET_RULES = (
  (r"^pool\.logits\.", "maxpool.logit."),
  (r"\.spatial\.trunk\.", ".bottleneck_shared.logit."),
  (r"\.spatial\.residual_pool\.logits\.", ".{conv}.0.postprocessing."),
  (r"\.spatial\.shortcut_pool\.logits\.", ".downsample.lip.postprocessing."),
  (r"\.spatial\.shortcut_conv\.", ".downsample.conv."),
  (r"\.shortcut_bn\.", ".downsample.bn."),
  (r"\bnorm(\d?)\.", r"bn\1."),  # instance norms are called bn there
)
_DENSENET_RULES = (
  (r"^(?!classifier)", "features."),
  (r"(denseblock\d)\.(\d+)", lambda match: f"{match[1]}.denselayer{int(match[2]) + 1}"),
  (r"pool(0?)\.logits\.projection\.(conv|norm)", r"pool\1.logits.\g<2>3"),
  (r"pool(0?)\.logits\.trunk\.", r"pool\1.logits."),
  (r"pool(0?)\.logits\.(conv|norm)\.", r"pool\1.logits.\g<2>1."),
  (r"\.logits\.norm", ".logits.bn"),
  (r"\.logits\.", ".logit."),
)
_LEAF_RULES = (
  (r"\.kernel$", ".weight"),
  (r"\.scale$", ".weight"),
  (r"\.mean$", ".running_mean"),
  (r"\.var$", ".running_var"),
)
# Other spellings of the same names: torchvision counts the parts of a shortcut where the authors
# name them, and its published DenseNets number a layer's parts with a dot.
SPELLINGS: Rules = (
  (r"\bdownsample\.0\.", "downsample.conv."),
  (r"\bdownsample\.1\.", "downsample.bn."),
  (r"(denselayer\d+\.(?:norm|conv))\.([12])\.", r"\1\2."),
)
# What wraps a network puts in front of its names: training on several GPUs, torch.compile,
# Lightning, detectors and other networks that it is a part of.
WRAPPERS = ("module.", "_orig_mod.", "model.", "backbone.", "encoder.")
_COUNTER = "num_batches_tracked"  # PyTorch's, in each batch norm; we keep none


def load_torch_weights(model: nnx.Module, state_dict: Mapping[str, np.ndarray]) -> None:
  """Replaces all parameters and running statistics of `model`, in place.

  Understands the published LIP networks and torchvision's plain ResNets and DenseNets, and, with
  either as a backbone, detectors of torchvision and of mmdetection 0.6, by their preset. Any of
  `WRAPPERS` in front of names is taken off where that makes them fit, and logged; so is what such
  files hold beside the network. `num_batches_tracked` entries are ignored. LIP layers that pool by
  averages at first (`average_steps`) are past that.

  Args:
    model: a network of `create_model` or `create_detector`; without a classifier, that of the state
      dict is left out.
    state_dict: arrays under the authors' (or torchvision's) names, in PyTorch's layouts:
      convolutions [O, I, H, W], linear layers [O, I].

  Raises:
    UsageError: names that are missing or left over, and shapes that differ: all of them in one
      message. The model is then unchanged.
  """
  variables = dict(torch_names(model))
  head = None
  if isinstance(model, Network) and getattr(model, model.classifier_name) is None:
    head = model.classifier_name
  source: dict[str, np.ndarray] = {}
  twice: list[str] = []
  others: list[str] = []
  wrappers: set[str] = set()
  for given, value in state_dict.items():
    if given.endswith(_COUNTER):
      continue
    wrapper, name = _unwrapped(given, variables.keys(), spellings(model), head)
    if name is None:
      others.append(given)
    elif name.split(".")[0] != head:
      if name in source:
        twice.append(f"{name} twice, the second time as {given}")
      wrappers.add(wrapper)
      source[name] = np.asarray(value)
  beside = [name for name in others if not name.startswith(tuple(wrappers))]
  if len(beside) < len(others) or len(source) < len(variables):
    source |= {name: np.asarray(state_dict[name]) for name in others}  # which makes them faults
  check_weights(
    {name: (array.shape, array.dtype.name) for name, array in source.items()},
    {
      name: jax.ShapeDtypeStruct(_torch_shape(variable.shape), variable.dtype)
      for name, variable in variables.items()
    },
    "the weights do not fit the model; is it of another depth, width or number of classes?",
    twice,
    most=None,
  )
  for name, variable in variables.items():
    variable.set_value(jnp.asarray(_to_our_layout(source[name]), variable.dtype))
  if beside or wrappers - {"", "module."}:
    log.warning(
      "weights: %s was taken off their names%s",
      ", ".join(sorted(wrappers - {""})),
      f", and {len(beside)} others were left out, such as {beside[0]}" if beside else "",
    )
  for layer in _lip_layers(model):
    if layer.steps is not None:
      layer.steps.set_value(jnp.asarray(layer.average_steps, jnp.int32))


def _unwrapped(
  given: str, wanted: Set[str], rules: Rules, head: str | None
) -> tuple[str, str | None]:
  """What is in front of a name, and the name that is wanted; None if it is none of these."""
  name = given
  while True:
    spelt = name
    for pattern, replacement in rules:
      spelt = re.sub(pattern, replacement, spelt)
    if spelt in wanted or spelt.split(".")[0] == head:
      return given.removesuffix(name), spelt
    wrapper = next((one for one in WRAPPERS if name.startswith(one)), None)
    if wrapper is None:
      return "", None
    name = name.removeprefix(wrapper)


def to_torch_state_dict(model: nnx.Module) -> dict[str, np.ndarray]:
  """All parameters and running statistics, as PyTorch's `load_state_dict` takes them.

  The inverse of `load_torch_weights`, bit for bit: from the authors' names (torchvision's for
  networks without LIP) to arrays in PyTorch's layouts, with a `num_batches_tracked` of zero for
  each batch norm.
  """
  state_dict: dict[str, np.ndarray] = {}
  plain = not _lip_layers(model)
  for name, variable in torch_names(model):
    if plain:
      name = name.replace("downsample.conv.", "downsample.0.")
      name = name.replace("downsample.bn.", "downsample.1.")
    state_dict[name] = _to_torch_layout(np.asarray(variable[...]))
    if name.endswith(".running_var"):
      counter = f"{name.removesuffix('running_var')}{_COUNTER}"
      state_dict[counter] = np.zeros((), np.int64)
  return state_dict


@functools.singledispatch
def torch_names(model: nnx.Module) -> Iterator[tuple[str, nnx.Variable]]:
  """(The authors' name, our variable) for each parameter and running statistic.

  What the authors' networks do not have, such as the parameters of other poolings, keeps our name.
  Other kinds of network register theirs.
  """
  if not isinstance(model, (ResNet, DenseNet)):
    raise UsageError(
      f"there are no PyTorch names for a {type(model).__name__}, only for networks of create_model "
      "and create_detector"
    )
  rules = _DENSENET_RULES if isinstance(model, DenseNet) else _resnet_rules(model)
  return renamed(model, rules)


@functools.singledispatch
def spellings(model: nnx.Module) -> Rules:
  """What turns names in files into those of `torch_names`, where they differ."""
  del model
  return SPELLINGS


def renamed(module: nnx.Module, rules: Rules = ()) -> Iterator[tuple[str, nnx.Variable]]:
  """(Name, variable): our paths, changed by rules, with PyTorch's names of a layer's arrays."""
  for path, variable in nnx.to_flat_state(nnx.state(module, (nnx.Param, nnx.BatchStat))):
    name = ".".join(map(str, path))
    if jnp.issubdtype(variable.dtype, jnp.integer):  # the step counter of a LIP layer
      continue
    for pattern, replacement in (*rules, *_LEAF_RULES):
      name = re.sub(pattern, replacement, name)
    yield name, variable


def _resnet_rules(model: ResNet) -> Rules:
  first_blocks = {stage: getattr(model, f"layer{stage}")[0] for stage in (2, 3, 4)}
  conv = first_blocks[2].transition_name
  rules = [(pattern, replacement.format(conv=conv)) for pattern, replacement in _RESNET_RULES]
  for stage, block in first_blocks.items():
    # Behind a pooling, the convolution of the residual branch is the second part of a sequence.
    if hasattr(block.spatial, "residual_pool"):
      rules.append((rf"^(layer{stage}\.0)\.spatial\.residual_conv\.", rf"\1.{conv}.1."))
  # What predicts the offsets of a deformable convolution stands beside it.
  offsets = (r"\.(conv\d)\.offset\.", r".\1_offset.")
  return (*rules, (r"\.spatial\.residual_conv\.", f".{conv}."), offsets)


def _lip_layers(model: nnx.Module) -> list[LIP]:
  return [module for _, module in nnx.iter_modules(model) if isinstance(module, LIP)]


def _to_our_layout(value: np.ndarray) -> np.ndarray:
  """[O, I, H, W] -> [H, W, I, O] and [O, I] -> [I, O]; vectors as they are."""
  return value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T


def _torch_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
  """Shape in PyTorch's layout of a variable that has this shape here."""
  return (shape[3], shape[2], *shape[:2]) if len(shape) == 4 else shape[::-1]


def _to_torch_layout(value: np.ndarray) -> np.ndarray:
  """[H, W, I, O] -> [O, I, H, W] and [I, O] -> [O, I]; vectors as they are."""
  return value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T
