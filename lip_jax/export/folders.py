"""Exported networks: a folder with `model.safetensors` and `config.json`, for use without training.

`model.safetensors` holds the parameters and batch statistics under their paths in the network
(`layer2.0.conv1.kernel`), in our layouts and in the dtypes that they have. `config.json` says how
to build the network and how its images are to be prepared.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx
from flax.typing import Dtype

import lip_jax
from lip_jax.errors import UsageError
from lip_jax.export import networks, validation
from lip_jax.export.destination import replacing
from lip_jax.models.description import check_weights, flat_variables
from lip_jax.training.json_files import read_json

FORMAT = 1

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
# Of config.json, beside its format. What is only true of one machine is left out.
_ENTRIES = ("model", "num_classes", "preprocess", "class_names", "category_ids", "evaluation")


def save(
  path: str | Path, model: nnx.Module, config: Mapping[str, Any], *, overwrite: bool = False
) -> None:
  """Writes `model` to the folder `path`, which appears under its name only when it is complete.

  Args:
    path: a local folder that does not exist or is empty.
    model: what `create_model` builds of config["model"] and config["num_classes"]; or, with a
      config["task"] of "detection", `create_detector`.
    config: of the network, as from `lip_jax.load`; the rest of it may be missing.
    overwrite: replace a folder that holds an exported network and nothing else.

  Raises:
    UsageError: the folder is in the way, cannot be written, or the model is not what `config`
      describes. Nothing is written then.
  """
  path = Path(path)
  check_free(path, overwrite=overwrite)
  values = {key: config.get(key) for key in _ENTRIES} | {"source": public_source(config)}
  task = config.get("task", "classification")
  config = {
    "format": FORMAT,
    "lip_jax": lip_jax.__version__,
    **({} if task == "classification" else {"task": task}),
    **{key: value for key, value in values.items() if value is not None},
  }
  _check(config, CONFIG)
  text = json.dumps(config, indent=2) + "\n"
  variables = flat_variables(model)
  arrays = {key: np.asarray(variable.get_value(), order="C") for key, variable in variables.items()}
  check_weights(
    {key: (array.shape, array.dtype.name) for key, array in arrays.items()},
    flat_variables(_build(config, CONFIG, jnp.float32)),
    "the model is not what its name and options describe; was it built with other options?",
  )
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
  model = _build(config, str(path / CONFIG), dtype)
  variables = flat_variables(model)
  try:
    if not (path / WEIGHTS).is_file():
      raise FileNotFoundError("there is no such file")
    with safetensors.safe_open(path / WEIGHTS, framework="numpy") as tensors:
      slices = {key: tensors.get_slice(key) for key in tensors.keys()}  # noqa: SIM118
      check_weights(
        {key: (tuple(part.get_shape()), part.get_dtype()) for key, part in slices.items()},
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


def public_source(config: Mapping[str, Any]) -> Any:
  """config["source"], where a network is from, without the folders of this machine."""
  source: Any = config.get("source")
  path = source.get("path") if isinstance(source, Mapping) else None
  if not isinstance(path, str) or path.startswith("hf://"):
    return source
  return {**source, "path": Path(path).name}


def is_exported(path: str | Path) -> bool:
  """Whether `path` is a folder that `save` wrote."""
  path = Path(path)
  return (path / WEIGHTS).is_file() and "format" in _json(path / CONFIG)


def find_run(path: str | Path) -> tuple[Path, str | None] | None:
  """The directory of the training run that `path` is part of, and its step if it is a checkpoint.

  None for anything but RUN, RUN/checkpoints and RUN/checkpoints/STEP.
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
  config = read_json(path / CONFIG)
  version = config.get("format")
  if type(version) is not int:
    raise UsageError(f"{where} is damaged (it has no format); copy or export the folder again")
  if version != FORMAT:
    writer = config.get("lip_jax")
    raise UsageError(
      f"{path} has format {version}, this version of lip_jax reads {FORMAT}; install the version "
      f"that wrote it ({writer if isinstance(writer, str) else 'unknown'}) or a later one"
    )
  _check(config, where)
  return config


def _check(config: Mapping[str, Any], where: str) -> None:
  validation.check_config(config, where)
  networks.of(config, where).check(config, where)


def _build(config: Mapping[str, Any], where: str, dtype: Dtype) -> nnx.Module:
  return networks.of(config).build(config["model"], config["num_classes"], where, dtype)


def _json(path: Path) -> dict[str, Any]:
  """The object in a JSON file; empty if there is none."""
  try:
    return read_json(path)
  except UsageError:
    return {}
