"""Exported networks: a folder with `model.safetensors` and `config.json`, for use without training.

`model.safetensors` holds the parameters and batch statistics under their paths in the network
(`layer2.0.conv1.kernel`), in our layouts and in the dtypes that they have. `config.json` says how
to build the network and how its images are to be prepared.
"""

import contextlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx
from flax.typing import Dtype

import lip_jax
from lip_jax import models
from lip_jax.errors import UsageError

FORMAT = 1

_WEIGHTS = "model.safetensors"
_CONFIG = "config.json"


def save(
  path: str | Path,
  model: nnx.Module,
  *,
  name: str,
  options: Mapping[str, Any],
  num_classes: int,
  extra: Mapping[str, Any] | None = None,
  overwrite: bool = False,
) -> None:
  """Writes `model` to the folder `path`, which appears under its name only when it is complete.

  Args:
    path: a local folder that does not exist or is empty.
    model: what `create_model(name, num_classes=num_classes, **options)` builds.
    name: one of `list_models()`.
    options: of `create_model`, without num_classes and dtype.
    num_classes: number of logits.
    extra: further entries of `config.json`. "preprocess" says how images are prepared: the shorter
      side is resized to "resize" pixels, the central "image_size" pixels are cut out, and "mean"
      and "std", three numbers for RGB in [0, 255], are subtracted and divided by.
    overwrite: replace a folder that holds an exported network and nothing else.

  Raises:
    UsageError: the folder is in the way, cannot be written, or the model is not what `name`,
      `options` and `num_classes` describe. Nothing is written then.
  """
  path = Path(path)
  check_free(path, overwrite=overwrite)
  config = {
    "format": FORMAT,
    "lip_jax": lip_jax.__version__,
    "model": {"name": name, **options},
    "num_classes": num_classes,
    **(extra or {}),
  }
  text = json.dumps(config, indent=2) + "\n"
  variables = _variables(model)
  faults = _faults(
    {key: variable.shape for key, variable in variables.items()},
    _variables(abstract_model(name, options, num_classes=num_classes)),
  )
  if faults:
    raise UsageError(
      f"the model is not what its name and options describe ({len(faults)} faults; was it built "
      f"with other options?): {'; '.join(faults)}"
    )
  arrays = {key: np.asarray(variable.get_value(), order="C") for key, variable in variables.items()}
  with replacing(path) as folder:
    folder.mkdir()
    safetensors.numpy.save_file(arrays, folder / _WEIGHTS)
    (folder / _CONFIG).write_text(text, encoding="utf-8")


def load(path: str | Path, *, dtype: Dtype = jnp.float32) -> tuple[nnx.Module, dict[str, Any]]:
  """The network of an exported folder in evaluation mode, and what its `config.json` holds.

  Args:
    path: a folder that `save` wrote.
    dtype: of the computation; parameters and statistics become float32 (float64 for float64).

  Raises:
    UsageError: there is no such folder, or it holds something else; weights that are missing, left
      over or of another shape, all of them in one message.
  """
  path = Path(path)
  config = _read_config(path)
  options = dict(config["model"])
  name = options.pop("name")
  model = abstract_model(name, options, num_classes=config["num_classes"], dtype=dtype)
  variables = _variables(model)
  try:
    with safetensors.safe_open(path / _WEIGHTS, framework="numpy") as tensors:
      shapes = {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}  # noqa: SIM118
      faults = _faults(shapes, variables)
      if faults:
        raise UsageError(
          f"{path / _WEIGHTS} does not fit {name} as {_CONFIG} describes it "
          f"({len(faults)} faults; export it again): {'; '.join(faults)}"
        )
      for key, variable in variables.items():
        variable.set_value(jnp.asarray(tensors.get_tensor(key), variable.dtype))
  except (OSError, safetensors.SafetensorError) as error:
    raise UsageError(
      f"cannot read {path / _WEIGHTS}: it is missing or damaged ({error}); copy or export it again"
    ) from error
  model.eval()
  return model, config


def abstract_model(
  name: str, options: Mapping[str, Any], *, num_classes: int, dtype: Dtype = jnp.float32
) -> nnx.Module:
  """The network of `create_model` with shapes in place of arrays, to be filled in: quick to build.

  Raises:
    UsageError: as `create_model`, and for dtype, num_classes or rngs among the options.
  """
  reserved = sorted({"num_classes", "dtype", "rngs"} & set(options))
  if reserved:
    raise UsageError(f"{', '.join(reserved)} is not among the options of a model; leave it out")
  return models.abstract_model(name, num_classes=num_classes, dtype=dtype, **options)


def is_exported(path: str | Path) -> bool:
  """Whether `path` is a folder that `save` wrote."""
  path = Path(path)
  return (path / _WEIGHTS).is_file() and "format" in _json(path / _CONFIG)


def check_free(path: Path, *, overwrite: bool) -> None:
  """Raises UsageError if `save` may not write the folder `path`."""
  if not path.exists() or (path.is_dir() and not any(path.iterdir())):
    return
  if not is_exported(path):
    raise UsageError(f"{path} exists and is not an exported network; choose another folder")
  others = sorted({entry.name for entry in path.iterdir()} - {_WEIGHTS, _CONFIG})
  if others:
    raise UsageError(
      f"{path} holds more than an exported network ({', '.join(others[:8])}), which would be lost; "
      "choose another folder"
    )
  if not overwrite:
    raise UsageError(f"{path} exists; choose another folder, or say to overwrite it")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
  """A path beside `path` to write a file or folder to, which takes its place at the end.

  If the block fails, what it has written is removed, and `path` is as it was.

  Raises:
    UsageError: the place cannot be written.
  """
  if re.match(r"\w+:/", str(path)):
    raise UsageError(f"{path} is not a local path; write to a local one and copy it from there")
  path = path.resolve()
  mark = uuid.uuid4().hex[:8]
  temporary, old = path.with_name(f".{mark}.{path.name}"), path.with_name(f".{mark}.old")
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    yield temporary
    if path.is_dir():  # a folder cannot be renamed over one that is not empty
      path.rename(old)
    os.replace(temporary, path)
  except (OSError, safetensors.SafetensorError) as error:
    raise UsageError(
      f"cannot write {path} ({error}); choose another place, or make room there"
    ) from error
  finally:
    if old.exists() and not path.exists():
      old.rename(path)
    for leftover in (temporary, old):
      if leftover.is_dir():
        shutil.rmtree(leftover)
      elif leftover.exists():
        leftover.unlink()


def _read_config(path: Path) -> dict[str, Any]:
  """`config.json` of an exported folder, checked."""
  if not path.exists():
    raise UsageError(f"there is no folder {path}; give one that holds {_CONFIG} and {_WEIGHTS}")
  if not path.is_dir():
    raise UsageError(
      f"{path} is a file, not an exported folder; for a file of PyTorch weights, first run: "
      f"lip-jax convert {path} FOLDER --model NAME"
    )
  _refuse_training_run(path)
  if not (path / _CONFIG).is_file():
    raise UsageError(f"{path} is not an exported network: it has no {_CONFIG}; give another folder")
  config = _json(path / _CONFIG)
  found = config.get("format")
  if not isinstance(found, int):
    raise UsageError(f"{path / _CONFIG} is damaged; copy or export the folder again")
  if found != FORMAT:
    raise UsageError(
      f"{path} has format {found}, this version of lip_jax reads {FORMAT}; install the version "
      f"that wrote it ({config.get('lip_jax', 'unknown')}) or a later one"
    )
  model = config.get("model")
  if not isinstance(model, dict) or "name" not in model:
    raise UsageError(f"{path / _CONFIG} lacks the model's name; copy or export the folder again")
  if not isinstance(config.get("num_classes"), int):
    raise UsageError(f"{path / _CONFIG} lacks num_classes; copy or export the folder again")
  return config


def _refuse_training_run(path: Path) -> None:
  """Raises UsageError for a run's directory, its checkpoints, or one of them."""
  path = path.resolve()
  run, which = None, ""
  if path.name == "checkpoints":
    run = path.parent
  elif path.name.isdecimal() and path.parent.name == "checkpoints":
    run, which = path.parent.parent, f" --checkpoint={path.name}"
  else:
    config = _json(path / _CONFIG)
    if (path / "checkpoints").is_dir() or (config and "format" not in config):
      run = path
  if run is not None:
    raise UsageError(
      f"{path} belongs to a training run and is not an exported network; evaluate it with: "
      f"python train.py --mode=eval --workdir={run}{which}"
    )


def _json(path: Path) -> dict[str, Any]:
  """The object in a JSON file; empty if there is none."""
  try:
    values = json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError):
    return {}
  return values if isinstance(values, dict) else {}


def _variables(model: nnx.Module) -> dict[str, nnx.Variable]:
  """Parameters and batch statistics under their paths, dots between the parts."""
  state = nnx.state(model, (nnx.Param, nnx.BatchStat))
  return {".".join(map(str, path)): variable for path, variable in nnx.to_flat_state(state)}


def _faults(
  found: Mapping[str, tuple[int, ...]], expected: Mapping[str, nnx.Variable]
) -> list[str]:
  """What is missing, left over or of another shape."""
  faults = [f"missing {key}" for key in expected if key not in found]
  faults += [
    f"shape of {key} is {found[key]}, expected {variable.shape}"
    for key, variable in expected.items()
    if key in found and found[key] != variable.shape
  ]
  return faults + [f"unexpected {key}" for key in found if key not in expected]
