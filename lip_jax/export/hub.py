"""Exported folders on the Hugging Face hub; needs lip-jax[hub]."""

import re
from pathlib import Path
from typing import Any, NamedTuple

from lip_jax.errors import UsageError
from lip_jax.export import folders, model_card

_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
_CARD = "README.md"
_FILES = (folders.CONFIG, folders.WEIGHTS)
_DEFAULT_ENDPOINT = "https://huggingface.co"


class File(NamedTuple):
  """A file that is uploaded: its name and its size in bytes."""

  name: str
  size: int


class Plan(NamedTuple):
  """What `push` does.

  Attributes:
    card: the model card, Markdown.
    files: what is uploaded.
    url: of the repository.
  """

  card: str
  files: list[File]
  url: str


def plan(
  folder: str | Path, name: str, *, licence: str = "apache-2.0", endpoint: str | None = None
) -> Plan:
  """What `push` with the same arguments would upload; nothing is sent.

  Raises:
    UsageError: the folder cannot be loaded, or the name is no ORGANISATION/NAME.
  """
  if not _NAME.fullmatch(name):
    raise UsageError(f"{name!r} is not of the form ORGANISATION/NAME, as in gao/lip_resnet50")
  folder = Path(folder)
  model, config = folders.load(folder)  # also checks that others can load it
  card = model_card.render(model, config, name, licence)
  files = [File(_CARD, len(card.encode()))]
  files += [File(file, (folder / file).stat().st_size) for file in _FILES]
  return Plan(card, files, f"{endpoint or _DEFAULT_ENDPOINT}/{name}")


def push(
  folder: str | Path,
  name: str,
  *,
  licence: str = "apache-2.0",
  private: bool = False,
  endpoint: str | None = None,
  token: str | None = None,
) -> str:
  """Uploads an exported folder with a generated model card, in one commit.

  Only the card, `config.json` and `model.safetensors` are sent, whatever else lies in the folder.

  Args:
    folder: that `lip-jax export` or `lip_jax.export.folders.save` wrote.
    name: of the repository, ORGANISATION/NAME; it is made if it is not there.
    licence: of the weights, an identifier of the hub.
    private: make a new repository private.
    endpoint: address of the hub; None: $HF_ENDPOINT or the public one.
    token: with the right to write; None: what `hf auth login` or $HF_TOKEN has set.

  Returns:
    The address of the repository.

  Raises:
    UsageError: as `plan`; huggingface_hub or a token is missing, or the hub refuses or cannot be
      reached.
  """
  try:
    import huggingface_hub
  except ImportError:
    raise UsageError("uploading needs the package of lip-jax[hub]; install it") from None
  card = plan(folder, name, licence=licence, endpoint=endpoint).card
  token = token or huggingface_hub.get_token()
  if token is None:
    raise UsageError(
      "no token for the Hugging Face hub; run hf auth login, or set HF_TOKEN, with one that "
      "may write"
    )
  api = huggingface_hub.HfApi(endpoint=endpoint, token=token)
  contents: dict[str, Any] = {_CARD: card.encode()}
  contents |= {file: str(Path(folder) / file) for file in _FILES}
  try:
    url = api.create_repo(name, private=private, exist_ok=True)
    api.create_commit(
      name,
      [
        huggingface_hub.CommitOperationAdd(path_in_repo=file, path_or_fileobj=content)
        for file, content in contents.items()
      ],
      commit_message="Upload a network of lip_jax",
    )
  except Exception as error:  # the hub's, the network's, those of the name's rules
    raise _refused(name, error) from error
  return str(url)


def _refused(name: str, error: Exception) -> UsageError:
  status = getattr(getattr(error, "response", None), "status_code", None)
  if status in (401, 403):
    return UsageError(
      f"the hub does not let this token write {name} (status {status}); run hf auth login with a "
      "token that may write there"
    )
  reason = " ".join(str(error).split())[:300]
  return UsageError(
    f"cannot upload to {name} ({type(error).__name__}: {reason}); check its name and the network"
  )
