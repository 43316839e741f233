"""Model cards: what the Hugging Face hub shows of a network."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from flax import nnx

from lip_jax.models.cost import count_parameters, multiply_adds

_CLASSES_SHOWN = 10
_CITATION = """\
@inproceedings{gao2019lip,
  title = {{LIP}: Local Importance-Based Pooling},
  author = {Gao, Ziteng and Wang, Limin and Wu, Gangshan},
  booktitle = {Proceedings of the IEEE/CVF International Conference on Computer Vision (ICCV)},
  year = {2019},
}"""


class _Task(NamedTuple):
  """What cards of a task's networks say."""

  tag: str  # the hub's
  what: str
  metrics: tuple[tuple[str, str], ...]  # (as in "evaluation", in words)
  metric: str  # the hub's type of these
  name: str  # and its names
  unit: str
  use: str  # Python, after loading


_TASKS = {
  "classification": _Task(
    "image-classification",
    "an image classifier",
    (("top1", "top-1"), ("top5", "top-5")),
    "accuracy",
    "{} accuracy",
    "{:.2f} %",
    "",
  ),
  "detection": _Task(
    "object-detection",
    "an object detector",
    tuple(
      (name, name.replace("_", ", ") + (" objects" if "_" in name else ""))
      for name in ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")
    ),
    "mAP",
    "{}",
    "{:.1f}",
    "\nfound = model.detect(images, sizes)  # boxes, scores, labels, valid",
  ),
}


def write(model: nnx.Module, config: Mapping[str, Any], name: str, licence: str) -> str:
  """The model card: Markdown, with the metadata that the hub reads in front."""
  task = _TASKS[config.get("task", "classification")]
  sections = [
    _metadata(task, config, name, licence),
    f"# {_plain(name.partition('/')[2])}",
    f"{_plain(config['model']['name'])}, {task.what} for {config['num_classes']:,} "
    "classes, in the format of lip_jax: LIP, local importance-based pooling, for JAX.",
    f'```python\nimport lip_jax\nmodel, config = lip_jax.load("hf://{name}"){task.use}\n```\n\n'
    "It needs `pip install lip-jax[hub]`. Beside it: `lip-jax predict hf://" + name + " IMAGE...`.",
    f"## Network\n\n{_table(_facts(model, config))}",
    f"## Images\n\n{_preprocessing(config)}",
    f"## Classes\n\n{_classes(config)}",
    f"## Evaluation\n\n{_evaluation(task, config.get('evaluation'))}",
    f"## Licence\n\n{_plain(licence)}",
    f"## Citation\n\n```bibtex\n{_CITATION}\n```",
  ]
  return "\n\n".join(sections) + "\n"


def _metadata(task: _Task, config: Mapping[str, Any], repository: str, licence: str) -> str:
  # JSON is YAML, so nothing in a name can break out of its place.
  values: dict[str, Any] = {
    "license": licence,
    "library_name": "lip_jax",
    "pipeline_tag": task.tag,
    "tags": ["jax", "flax", "lip", task.tag],
  }
  if evaluation := config.get("evaluation"):
    metrics = [
      {"type": task.metric, "name": task.name.format(name), "value": evaluation[key]}
      for key, name in task.metrics
      if evaluation.get(key, -1) >= 0  # -1: there was no such object
    ]
    result = {
      "task": {"type": task.tag},
      "dataset": dict.fromkeys(("name", "type"), str(evaluation["data"])),
      "metrics": metrics,
    }
    values["model-index"] = [{"name": repository.partition("/")[2], "results": [result]}]
  lines = (f"{key}: {json.dumps(value)}" for key, value in values.items())
  return "\n".join(["---", *lines, "---"])


def _facts(model: nnx.Module, config: Mapping[str, Any]) -> list[tuple[str, str]]:
  options = {key: value for key, value in config["model"].items() if key != "name"}
  facts = [
    ("architecture", config["model"]["name"]),
    ("options", ", ".join(f"{key}={value!r}" for key, value in options.items()) or "none"),
    ("parameters", f"{count_parameters(model):,}"),
  ]
  if "task" not in config:
    size = (config.get("preprocess") or {}).get("image_size", 224)
    products = f"{multiply_adds(model, size):,}"
    facts.append((f"multiply-adds, one image of {size} px", products))
  step = (config.get("source") or {}).get("step")
  return facts if step is None else [*facts, ("training step", f"{step:,}")]


def _preprocessing(config: Mapping[str, Any]) -> str:
  preprocess = config.get("preprocess")
  if preprocess is None:
    return "How images are to be prepared is not recorded."
  mean, std = (", ".join(f"{v:g}" for v in preprocess[key]) for key in ("mean", "std"))
  normalized = f"the mean ({mean}) is subtracted, and the result divided by ({std})"
  colours = f"{'RGB' if len(preprocess['mean']) == 3 else 'Grey'}, 0 to 255."
  done = "`lip-jax predict` and `lip-jax evaluate` do so."
  if "task" in config:
    return (
      f"{colours} An image is made as large as it can be with a shorter side of at most "
      f"{preprocess['short_side']} and a longer one of at most {preprocess['long_side']} pixels; "
      f"{normalized}; then zeros are added at the bottom and on the right. `sizes` are the heights "
      f"and widths without them. {done}"
    )
  size = preprocess["image_size"]
  height, width = (size, size) if isinstance(size, int) else size
  return (
    f"{colours} The shorter side is resized to {preprocess['resize']} pixels, the central {height} "
    f"x {width} are cut out, {normalized}. {done}"
  )


def _classes(config: Mapping[str, Any]) -> str:
  count, names = config["num_classes"], config.get("class_names")
  if names is None:
    return f"{count:,}; their names are not recorded."
  shown = ", ".join(map(_plain, names[:_CLASSES_SHOWN]))
  order = "the logits"
  if "task" in config:
    by_id = count == 80 and config["model"].get("preset") == "torchvision"
    order = "`category_ids`, which the labels are" if by_id else "the labels"
  rest = f" and {count - _CLASSES_SHOWN:,} more" if count > _CLASSES_SHOWN else ""
  return f"{count:,}: {shown}{rest}. `config.json` has all, in the order of {order}."


def _evaluation(task: _Task, evaluation: Mapping[str, Any] | None) -> str:
  if evaluation is None:
    return "Not recorded."
  rows = [("data", str(evaluation["data"])), ("images", f"{evaluation['count']:,}")]
  for key, name in task.metrics:
    if key in evaluation:
      there = evaluation[key] >= 0
      rows.append((name, task.unit.format(100 * evaluation[key]) if there else "no such object"))
  return _table(rows)


def _table(rows: Sequence[tuple[str, str]]) -> str:
  lines = ["| | |", "| --- | --- |"]
  return "\n".join(lines + [f"| {_plain(key)} | {_plain(value)} |" for key, value in rows])


def _plain(text: str) -> str:
  """One line without markup."""
  return re.sub(r"([\\`*\[\]<>|])", r"\\\1", " ".join(text.split()))
