"""Weights from files under PyTorch names to exported folders, and back."""

import collections
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import nnx
from flax.typing import Dtype

from lip_jax.errors import UsageError
from lip_jax.export import class_names, folders, networks
from lip_jax.export.destination import check_file, replacing
from lip_jax.export.torch_files import read_torch_checkpoint
from lip_jax.models import list_models
from lip_jax.models.cost import count_parameters
from lip_jax.models.description import CLASSIFIERS
from lip_jax.models.torch_names import WRAPPERS, load_torch_weights, to_torch_state_dict

# How images are prepared for the authors' and torchvision's networks: ImageNet's RGB moments.
PREPROCESS = {
  "image_size": 224,
  "resize": 256,
  "mean": [123.675, 116.28, 103.53],
  "std": [58.395, 57.12, 57.375],
}

_CLASSIFIERS = [f"{name}.weight" for name in CLASSIFIERS]
_CLASSIFIER = re.compile(rf"(?:{'|'.join(WRAPPERS)})*(?:{'|'.join(_CLASSIFIERS)})")
# Parts of names that detectors have, of torchvision and of mmdetection 0.6.
_OF_DETECTORS = re.compile(r"(^|\.)(fpn|neck)\.")
_TORCH_SUFFIXES = (".pth", ".pt")
SUFFIXES = (".safetensors", ".npz", *_TORCH_SUFFIXES)


def convert_weights(
  source: str | Path,
  out: str | Path,
  *,
  model: str | None = None,
  num_classes: int | None = None,
  overwrite: bool = False,
  **options: Any,
) -> str:
  """Converts a file of PyTorch weights to an exported folder, or an exported folder to such a file.

  Both ways keep every value, so that there and back gives the same bits (of float32 weights;
  float16 and bfloat16 become float32, float64 is rounded to it).

  Args:
    source: a file with the authors' or torchvision's names (`.pth`, `.pt`, `.safetensors`, `.npz`),
      or an exported folder.
    out: for a file, the folder to write; for a folder, the file: `.safetensors`, `.npz`, or `.pth`
      and `.pt`, which need PyTorch.
    model: for a file, the network that it is of, one of `list_models()`.
    num_classes: for a file, the number of logits; None: what the classifier in the file has.
    overwrite: replace the file, or the folder if it holds an exported network.
    **options: for a file, further arguments of `create_model`, such as logit_width=64.

  Returns:
    What was done, in one line.

  Raises:
    UsageError: the source cannot be read or does not fit the model, with all faults in one message;
      the place to write is taken; PyTorch is needed and not installed.
  """
  source, out = Path(source), Path(out)
  if not source.exists():
    raise UsageError(
      f"there is no file or folder {source}; give a file of PyTorch weights or an exported folder"
    )
  if not source.is_dir():
    return _from_torch(source, out, model, num_classes, options, overwrite)
  given = {"model": model, "num_classes": num_classes, **options}
  given = {name: value for name, value in given.items() if value is not None}
  if given:
    raise UsageError(
      f"{source} says itself what network it is; leave out {', '.join(given)}, which are for "
      "converting a file of PyTorch weights"
    )
  return _to_torch(source, out, overwrite)


def _from_torch(
  source: Path,
  out: Path,
  name: str | None,
  num_classes: int | None,
  options: Mapping[str, Any],
  overwrite: bool,
) -> str:
  if name is None:
    raise UsageError(
      f"which network are the weights in {source} of? Name the model, one of "
      f"{', '.join([*list_models(), *networks.DETECTORS])}"
    )
  if out.suffix in SUFFIXES:
    raise UsageError(
      f"{out} looks like a file, but what becomes of the file {source} is a folder; name a folder"
    )
  folders.check_free(out, overwrite=overwrite)
  network, rounded, config = read(source, name, options, num_classes)
  folders.save(out, network, config, overwrite=overwrite)
  note = " (rounded from float64 to float32)" if rounded else ""
  return f"{_done(source, out, network, config)}{note}"


def read(
  source: str | Path,
  name: str,
  options: Mapping[str, Any],
  num_classes: int | None,
  dtype: Dtype = jnp.float32,
) -> tuple[nnx.Module, bool, dict[str, Any]]:
  """The network of a file of PyTorch weights.

  Returns:
    The network; whether weights were rounded from float64; and its config, with the names of 1,000
    classes where TFDS has them.
  """
  source = Path(source)
  state_dict = read_torch_checkpoint(source)
  model = {"name": name, **options}
  task = networks.task_of(name)
  kind = networks.of({"task": task})
  if num_classes is not None:
    classes = num_classes
  elif kind.count_classes is not None:
    classes = kind.count_classes(model, state_dict, str(source))
  else:
    classes = _num_classes(state_dict, source)
  network = kind.build(model, classes, str(source), dtype)
  load_torch_weights(network, state_dict)
  rounded = any(array.dtype == np.float64 for array in state_dict.values())
  config = {"task": task, "model": model, "num_classes": classes}
  if kind.published is not None:
    return network, rounded, {**config, **kind.published(classes)}
  names = class_names.of_imagenet() if classes == 1000 else None
  return network, rounded, {**config, "preprocess": PREPROCESS, "class_names": names}


def is_detector(path: str | Path) -> bool:
  """Whether a file of PyTorch weights is of a detector, by its names."""
  return any(map(_OF_DETECTORS.search, read_torch_checkpoint(Path(path))))


def _to_torch(source: Path, out: Path, overwrite: bool) -> str:
  if out.suffix not in SUFFIXES:
    raise UsageError(
      f"{source} is a folder, so {out} must be a file that ends in {', '.join(SUFFIXES)}"
    )
  check_file(out, overwrite=overwrite)
  if out.suffix in _TORCH_SUFFIXES:
    try:
      import torch
    except ImportError:
      raise UsageError(
        f"PyTorch is not installed, and {out.suffix} files are written by it; install it (pip "
        f"install torch) or write {out.with_suffix('.safetensors')}, which needs nothing"
      ) from None
  network, config = folders.load(source)
  state_dict: dict[str, Any] = {
    name: np.asarray(array, order="C") for name, array in to_torch_state_dict(network).items()
  }
  with replacing(out) as temporary:
    if out.suffix in _TORCH_SUFFIXES:
      tensors = ((name, torch.tensor(array)) for name, array in state_dict.items())
      torch.save(collections.OrderedDict(tensors), temporary)
    elif out.suffix == ".npz":
      np.savez(temporary, **state_dict)
    else:
      safetensors.numpy.save_file(state_dict, temporary)
  return f"{_done(source, out, network, config)} under their PyTorch names"


def _done(source: Path, out: Path, network: nnx.Module, config: Mapping[str, Any]) -> str:
  return (
    f"{source} -> {out}: {config['model']['name']}, {config['num_classes']} classes, "
    f"{count_parameters(network):,} parameters"
  )


def _num_classes(state_dict: Mapping[str, np.ndarray], source: Path) -> int:
  for name, array in state_dict.items():
    if _CLASSIFIER.fullmatch(name) and array.ndim == 2:
      return array.shape[0]
  raise UsageError(
    f"{source} has no {' or '.join(_CLASSIFIERS)} to take the number of classes from (it begins "
    f"with {', '.join(list(state_dict)[:3])}); is it of another network? If not, give num_classes"
  )
