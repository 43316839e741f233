"""A network from wherever it is kept to a form to share: folder, StableHLO or ONNX."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from lip_jax.errors import UsageError
from lip_jax.export import (
  destination,
  folders,
  inference,
  loading,
  networks,
  stablehlo_onnx,
  validation,
)
from lip_jax.models.description import flat_variables
from lip_jax.training.json_files import read_json

FORMATS = ("folder", "stablehlo", "onnx")
DTYPES = ("float32", "bfloat16", "float16")

_FILES = {
  "stablehlo": (stablehlo_onnx.to_stablehlo, stablehlo_onnx.load_stablehlo),
  "onnx": (stablehlo_onnx.to_onnx, stablehlo_onnx.load_onnx),
}
_OF_THE_EVALUATION = ("images_per_second", "model", "source")  # beside the network's results


class ExportReport(NamedTuple):
  """What was written, and how it was checked."""

  path: Path  # of the file or folder
  size: int  # in bytes
  difference: float  # largest one to the model's results
  tolerance: float  # what it is allowed to be
  unit: str  # of both, in words
  runtime: str  # what ran it, for example "onnxruntime 1.32"
  takes: str  # what it wants, in words

  def __str__(self) -> str:
    return (
      f"{self.path}: {self.size / 1e6:.1f} MB, takes {self.takes}; read back and run by "
      f"{self.runtime}, its results differ from the model's by at most {self.difference:.1e} "
      f"{self.unit} ({self.tolerance:g} is allowed)"
    )


def write(
  source: str | Path,
  out: str | Path,
  *,
  form: str | None = None,
  dtype: str = "float32",
  image_size: int | None = None,
  evaluation: str | Path | None = None,
  overwrite: bool = False,
) -> ExportReport:
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
    model, config = loading.load(source)
    return _write_folder(out, model, config, jnp.dtype(dtype), image_size, results)
  if evaluation is not None:
    raise UsageError("an evaluation can be kept in a folder only; leave it out")
  destination.check_file(out, overwrite=overwrite)
  model, config = loading.load(source, dtype=jnp.dtype(dtype))
  config = {**config, "source": folders.public_source(config)}
  return _write_file(out, form, networks.of(config).prepare(model, config, image_size))


def _form_of(out: Path) -> str:
  form = out.suffix.removeprefix(".")
  return form if form in _FILES else "folder"


def _write_file(out: Path, form: str, network: inference.InferenceFunction) -> ExportReport:
  to_bytes, load = _FILES[form]
  try:
    with jax.default_device(inference.checking_device()):
      content, runtime = to_bytes(network)
  except UsageError:
    raise
  except (ValueError, TypeError) as error:
    reason = str(error).splitlines()[0]
    raise UsageError(
      f"the network cannot take images of {network.shape[0]} x {network.shape[1]} px: {reason}"
    ) from error
  with destination.replacing(out) as temporary:
    temporary.write_bytes(content)

    def written(function: inference.InferenceFunction) -> Any:
      if function is network:
        return load(temporary)[0]
      with jax.default_device(inference.checking_device()):
        inside = to_bytes(function)[0]
      beside = temporary.with_name(f"inside.{form}")
      beside.write_bytes(inside)
      return load(beside)[0]

    compared = inference.check(written, network)
  images = "normalized float32" if network.config["input"]["normalized"] else "uint8 RGB"
  takes = f"{images} images [N, {', '.join(map(str, network.shape))}]"
  takes += " and their sizes [N, 2]" if network.more else ""
  return ExportReport(out, len(content), *compared, runtime, takes)


def _write_folder(
  out: Path,
  model: nnx.Module,
  config: Mapping[str, Any],
  dtype: Any,
  image_size: int | None,
  evaluation: Mapping[str, Any] | None,
) -> ExportReport:
  if evaluation is not None and evaluation["model"] != config["model"]:
    raise UsageError(
      f"the evaluation is of {evaluation['model']}, the network is {config['model']}; evaluate "
      "this one"
    )
  for variable in flat_variables(model).values():
    if variable.ndim > 1:  # what is smaller takes no room, and is sensitive
      variable.set_value(jnp.asarray(variable.get_value(), dtype))
  kind = networks.of(config)
  if config["task"] != "classification" and image_size is not None:
    raise UsageError("the folder of a detector takes images of any size; leave out image_size")
  preprocess = inference.resized(config.get("preprocess"), image_size)
  if preprocess is None and image_size is not None:
    raise UsageError("the network does not say how its images are prepared; leave out image_size")
  if evaluation is None and image_size is None and dtype == jnp.float32:
    evaluation = config.get("evaluation")  # what is known of the network, which is still the same
  config = {**config, "preprocess": preprocess, "evaluation": evaluation and _results(evaluation)}
  with destination.replacing(out) as temporary:
    folders.save(temporary, model, config)
    written, found = folders.load(temporary)
    # Any size shows whether the weights are the same, where none is known.
    size = image_size if found.get("preprocess") else 64
    ours, theirs = (kind.prepare(network, found, size) for network in (model, written))
    compared = inference.check(
      lambda function: jax.jit((theirs if function is ours else theirs.inside).function), ours
    )
    size = sum(file.stat().st_size for file in temporary.iterdir())
  return ExportReport(out, size, *compared, f"jax {jax.__version__}", "what lip_jax.load takes")


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
  left_out = (*_OF_THE_EVALUATION, "AP_by_class", "ground_truth", "library", "step", "area_limits")
  return {key: value for key, value in evaluation.items() if key not in left_out}
