"""Networks from wherever they are kept, ready to evaluate: `lip_jax.load`."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype

from lip_jax.errors import UsageError
from lip_jax.export import folders, validation

_HUB = "hf://"
_HUB_ID = re.compile(r"hf://([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")
# Of an evaluation, kept with a network.
RESULTS = ("data", "top1", "top5", "loss", "count")

_CLASSIFIERS = ("fc.bias", "classifier.bias")


def load(
  path: str | Path, *, dtype: Dtype | None = jnp.float32
) -> tuple[nnx.Module, dict[str, Any]]:
  """A network in evaluation mode, on the default device, and what is known of it.

  Nothing in a folder is trusted: no code of it runs, and what it claims is checked before memory is
  taken.

  Args:
    path: a training run's directory (its best checkpoint, or the latest if none was evaluated), one
      of its checkpoints `RUN/checkpoints/STEP`, an exported folder, or `hf://ORGANISATION/NAME` or
      `hf://ORGANISATION/NAME@REVISION` on the Hugging Face hub, which needs lip-jax[hub]. A
      training run needs lip-jax[train].
    dtype: of the computation; parameters and statistics become float32 (float64 for float64). None:
      what a training run computed in, and float32 for the others.

  Returns:
    (model, config). Whatever the path, config has

    - "model": name and options of `create_model`;
    - "num_classes": number of logits;
    - "preprocess": how images are prepared: the shorter side is resized to "resize" pixels, the
      central "image_size" pixels are cut out, and "mean" and "std", three numbers for RGB in
      [0, 255], are subtracted and divided by; None where it is not known;
    - "class_names": in the order of the logits; None where they are not known;
    - "evaluation": "data" (its name), "top1", "top5", "loss" and "count", if it was evaluated; or
      None;
    - "data": "dataset", "data_dir" and "validation_split" of a training run; else None;
    - "source": "kind" ("training run", "exported folder" or "hub"), "path", "step" of the training
      and "revision" on the hub, each None where there is none.

  Raises:
    UsageError: there is no such thing, or it is damaged or refused.
  """
  text = str(path)
  if text.startswith(_HUB):
    return _load_hub(text, dtype)
  if re.match(r"\w+://", text):
    raise UsageError(
      f"{text} is neither a local path nor hf://ORGANISATION/NAME; copy it to a disk"
    )
  run = folders.find_run(path)
  if run is not None:
    return _load_run(*run, dtype)
  model, values = folders.load(path, dtype=_or_float32(dtype))
  return model, _config_of_export(values, "exported folder", str(Path(path).resolve()))


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
    path: what `lip_jax.export.torch_convert.convert` takes: .pth, .pt, .safetensors or .npz.
    name: of the network.
    options: of the network.
    num_classes: number of logits; None: what the classifier in the file has.
    dtype: as for `load`.

  Raises:
    UsageError: the file cannot be read, is refused, or does not fit the network.
  """
  from lip_jax.export import torch_convert

  model, _, extra = torch_convert.read(path, name, options or {}, num_classes, _or_float32(dtype))
  model.eval()
  config = {"model": {"name": name, **(options or {})}, **extra}
  return model, _config(config, _source("weights file", str(Path(path).resolve())))


def _load_hub(text: str, dtype: Dtype | None) -> tuple[nnx.Module, dict[str, Any]]:
  match = _HUB_ID.fullmatch(text)
  if match is None:
    raise UsageError(f"{text!r} is not of the form hf://ORGANISATION/NAME or ...@REVISION")
  try:
    import huggingface_hub
  except ImportError:
    raise UsageError(
      f"{text} needs the package huggingface_hub; install lip-jax[hub], or download the folder "
      "and give its path"
    ) from None
  name, revision = match.groups()
  try:
    # Only these two: whatever else lies there is neither fetched nor read.
    folder = huggingface_hub.snapshot_download(
      name, revision=revision, allow_patterns=[folders.CONFIG, folders.WEIGHTS]
    )
  except Exception as error:  # the hub's, the network's, and those of the cache's files
    reason = " ".join(str(error).split())[:300]
    raise UsageError(
      f"cannot get {text} from the hub ({type(error).__name__}: {reason}); check its name, the "
      "revision, the network, and for private ones `hf auth login`"
    ) from error
  model, values = folders.load(folder, dtype=_or_float32(dtype), links=True)
  # The cache's folder is called after the commit, which "main" alone would not pin.
  return model, _config_of_export(values, "hub", f"{_HUB}{name}", revision=Path(folder).name)


def _load_run(
  run: Path, step: str | None, dtype: Dtype | None
) -> tuple[nnx.Module, dict[str, Any]]:
  try:
    from lip_jax.training import config as config_lib
    from lip_jax.training.checkpoint.checkpoints import Checkpoints
  except ImportError as error:
    raise UsageError(
      f"{run} is a training run, which needs what training does ({error}); install "
      "lip-jax[train], or export the run where it was trained and load that folder"
    ) from error
  config = config_lib.load(run)
  validation.check_links(run / "checkpoints")
  with Checkpoints(run, read_only=True) as checkpoints:
    best = "latest" if checkpoints.best_step is None else "best"
    number = checkpoints.resolve(step or best)
    metrics = checkpoints.metrics(number)
    checkpoint = checkpoints.path(number)
  model, classes = load_checkpoint(
    checkpoint, config.model, jnp.dtype(config.dtype if dtype is None else dtype)
  )
  return model, config_of_run(run, config, classes, number, metrics)


def load_checkpoint(
  checkpoint: Path, options: Mapping[str, Any], dtype: Dtype
) -> tuple[nnx.Module, int]:
  """The network of a checkpoint in evaluation mode, and its number of classes.

  Args:
    checkpoint: directory `RUN/checkpoints/STEP`.
    options: "name" and options of the network, from the run's configuration.
    dtype: of the computation.

  Raises:
    UsageError: the checkpoint is damaged, or of another network.
  """
  from lip_jax.training import train_state
  from lip_jax.training.checkpoint.checkpoints import Checkpoints

  step = int(checkpoint.name)
  with Checkpoints(checkpoint.parent.parent, read_only=True) as checkpoints:
    params, batch_stats = checkpoints.weight_shapes(step)
  if "://" not in str(checkpoint):
    arrays = [*params.values(), *batch_stats.values()]
    validation.check_announced_size(
      sum(math.prod(array.shape) * array.dtype.itemsize for array in arrays), Path(checkpoint)
    )
  # Statistics have an axis of batch-norm groups in front.
  weights = params | {
    name: jax.ShapeDtypeStruct(array.shape[1:], array.dtype) for name, array in batch_stats.items()
  }
  classifier = next((weights[name] for name in _CLASSIFIERS if name in weights), None)
  classes = validation.check_num_classes(
    classifier.shape[-1] if classifier is not None and classifier.shape else None, str(checkpoint)
  )
  model = validation.build(options, classes, dtype, str(checkpoint))
  variables = folders.flat_variables(model)
  folders.check_weights(
    {name: array.shape for name, array in weights.items()},
    {name: array.dtype.name for name, array in weights.items()},
    variables,
    f"{checkpoint} does not fit {options['name']} as the run's config.json describes it",
  )
  with Checkpoints(checkpoint.parent.parent, read_only=True) as checkpoints:
    params, batch_stats = checkpoints.restore_weights(step)
  _fill(variables, params)
  _fill(variables, train_state.averaged(batch_stats))
  model.eval()
  return model, classes


def config_of_run(
  run: Path, config: Any, num_classes: int, step: int, metrics: Mapping[str, Any] | None
) -> dict[str, Any]:
  """What `load` says of a training run.

  Args:
    run: its directory.
    config: its `lip_jax.training.config.Config`.
    num_classes: of its network.
    step: of the checkpoint.
    metrics: validation results saved with it, if it was evaluated.
  """
  from lip_jax.export import class_names

  data = config.data
  values = {
    "model": dict(config.model),
    "num_classes": num_classes,
    "preprocess": {
      "image_size": data.image_size,
      "resize": data.eval_resize or data.image_size,
      "mean": list(data.mean),
      "std": list(data.std),
    },
    "class_names": class_names.of_run(run, config, num_classes),
    "data": {key: getattr(data, key) for key in ("dataset", "data_dir", "validation_split")},
    "evaluation": metrics and dict(metrics, data=f"{data.dataset} {data.validation_split}"),
  }
  return _config(values, _source("training run", str(run), step=step))


def _fill(variables: Mapping[str, nnx.Variable], tree: Mapping[Any, Any], prefix: str = "") -> None:
  """Puts the arrays of a nested mapping into the variables of the same path."""
  for key, value in tree.items():
    if isinstance(value, Mapping):
      _fill(variables, value, f"{prefix}{key}.")
    else:
      variable = variables[f"{prefix}{key}"]
      variable.set_value(jnp.asarray(value, variable.dtype))


def _config_of_export(
  values: Mapping[str, Any], kind: str, path: str, revision: str | None = None
) -> dict[str, Any]:
  step = (values.get("source") or {}).get("step")
  return _config({**values, "data": None}, _source(kind, path, step=step, revision=revision))


def _config(values: Mapping[str, Any], source: dict[str, Any]) -> dict[str, Any]:
  keys = ("model", "num_classes", "preprocess", "class_names", "data", "evaluation")
  results = values.get("evaluation")
  if not isinstance(results, Mapping) or not set(RESULTS) <= set(results):
    values = {**values, "evaluation": None}
  return {**{key: values.get(key) for key in keys}, "source": source}


def _source(
  kind: str, path: str, *, step: int | None = None, revision: str | None = None
) -> dict[str, Any]:
  return {"kind": kind, "path": path, "step": step, "revision": revision}


def _or_float32(dtype: Dtype | None) -> Dtype:
  return jnp.dtype(jnp.float32 if dtype is None else dtype)
