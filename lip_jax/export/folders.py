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
from lip_jax.export import validation

FORMAT = 1

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
# Parameters and statistics are in one of these, as safetensors and NumPy call them.
_FLOATS = ("f16", "bf16", "f32", "f64", "float16", "bfloat16", "float32", "float64")
_MAX_FAULTS = 20  # named in an error


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
      and "std", three numbers for RGB in [0, 255], are subtracted and divided by. "class_names"
      has a name for each class, in the order of the logits; "source" says where it is from, and
      "evaluation" what it is worth, as in what `lip_jax.load` gives.
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
  validation.check_preprocess(config.get("preprocess"), "extra")
  validation.check_class_names(config.get("class_names"), num_classes, "extra")
  validation.check_evaluation(config.get("evaluation"), "extra")
  validation.check_source(config.get("source"), "extra")
  text = json.dumps(config, indent=2) + "\n"
  variables = flat_variables(model)
  faults = _faults(
    {key: variable.shape for key, variable in variables.items()},
    flat_variables(abstract_model(name, options, num_classes=num_classes)),
  )
  if faults:
    raise UsageError(
      f"the model is not what its name and options describe ({len(faults)} faults; was it built "
      f"with other options?): {'; '.join(faults)}"
    )
  arrays = {key: np.asarray(variable.get_value(), order="C") for key, variable in variables.items()}
  with replacing(path) as folder:
    folder.mkdir()
    # Not save_file, which lets nobody else read the file.
    (folder / WEIGHTS).write_bytes(safetensors.numpy.save(arrays))
    (folder / CONFIG).write_text(text, encoding="utf-8")


def load(
  path: str | Path, *, dtype: Dtype = jnp.float32, links: bool = False
) -> tuple[nnx.Module, dict[str, Any]]:
  """The network of an exported folder in evaluation mode, and what its `config.json` holds.

  Args:
    path: a folder that `save` wrote, or anybody: nothing in it is trusted.
    dtype: of the computation; parameters and statistics become float32 (float64 for float64).
    links: whether its files may be links to files elsewhere, as in the cache of a hub.

  Raises:
    UsageError: there is no such folder, or it holds something else; weights that are missing, left
      over or of another shape, all of them in one message.
  """
  path = Path(path)
  config = _read_config(path, links)
  model = validation.build(config["model"], config["num_classes"], dtype, str(path / CONFIG))
  variables = flat_variables(model)
  try:
    if not (path / WEIGHTS).is_file():
      raise FileNotFoundError("there is no such file")
    with safetensors.safe_open(path / WEIGHTS, framework="numpy") as tensors:
      slices = {key: tensors.get_slice(key) for key in tensors.keys()}  # noqa: SIM118
      check_weights(
        {key: tuple(part.get_shape()) for key, part in slices.items()},
        {key: part.get_dtype() for key, part in slices.items()},
        variables,
        f"{path / WEIGHTS} does not fit {config['model']['name']} as {CONFIG} describes it",
      )
      for key, variable in variables.items():
        variable.set_value(jnp.asarray(tensors.get_tensor(key), variable.dtype))
  except (OSError, safetensors.SafetensorError) as error:
    raise UsageError(
      f"cannot read {path / WEIGHTS}: it is missing or damaged ({error}); copy or export it again"
    ) from error
  model.eval()
  return model, config


def check_weights(
  shapes: Mapping[str, tuple[int, ...]],
  dtypes: Mapping[str, str],
  variables: Mapping[str, Any],
  what: str,
) -> None:
  """Compares what a file announces with what a network has, before any of it is read.

  Args:
    shapes: of the file's arrays, by name.
    dtypes: of the same, in safetensors' letters or NumPy's names.
    variables: of the network, from `flat_variables`, or anything else with a shape.
    what: the beginning of the error.

  Raises:
    UsageError: arrays are missing, left over, of another shape or no floating-point numbers.
  """
  faults = _faults(shapes, variables)
  faults += [
    f"{key} is of {dtype}, expected floating point"
    for key, dtype in dtypes.items()
    if dtype.lower() not in _FLOATS
  ]
  if faults:
    named = "; ".join(faults[:_MAX_FAULTS])
    more = f"; and {len(faults) - _MAX_FAULTS} more" if len(faults) > _MAX_FAULTS else ""
    raise UsageError(f"{what} ({len(faults)} faults): {named}{more}")


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


def flat_variables(model: nnx.Module) -> dict[str, nnx.Variable]:
  """Parameters and batch statistics under their paths, dots between the parts."""
  state = nnx.state(model, (nnx.Param, nnx.BatchStat))
  return {".".join(map(str, path)): variable for path, variable in nnx.to_flat_state(state)}


def is_exported(path: str | Path) -> bool:
  """Whether `path` is a folder that `save` wrote."""
  path = Path(path)
  return (path / WEIGHTS).is_file() and "format" in _json(path / CONFIG)


def find_run(path: str | Path) -> tuple[Path, str | None] | None:
  """The directory of the training run that `path` is part of, and its step if it is a checkpoint.

  Args:
    path: RUN, RUN/checkpoints, RUN/checkpoints/STEP, or anything else.

  Returns:
    None for anything else.
  """
  path = Path(path).resolve()
  if path.name == "checkpoints":
    return path.parent, None
  if path.name.isdecimal() and path.parent.name == "checkpoints":
    return path.parent.parent, path.name
  config = _json(path / CONFIG)
  if (path / "checkpoints").is_dir() or (config and "format" not in config):
    return path, None
  return None


def check_free(path: Path, *, overwrite: bool) -> None:
  """Raises UsageError if `save` may not write the folder `path`."""
  if not path.exists() or (path.is_dir() and not any(path.iterdir())):
    return
  if not is_exported(path):
    raise UsageError(f"{path} exists and is not an exported network; choose another folder")
  others = sorted({entry.name for entry in path.iterdir()} - {WEIGHTS, CONFIG})
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


def _read_config(path: Path, links: bool) -> dict[str, Any]:
  """`config.json` of an exported folder, checked."""
  if not path.exists():
    raise UsageError(f"there is no folder {path}; give one that holds {CONFIG} and {WEIGHTS}")
  if not path.is_dir():
    raise UsageError(
      f"{path} is a file, not an exported folder; for a file of PyTorch weights, first run: "
      f"lip-jax convert {path} FOLDER --model NAME"
    )
  if find_run(path) is not None:
    raise UsageError(
      f"{path} belongs to a training run and is not an exported network; first run: "
      f"lip-jax export {path} FOLDER"
    )
  where = str(path / CONFIG)
  if not links:
    validation.check_links(path)
  if not (path / CONFIG).is_file():
    raise UsageError(f"{path} is not an exported network: it has no {CONFIG}; give another folder")
  config = validation.read_json(path / CONFIG)
  version = config.get("format")
  if type(version) is not int:
    raise UsageError(f"{where} is damaged (it has no format); copy or export the folder again")
  if version != FORMAT:
    writer = config.get("lip_jax")
    raise UsageError(
      f"{path} has format {version}, this version of lip_jax reads {FORMAT}; install the version "
      f"that wrote it ({writer if isinstance(writer, str) else 'unknown'}) or a later one"
    )
  validation.check_model(config.get("model"), where)
  classes = validation.check_num_classes(config.get("num_classes"), where)
  validation.check_preprocess(config.get("preprocess"), where)
  validation.check_class_names(config.get("class_names"), classes, where)
  validation.check_evaluation(config.get("evaluation"), where)
  validation.check_source(config.get("source"), where)
  return config


def _json(path: Path) -> dict[str, Any]:
  """The object in a JSON file; empty if there is none."""
  try:
    return validation.read_json(path)
  except UsageError:
    return {}


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
