"""A network from wherever it is kept to a form to share: folder, StableHLO or ONNX."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import lip_jax
from lip_jax.errors import UsageError
from lip_jax.export import destination, folders, inference, stablehlo_onnx, validation
from lip_jax.models.description import flat_variables
from lip_jax.training.json_files import read_json

FORMATS = ("folder", "stablehlo", "onnx")
DTYPES = ("float32", "bfloat16", "float16")

_SAVE = {"stablehlo": stablehlo_onnx.save_stablehlo, "onnx": stablehlo_onnx.save_onnx}
_OF_THE_EVALUATION = ("images_per_second", "model", "source")  # beside the network's results


def write(
  source: str | Path,
  out: str | Path,
  *,
  form: str | None = None,
  dtype: str = "float32",
  image_size: int | None = None,
  evaluation: str | Path | None = None,
  overwrite: bool = False,
) -> inference.ExportReport:
  """Writes what `lip_jax.load(source)` gives to `out`, which appears only when it agrees with that.

  Args:
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
    return _write_folder(out, model, config, jnp.dtype(dtype), image_size, results)
  if evaluation is not None:
    raise UsageError("an evaluation can be kept in a folder only; leave it out")
  destination.check_file(out, overwrite=overwrite)
  model, config = lip_jax.load(source, dtype=jnp.dtype(dtype))
  config = {**config, "source": folders.public_source(config)}
  return _SAVE[form](out, model, config, image_size=image_size, overwrite=overwrite)


def _form_of(out: Path) -> str:
  form = out.suffix.removeprefix(".")
  return form if form in _SAVE else "folder"


def _write_folder(
  out: Path,
  model: nnx.Module,
  config: Mapping[str, Any],
  dtype: Any,
  image_size: int | None,
  evaluation: Mapping[str, Any] | None,
) -> inference.ExportReport:
  if evaluation is not None and evaluation["model"] != config["model"]:
    raise UsageError(
      f"the evaluation is of {evaluation['model']}, the network is {config['model']}; evaluate "
      "this one"
    )
  for variable in flat_variables(model).values():
    if variable.ndim > 1:  # what is smaller takes no room, and is sensitive
      variable.set_value(jnp.asarray(variable.get_value(), dtype))
  preprocess = inference.resized(config.get("preprocess"), image_size)
  if preprocess is None and image_size is not None:
    raise UsageError("the network does not say how its images are prepared; leave out image_size")
  results: Any = evaluation
  if evaluation is None and image_size is None and dtype == jnp.float32:
    results = config.get("evaluation")  # what is known of the network, which is still the same
  config = {**config, "preprocess": preprocess, "evaluation": results and _results(results)}
  with destination.replacing(out) as temporary:
    folders.save(temporary, model, config)
    written, found = folders.load(temporary)
    # Any size shows whether the weights are the same, where none is known.
    size = image_size if found.get("preprocess") else 64
    ours, theirs = (inference.prepare(network, found, size) for network in (model, written))
    call = jax.jit(theirs.function)
    difference, tolerance = inference.check(
      lambda images: np.asarray(call(jnp.asarray(images))), ours
    )
    size = sum(file.stat().st_size for file in temporary.iterdir())
  return inference.ExportReport(
    out, size, difference, tolerance, f"jax {jax.__version__}", "what lip_jax.load takes"
  )


def _read_evaluation(path: Path) -> dict[str, Any]:
  advice = "write it with lip-jax evaluate PATH --json"
  try:
    values = read_json(path, advice)
  except UsageError as error:
    raise UsageError(f"cannot read the evaluation ({error})") from None
  missing = [key for key in ("data", "count", "model") if key not in values]
  if missing:
    raise UsageError(f"{path} lacks {', '.join(missing)}; {advice}")
  validation.check_evaluation(_results(values), str(path))
  return values


def _results(evaluation: Mapping[str, Any]) -> dict[str, Any]:
  return {key: value for key, value in evaluation.items() if key not in _OF_THE_EVALUATION}
