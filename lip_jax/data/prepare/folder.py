"""A data set of one's own from an image folder: `lip-jax data prepare folder`."""

import hashlib
import os
import re
from pathlib import Path

from lip_jax.data.folder import ImageFolder
from lip_jax.data.prepare import array_record_writer
from lip_jax.data.prepare.labelled_images import write_labelled_images
from lip_jax.data.prepare.rescale import Rescaler
from lip_jax.errors import UsageError

_VERSION = "1.0.0"


def prepare_folder(
  folder: str | Path,
  name: str,
  data_dir: str | Path | None,
  *,
  shorter_side: int | None = None,
  quality: int | None = None,
  num_shards: int | None = None,
  num_workers: int | None = None,
) -> str:
  """Makes a data set from FOLDER/train/CLASS/IMAGE.jpg, and the same of other splits.

  Args:
    folder: the image folder, as for "folder:DIR" in `open_split`.
    data_dir: where to; the data set comes into DIR/NAME/1.0.0. This and the others as for
      `prepare_imagenet`.

  Returns:
    What was made, for people.

  Raises:
    UsageError: as for `prepare_imagenet`, or the folder has another layout.
  """
  if not re.fullmatch("[a-z][a-z0-9_]*", name):
    raise UsageError(
      f"name {name!r} of the data set: expected lower-case letters, digits and underscores"
    )
  rescale = Rescaler(shorter_side, quality, upright=True)
  images = ImageFolder(os.fspath(folder))
  _check_names(images.class_names)
  splits = {split: images.images(split) for split in images.splits}
  listing = hashlib.sha256()
  for split, part in splits.items():
    for file_name, size in zip(part.names, part.sizes.tolist(), strict=True):
      listing.update(f"{split}/{file_name} {size}\n".encode())
  settings = {
    "made_from": "image folder",
    "files_sha256": listing.hexdigest(),
    "num_shards": num_shards,
    **rescale.settings,
  }
  directory = array_record_writer.dataset_directory(data_dir, name, _VERSION)
  if array_record_writer.is_prepared(directory, settings):
    return f"{directory} was prepared already, in the same way"
  summary = write_labelled_images(
    directory,
    splits,
    images.class_names,
    settings=settings,
    description="Images of a folder, labelled by the folders' names.",
    homepage=None,
    rescale=rescale,
    num_shards=num_shards,
    num_workers=num_workers,
  )
  return "; ".join([summary, *images.notes()])


def _check_names(class_names: list[str]) -> None:
  # TFDS keeps them as lines of a file, without blank ones and without spaces around them.
  bad = [
    name for name in class_names if not name or name != name.strip() or re.search(r"[\r\n]", name)
  ]
  if bad:
    raise UsageError(
      f"a TFDS data set cannot keep the names of the classes {', '.join(map(repr, bad[:5]))}: they "
      "are blank, or have spaces at an end or a line's end in them; rename their folders"
    )
