"""Exported folders on the Hugging Face hub, downloaded and uploaded; needs lip-jax[hub]."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from flax import nnx

from lip_jax.errors import UsageError, one_line
from lip_jax.export import folders
from lip_jax.models.cost import count_parameters, multiply_adds

PREFIX = "hf://"

_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
_ID = re.compile(r"hf://([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")
_CARD = "README.md"
_FILES = (folders.CONFIG, folders.WEIGHTS)
_DEFAULT_ENDPOINT = "https://huggingface.co"
_CLASSES_SHOWN = 10
_ACCURACIES = (("top1", "top-1"), ("top5", "top-5"))
_CITATION = """\
@inproceedings{gao2019lip,
  title = {{LIP}: Local Importance-Based Pooling},
  author = {Gao, Ziteng and Wang, Limin and Wu, Gangshan},
  booktitle = {Proceedings of the IEEE/CVF International Conference on Computer Vision (ICCV)},
  year = {2019},
}"""


class Upload(NamedTuple):
  """What `push` sends."""

  card: str  # Markdown
  sizes: dict[str, int]  # of the files, in bytes
  url: str  # of the repository


def download(address: str) -> tuple[Path, str, str]:
  """An exported folder of the hub in the cache, its address without revision, and the commit.

  Raises:
    UsageError: the address is not hf://ORGANISATION/NAME[@REVISION], huggingface_hub is missing, or
      there is no such thing, or it cannot be reached.
  """
  match = _ID.fullmatch(address)
  if match is None:
    raise UsageError(f"{address!r} is not of the form hf://ORGANISATION/NAME or ...@REVISION")
  try:
    import huggingface_hub
  except ImportError:
    raise UsageError(
      f"{address} needs the package huggingface_hub; install lip-jax[hub], or download the folder "
      "and give its path"
    ) from None
  name, revision = match.groups()
  try:
    # Only these two: whatever else lies there is neither fetched nor read.
    folder = huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=[*_FILES])
  except Exception as error:  # the hub's, the network's, and those of the cache's files
    raise UsageError(
      f"cannot get {address} from the hub ({type(error).__name__}: {one_line(error)}); check its "
      "name, the revision, the network, and for private ones `hf auth login`"
    ) from error
  # The cache's folder is called after the commit, which "main" alone would not pin.
  return Path(folder), f"{PREFIX}{name}", Path(folder).name


def preview(
  folder: str | Path, name: str, *, licence: str = "apache-2.0", endpoint: str | None = None
) -> Upload:
  """What `push` with the same arguments would upload; nothing is sent.

  Raises:
    UsageError: the folder cannot be loaded, or the name is no ORGANISATION/NAME.
  """
  if not _NAME.fullmatch(name):
    raise UsageError(f"{name!r} is not of the form ORGANISATION/NAME, as in gao/lip_resnet50")
  folder = Path(folder)
  model, config = folders.load(folder)  # also checks that others can load it
  if "task" in config:
    raise UsageError(f"{folder} holds a detector; there are model cards for classifiers only yet")
  card = _card(model, config, name, licence)
  sizes = {file: (folder / file).stat().st_size for file in _FILES}
  url = f"{endpoint or _DEFAULT_ENDPOINT}/{name}"
  return Upload(card, {_CARD: len(card.encode()), **sizes}, url)


def push(
  folder: str | Path,
  name: str,
  *,
  licence: str = "apache-2.0",
  private: bool = False,
  endpoint: str | None = None,
  token: str | None = None,
) -> str:
  """Uploads an exported folder with a generated model card, in one commit; gives its address.

  Only the card, `config.json` and `model.safetensors` are sent, whatever else lies in the folder.

  Args:
    name: of the repository, ORGANISATION/NAME; it is made if it is not there.
    endpoint: address of the hub; None: $HF_ENDPOINT or the public one.
    token: with the right to write; None: what `hf auth login` or $HF_TOKEN has set.

  Raises:
    UsageError: as `preview`; huggingface_hub or a token is missing, or the hub refuses or cannot be
      reached.
  """
  try:
    import huggingface_hub
  except ImportError:
    raise UsageError("uploading needs the package of lip-jax[hub]; install it") from None
  card = preview(folder, name, licence=licence, endpoint=endpoint).card
  token = token or huggingface_hub.get_token()
  if token is None:
    raise UsageError(
      "no token for the Hugging Face hub; run hf auth login, or set HF_TOKEN, with one that "
      "may write"
    )
  api = huggingface_hub.HfApi(endpoint=endpoint, token=token)
  contents = {file: str(Path(folder) / file) for file in _FILES} | {_CARD: card.encode()}
  files = [huggingface_hub.CommitOperationAdd(*content) for content in contents.items()]
  try:
    url = api.create_repo(name, private=private, exist_ok=True)
    api.create_commit(name, files, commit_message="Upload a network of lip_jax")
  except Exception as error:  # the hub's, the network's, those of the name's rules
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
      raise UsageError(
        f"the hub does not let this token write {name} (status {status}); run hf auth login with a "
        "token that may write there"
      ) from error
    raise UsageError(
      f"cannot upload to {name} ({type(error).__name__}: {one_line(error)}); check its name and "
      "the network"
    ) from error
  return str(url)


def _card(model: nnx.Module, config: Mapping[str, Any], name: str, licence: str) -> str:
  """The model card: Markdown, with the metadata that the hub reads in front."""
  sections = [
    _metadata(config, name, licence),
    f"# {_plain(name.partition('/')[2])}",
    f"{_plain(config['model']['name'])}, an image classifier for {config['num_classes']:,} "
    "classes, in the format of lip_jax: LIP, local importance-based pooling, for JAX.",
    f'```python\nimport lip_jax\nmodel, config = lip_jax.load("hf://{name}")\n```\n\n'
    "It needs `pip install lip-jax[hub]`. Beside it: `lip-jax predict hf://" + name + " IMAGE...`.",
    f"## Network\n\n{_table(_facts(model, config))}",
    f"## Images\n\n{_preprocessing(config.get('preprocess'))}",
    f"## Classes\n\n{_classes(config['num_classes'], config.get('class_names'))}",
    f"## Evaluation\n\n{_evaluation(config.get('evaluation'))}",
    f"## Licence\n\n{_plain(licence)}",
    f"## Citation\n\n```bibtex\n{_CITATION}\n```",
  ]
  return "\n\n".join(sections) + "\n"


def _metadata(config: Mapping[str, Any], repository: str, licence: str) -> str:
  # JSON is YAML, so nothing in a name can break out of its place.
  values: dict[str, Any] = {
    "license": licence,
    "library_name": "lip_jax",
    "pipeline_tag": "image-classification",
    "tags": ["jax", "flax", "lip", "image-classification"],
  }
  if evaluation := config.get("evaluation"):
    metrics = [
      {"type": "accuracy", "name": f"{name} accuracy", "value": evaluation[key]}
      for key, name in _ACCURACIES
      if key in evaluation
    ]
    result = {
      "task": {"type": "image-classification"},
      "dataset": dict.fromkeys(("name", "type"), str(evaluation["data"])),
      "metrics": metrics,
    }
    values["model-index"] = [{"name": repository.partition("/")[2], "results": [result]}]
  lines = (f"{key}: {json.dumps(value)}" for key, value in values.items())
  return "\n".join(["---", *lines, "---"])


def _facts(model: nnx.Module, config: Mapping[str, Any]) -> list[tuple[str, str]]:
  size = (config.get("preprocess") or {}).get("image_size", 224)
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
  size = preprocess["image_size"]
  height, width = (size, size) if isinstance(size, int) else size
  return (
    f"{'RGB' if len(preprocess['mean']) == 3 else 'Grey'}, 0 to 255. The shorter side is resized "
    f"to {preprocess['resize']} pixels, the central {height} x {width} are cut out, the mean "
    f"({mean}) is subtracted, and the result divided by ({std}). `lip-jax predict` and `lip-jax "
    "evaluate` do so."
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
  rows = [("data", str(evaluation["data"])), ("images", f"{evaluation['count']:,}")]
  rows += [(name, f"{100 * evaluation[k]:.2f} %") for k, name in _ACCURACIES if k in evaluation]
  return _table(rows)


def _table(rows: Sequence[tuple[str, str]]) -> str:
  lines = ["| | |", "| --- | --- |"]
  return "\n".join(lines + [f"| {_plain(key)} | {_plain(value)} |" for key, value in rows])


def _plain(text: str) -> str:
  """One line without markup."""
  return re.sub(r"([\\`*\[\]<>|])", r"\\\1", " ".join(text.split()))
