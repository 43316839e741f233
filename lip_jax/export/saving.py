"""A network from wherever it is kept to a form to share: folder, StableHLO or ONNX."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import lip_jax
from lip_jax.errors import UsageError
from lip_jax.export import folders, inference, onnx_model, stablehlo, validation
from lip_jax.export.loading import RESULTS

FORMATS = ("folder", "stablehlo", "onnx")
DTYPES = ("float32", "bfloat16", "float16")

_FILE_FORMATS = {"stablehlo": stablehlo, "onnx": onnx_model}


def write(
  source: str | Path,
  out: str | Path,
  *,
  form: str | None = None,
  dtype: str = "float32",
  image_size: int | None = None,
  evaluation: str | Path | None = None,
  overwrite: bool = False,
) -> inference.Report:
  """Writes the network of `source` to `out`, which appears only when it agrees with the network.

  Args:
    source: what `lip_jax.load` takes.
    out: file or folder.
    form: one of `FORMATS`; None: by the end of `out`'s name, else a folder.
    dtype: of the computation in a file; of the kernels in a folder, which are rounded to it.
    image_size: of the images that are taken, in pixels; None: the network's own.
    evaluation: for a folder, a file with what `lip-jax evaluate --json` printed; it becomes a part
      of `config.json`, and of the model card.
    overwrite: replace what is there, if it is of the same form.

  Raises:
    UsageError: the network cannot be loaded, or not be written so. Nothing is left of it then.
  """
  out = Path(out)
  form = form or _form_of(out)
  for name, value, valid in (("format", form, FORMATS), ("dtype", dtype, DTYPES)):
    if value not in valid:
      raise UsageError(f"unknown {name} {value!r}; choose one of {', '.join(valid)}")
  # What can be said before the network is loaded is said at once.
  if _form_of(out) not in (form, "folder"):
    raise UsageError(
      f"{out} looks like a file of {_form_of(out)}, but format {form} was given; take another name"
    )
  if form == "folder":
    folders.check_free(out, overwrite=overwrite)
    results = None if evaluation is None else _read_evaluation(Path(evaluation))
    model, config = lip_jax.load(source)
    return _write_folder(out, model, config, jnp.dtype(dtype), image_size, results, overwrite)
  if evaluation is not None:
    raise UsageError("an evaluation can be kept in a folder only; leave it out")
  inference.check_target(out, overwrite=overwrite)
  model, config = lip_jax.load(source, dtype=jnp.dtype(dtype))
  config = {**config, "source": _public(config.get("source"))}
  return _FILE_FORMATS[form].save(out, model, config, image_size=image_size, overwrite=overwrite)


def _form_of(out: Path) -> str:
  form = out.suffix.removeprefix(".")
  return form if form in _FILE_FORMATS else "folder"


def _write_folder(
  out: Path,
  model: nnx.Module,
  config: Mapping[str, Any],
  dtype: Any,
  image_size: int | None,
  evaluation: Mapping[str, Any] | None,
  overwrite: bool,
) -> inference.Report:
  if evaluation is not None and evaluation["model"] != config["model"]:
    raise UsageError(
      f"the evaluation is of {evaluation['model']}, the network is {config['model']}; evaluate "
      "this one"
    )
  for variable in jax.tree.leaves(
    nnx.state(model, nnx.Param), is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)
  ):
    if variable.ndim > 1:  # what is smaller takes no room, and is sensitive
      variable.set_value(jnp.asarray(variable.get_value(), dtype))
  preprocess = inference.resized(config.get("preprocess"), image_size)
  if preprocess is None and image_size is not None:
    raise UsageError("the network does not say how its images are prepared; leave out image_size")
  results: Any = evaluation
  if evaluation is None and image_size is None and dtype == jnp.float32:
    results = config.get("evaluation")  # what is known of the network, which is still the same
  extra = {
    "preprocess": preprocess,
    "class_names": config.get("class_names"),
    "source": _public(config.get("source")),
    "evaluation": results and {key: results[key] for key in RESULTS},
  }
  options = dict(config["model"])
  with folders.replacing(out) as temporary:
    folders.save(
      temporary,
      model,
      name=options.pop("name"),
      options=options,
      num_classes=config["num_classes"],
      extra={key: value for key, value in extra.items() if value is not None},
    )
    written, found = folders.load(temporary)
    difference, tolerance = _compare(model, written, found, image_size)
    size = sum(file.stat().st_size for file in temporary.iterdir())
  return inference.Report(
    out, size, difference, tolerance, f"jax {jax.__version__}", "what lip_jax.load takes"
  )


def _compare(
  model: nnx.Module, written: nnx.Module, config: Mapping[str, Any], image_size: int | None
) -> tuple[float, float]:
  # Any size shows whether the weights are the same, where none is known.
  size = image_size if config.get("preprocess") else 64
  ours, theirs = (inference.prepare(network, config, size) for network in (model, written))
  call = jax.jit(theirs.function)
  return inference.check(
    lambda images: np.asarray(call(jnp.asarray(images))),
    ours.function,
    theirs.config,
    theirs.image_size,
  )


def _public(source: Any) -> dict[str, Any] | None:
  """Where a network is from, without the folders of this machine."""
  if not isinstance(source, Mapping):
    return None
  path = str(source.get("path"))
  return {**source, "path": path if re.match(r"hf://", path) else Path(path).name}


def _read_evaluation(path: Path) -> dict[str, Any]:
  try:
    values = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(values, dict):
      raise ValueError(f"a {type(values).__name__}, expected an object")
  except (OSError, ValueError) as error:
    raise UsageError(
      f"cannot read the evaluation {path} ({error}); write it with lip-jax evaluate PATH --json"
    ) from error
  missing = [key for key in (*RESULTS, "model") if key not in values]
  if missing:
    raise UsageError(
      f"{path} lacks {', '.join(missing)}; write it with lip-jax evaluate PATH --json"
    )
  validation.check_evaluation(values, str(path))
  return values
