"""Exported folders on the Hugging Face hub, downloaded and uploaded; needs lip-jax[hub]."""

import re
from pathlib import Path
from typing import NamedTuple

from lip_jax.errors import UsageError, one_line
from lip_jax.export import folders, model_card

PREFIX = "hf://"

_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
_ID = re.compile(r"hf://([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")
_CARD = "README.md"
_FILES = (folders.CONFIG, folders.WEIGHTS)
_DEFAULT_ENDPOINT = "https://huggingface.co"


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
  card = model_card.write(model, config, name, licence)
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
