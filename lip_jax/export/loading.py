"""Networks from wherever they are kept, ready to evaluate: `lip_jax.load`."""

import functools
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype

from lip_jax.errors import UsageError
from lip_jax.export import folders, hub, validation
from lip_jax.models import description

_NETWORK = ("model", "num_classes", "preprocess", "class_names")  # of what `load` says

if TYPE_CHECKING:
  from lip_jax.training.checkpoint.checkpoints import Checkpoints


def load(
  path: str | Path, *, dtype: Dtype | None = jnp.float32, checkpoint: str | None = None
) -> tuple[nnx.Module, dict[str, Any]]:
  """A network in evaluation mode, on the default device, and what is known of it.

  Nothing in a folder is trusted: no code of it runs, and what it claims is checked before memory is
  taken.

  Args:
    path: a training run's directory (its best checkpoint, or the latest if none was evaluated), one
      of its checkpoints `RUN/checkpoints/STEP`, gs://BUCKET/RUN, an exported folder, or
      `hf://ORGANISATION/NAME` or `hf://ORGANISATION/NAME@REVISION` on the Hugging Face hub, which
      needs lip-jax[hub]. A training run needs lip-jax[train].
    dtype: of the computation; parameters and statistics become float32 (float64 for float64). None:
      what a training run computed in, and float32 for the others.
    checkpoint: of a training run: "best", "latest" or a step number.

  Returns:
    (model, config). Whatever the path, config has

    - "task": "classification", or "detection" for a detector;
    - "model": name and options of `create_model`, or of `create_detector`;
    - "num_classes": number of logits, or of a detector's classes;
    - "preprocess": how images are prepared: the shorter side is resized to "resize" pixels, the
      central "image_size" pixels are cut out, and "mean" and "std", three numbers for RGB in
      [0, 255], are subtracted and divided by; None where it is not known. For a detector: as large
      as it can be with a shorter side up to "short_side" and a longer one up to "long_side";
    - "class_names": in the order of the logits; None where they are not known;
    - "category_ids": for a detector alone: the classes' ids in annotation files, or None;
    - "evaluation": "data" (its name), "count" of images and the task's metrics, such as "top1",
      "top5" and "loss", if it was evaluated; or None;
    - "data": "dataset", "data_dir" and "validation_split" of a training run; else None;
    - "source": "kind" ("training run", "exported folder" or "hub"), "path", "step" of the training
      and "revision" on the hub, each None where there is none.

  Raises:
    UsageError: there is no such thing, or it is damaged or refused.
  """
  text = str(path)
  run = None if "://" in text else folders.find_run(path)
  if checkpoint is not None and (run[1] is not None if run else not text.startswith("gs://")):
    what = "a checkpoint already" if run else "no training run"
    raise UsageError(f"{path} is {what}: it has no checkpoint {checkpoint!r}; leave that out")
  if text.startswith(hub.PREFIX):
    folder, name, revision = hub.download(text)
    model, values = folders.load(folder, dtype=_or_float32(dtype), links=True)
    return model, _config(values, "hub", name, revision=revision)
  if text.startswith("gs://"):
    return _load_run(text, checkpoint, dtype)
  if re.match(r"\w+://", text):
    raise UsageError(
      f"{text} is neither a local path nor hf://ORGANISATION/NAME; copy it to a disk"
    )
  if run is not None:
    return _load_run(run[0], checkpoint or run[1], dtype)
  model, values = folders.load(path, dtype=_or_float32(dtype))
  return model, _config(values, "exported folder", str(Path(path).resolve()))


def load_classifier(
  path: str | Path, *, dtype: Dtype | None = jnp.float32
) -> tuple[nnx.Module, dict[str, Any]]:
  """As `load`, for what is done with classifiers only.

  Raises:
    UsageError: also for a detector.
  """
  model, config = load(path, dtype=dtype)
  if config["task"] != "classification":
    raise UsageError(
      f"{path} is a run of {config['task']}, and this takes classifiers only; detectors can be "
      "loaded, evaluated and used to predict"
    )
  return model, config


def load_file(
  path: str | Path,
  name: str,
  options: Mapping[str, Any] | None = None,
  *,
  num_classes: int | None = None,
  dtype: Dtype | None = jnp.float32,
) -> tuple[nnx.Module, dict[str, Any]]:
  """As `load`, of a file of PyTorch weights.

  Args:
    path: .pth, .pt, .safetensors or .npz, as for `export.torch_convert.convert_weights`.
    num_classes: number of logits; None: what the classifier in the file has.

  Raises:
    UsageError: the file cannot be read, is refused, or does not fit the network.
  """
  from lip_jax.export import torch_convert

  model, _, config = torch_convert.read(path, name, options or {}, num_classes, _or_float32(dtype))
  model.eval()
  return model, _config(config, "weights file", str(Path(path).resolve()))


def _load_run(
  run: Path | str, step: str | None, dtype: Dtype | None
) -> tuple[nnx.Module, dict[str, Any]]:
  try:
    from lip_jax.training import config as config_lib
    from lip_jax.training.checkpoint.checkpoints import Checkpoints
    from lip_jax.training.workdir import absolute
  except ImportError as error:
    raise UsageError(
      f"{run} is a training run, which needs what training does ({error}); install "
      "lip-jax[train], or export the run where it was trained and load that folder"
    ) from error
  config, workdir = config_lib.load(run), absolute(run)
  if isinstance(run, Path):
    validation.check_links(run / "checkpoints")
  with Checkpoints(run, read_only=True) as checkpoints:
    best = "latest" if checkpoints.best_step is None else "best"
    number = checkpoints.resolve(step or best)
    metrics = checkpoints.metrics(number)
    network = functools.partial(
      config.network, dtype=jnp.dtype(config.dtype if dtype is None else dtype), workdir=workdir
    )
    model, classes = _read_checkpoint(checkpoints, number, config.model["name"], network)
  data = config.data
  values: dict[str, Any] = {
    "model": dict(config.model),
    "num_classes": classes,
    "preprocess": config.preprocess(),
    **config.known(workdir, classes),
  }
  if metrics:
    values["evaluation"] = {**metrics, "data": f"{data.dataset} {data.validation_split}"}
  images = {key: getattr(data, key) for key in ("dataset", "data_dir", "validation_split")}
  values["task"] = config.task
  return model, _config(values, "training run", str(run), data=images, step=number)


def _read_checkpoint(
  checkpoints: "Checkpoints",
  step: int,
  name: str,
  network: Callable[..., tuple[nnx.Module, int]],
) -> tuple[nnx.Module, int]:
  """The network of a checkpoint in evaluation mode, and its number of classes.

  Args:
    name: of the network.
    network: makes it of shapes and of where they are kept, as `Config.network`.
  """
  from lip_jax.training import train_state

  where = checkpoints.path(step)
  params, batch_stats = checkpoints.weight_shapes(step)
  if "://" not in str(where):
    arrays = [*params.values(), *batch_stats.values()]
    validation.check_announced_size(
      sum(math.prod(array.shape) * array.dtype.itemsize for array in arrays), Path(where)
    )
  found = {name: (array.shape, array.dtype.name) for name, array in params.items()}
  # Statistics have an axis of batch-norm groups in front.
  found |= {name: (array.shape[1:], array.dtype.name) for name, array in batch_stats.items()}
  shapes = {name: shape for name, (shape, _) in found.items()}
  model, classes = network(shapes, str(where))
  variables = description.flat_variables(model)
  description.check_weights(
    found,
    variables,
    f"{where} does not fit {name} as the run's config.json describes it",
  )
  params, batch_stats = checkpoints.restore_weights(step)
  for tree in (params, train_state.averaged(batch_stats)):
    for path, value in jax.tree_util.tree_leaves_with_path(tree):
      variable = variables[jax.tree_util.keystr(path, simple=True, separator=".")]
      variable.set_value(jnp.asarray(value, variable.dtype))
  model.eval()
  return model, classes


def _config(values: Mapping[str, Any], kind: str, path: str, **known: Any) -> dict[str, Any]:
  """What `load` says, of what is known of a network and where it is from."""
  results = values.get("evaluation")
  complete = isinstance(results, Mapping) and {"data", "count"} <= set(results)
  step = (values.get("source") or {}).get("step", known.get("step"))
  task = values.get("task", "classification")
  return {
    "task": task,
    **{key: values.get(key) for key in _NETWORK},
    **({"category_ids": values.get("category_ids")} if task == "detection" else {}),
    "data": known.get("data"),
    "evaluation": results if complete else None,
    "source": {"kind": kind, "path": path, "step": step, "revision": known.get("revision")},
  }


def _or_float32(dtype: Dtype | None) -> Dtype:
  return jnp.dtype(jnp.float32 if dtype is None else dtype)
