"""The model card of an exported folder: what the Hugging Face hub shows as its README.md."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from flax import nnx

from lip_jax.models.cost import count_parameters, multiply_adds

_CLASSES_SHOWN = 10
_DEFAULT_SIZE = 224

_CITATION = """\
@inproceedings{gao2019lip,
  title = {{LIP}: Local Importance-Based Pooling},
  author = {Gao, Ziteng and Wang, Limin and Wu, Gangshan},
  booktitle = {Proceedings of the IEEE/CVF International Conference on Computer Vision (ICCV)},
  year = {2019},
}"""


def render(model: nnx.Module, config: Mapping[str, Any], name: str, licence: str) -> str:
  """The card as Markdown, with the metadata that the hub reads in front.

  Args:
    model: the network, for its parameters and multiply-adds.
    config: of the folder, as from `lip_jax.export.folders.load`; "evaluation", if there, has
      "data", "top1", "top5" and "count".
    name: of the repository, ORGANISATION/NAME.
    licence: of the weights, an identifier of the hub such as "apache-2.0".
  """
  network = config["model"]
  sections = [
    _metadata(config, name, licence),
    f"# {_plain(name.partition('/')[2])}",
    f"{_plain(network['name'])}, an image classifier for {config['num_classes']:,} classes, in the "
    "format of lip_jax: LIP, local importance-based pooling, for JAX.",
    f'```python\nimport lip_jax\nmodel, config = lip_jax.load("hf://{name}")\n```\n\n'
    "It needs `pip install lip-jax[hub]`. Beside it: `lip-jax predict hf://" + name + " IMAGE...`.",
    "## Network\n\n" + _table(_facts(model, config)),
    "## Images\n\n" + _preprocessing(config.get("preprocess")),
    "## Classes\n\n" + _classes(config["num_classes"], config.get("class_names")),
    "## Evaluation\n\n" + _evaluation(config.get("evaluation")),
    f"## Licence\n\n{_plain(licence)}",
    f"## Citation\n\n```bibtex\n{_CITATION}\n```",
  ]
  return "\n\n".join(sections) + "\n"


def _metadata(config: Mapping[str, Any], name: str, licence: str) -> str:
  # JSON is YAML, so nothing in a name can break out of its place.
  values: dict[str, Any] = {
    "license": licence,
    "library_name": "lip_jax",
    "pipeline_tag": "image-classification",
    "tags": ["jax", "flax", "lip", "image-classification"],
  }
  evaluation = config.get("evaluation")
  if evaluation:
    metrics = [
      {"type": "accuracy", "name": f"top-{k} accuracy", "value": evaluation[f"top{k}"]}
      for k in (1, 5)
    ]
    data = str(evaluation["data"])
    values["model-index"] = [
      {
        "name": name.partition("/")[2],
        "results": [
          {
            "task": {"type": "image-classification"},
            "dataset": {"name": data, "type": data},
            "metrics": metrics,
          }
        ],
      }
    ]
  lines = [f"{key}: {json.dumps(value)}" for key, value in values.items()]
  return "\n".join(["---", *lines, "---"])


def _facts(model: nnx.Module, config: Mapping[str, Any]) -> list[tuple[str, str]]:
  size = (config.get("preprocess") or {}).get("image_size", _DEFAULT_SIZE)
  options = {key: value for key, value in config["model"].items() if key != "name"}
  facts = [
    ("architecture", config["model"]["name"]),
    ("options", ", ".join(f"{key}={value!r}" for key, value in options.items()) or "none"),
    ("parameters", f"{count_parameters(model):,}"),
    (f"multiply-adds, one image of {size} px", f"{multiply_adds(model, size):,}"),
  ]
  step = (config.get("source") or {}).get("step")
  return facts if step is None else [*facts, ("training step", f"{step:,}")]


def _preprocessing(preprocess: Mapping[str, Any] | None) -> str:
  if preprocess is None:
    return "How images are to be prepared is not recorded."
  mean, std = (", ".join(f"{v:g}" for v in preprocess[key]) for key in ("mean", "std"))
  return (
    f"RGB, 0 to 255. The shorter side is resized to {preprocess['resize']} pixels, the central "
    f"{preprocess['image_size']} x {preprocess['image_size']} are cut out, the mean ({mean}) is "
    f"subtracted, and the result divided by ({std}). `lip-jax predict` and `lip-jax evaluate` do "
    "so."
  )


def _classes(count: int, names: Sequence[str] | None) -> str:
  if names is None:
    return f"{count:,}; their names are not recorded."
  shown = ", ".join(map(_plain, names[:_CLASSES_SHOWN]))
  rest = f" and {count - _CLASSES_SHOWN:,} more" if count > _CLASSES_SHOWN else ""
  return f"{count:,}: {shown}{rest}. `config.json` has all, in the order of the logits."


def _evaluation(evaluation: Mapping[str, Any] | None) -> str:
  if evaluation is None:
    return "Not recorded."
  return _table(
    [
      ("data", str(evaluation["data"])),
      ("images", f"{evaluation['count']:,}"),
      ("top-1", f"{100 * evaluation['top1']:.2f} %"),
      ("top-5", f"{100 * evaluation['top5']:.2f} %"),
    ]
  )


def _table(rows: Sequence[tuple[str, str]]) -> str:
  lines = ["| | |", "| --- | --- |"]
  return "\n".join(lines + [f"| {_plain(key)} | {_plain(value)} |" for key, value in rows])


def _plain(text: str) -> str:
  """One line without markup."""
  line = " ".join(str(text).split())
  return "".join(f"\\{character}" if character in "\\`*[]<>|" else character for character in line)
