"""`imagenet2012` from ImageNet's two tar files: `lip-jax data prepare imagenet`."""

import os
from collections.abc import Sequence
from pathlib import Path

from lip_jax.data import imagenet
from lip_jax.data.prepare import array_record_writer, imagenet_tars
from lip_jax.data.prepare.labelled_images import write_labelled_images
from lip_jax.data.prepare.rescale import Rescaler
from lip_jax.errors import UsageError


def prepare_imagenet(
  train_tar: str | Path,
  val_tar: str | Path,
  data_dir: str | Path | None,
  *,
  shorter_side: int | None = None,
  quality: int | None = None,
  num_shards: int | None = None,
  num_workers: int | None = None,
  synsets: Sequence[str] | None = None,
  validation_labels: Sequence[str] | None = None,
) -> str:
  """Makes `imagenet2012` from the two tar files, which are read at random and not unpacked.

  The images' bytes are kept, unless `shorter_side` is given. Interrupted, the same call goes on
  where it stopped.

  Args:
    train_tar: ILSVRC2012_img_train.tar, on a disk, best one without moving parts.
    val_tar: ILSVRC2012_img_val.tar.
    data_dir: where to; the data set comes into DIR/imagenet2012/5.1.0. None is $TFDS_DATA_DIR or
      ~/tensorflow_datasets.
    shorter_side: pixels; images whose shorter side is larger are scaled down to it.
    quality: JPEG quality of images that are scaled; None is 95.
    num_shards: files of the train split, the others in proportion; None is as many as TFDS makes,
      1,024 and 64.
    num_workers: threads; None is one for each core, at most 16.
    synsets: class names, where it is not ImageNet's 1,000; then images are not counted.
    validation_labels: class names of the validation images, where it is not ImageNet's 50,000.

  Returns:
    What was made, for people.

  Raises:
    UsageError: a tar file is missing, damaged, or another one; there is no room; a data set is
      there that was made otherwise.
  """
  rescale = Rescaler(shorter_side, quality)
  settings = {
    "made_from": "imagenet tar files",
    "train_tar_bytes": _size(train_tar),
    "val_tar_bytes": _size(val_tar),
    "num_shards": num_shards,
    **rescale.settings,
  }
  directory = array_record_writer.dataset_directory(data_dir, imagenet.NAME, imagenet.VERSION)
  if array_record_writer.is_prepared(directory, settings):
    return f"{directory} was prepared already, in the same way"
  class_names = list(synsets or imagenet.synsets())
  image_labels = validation_labels or imagenet.validation_labels()
  with (
    imagenet_tars.index_validation_tar(val_tar, image_labels, class_names) as validation,
    imagenet_tars.index_train_tar(train_tar, class_names) as train,
  ):
    if synsets is None and len(train.names) != imagenet.COUNTS["train"]:
      raise UsageError(
        f"{train_tar} holds {len(train.names):,} images, expected {imagenet.COUNTS['train']:,}; "
        "it is damaged or not ILSVRC2012_img_train.tar: download it again"
      )
    return write_labelled_images(
      directory,
      {"train": train, "validation": validation},
      class_names,
      settings=settings,
      description="ImageNet (ILSVRC 2012), from the two tar files.",
      homepage="https://image-net.org/",
      rescale=rescale,
      num_shards=num_shards,
      num_workers=num_workers,
    )


def _size(path: str | Path) -> int | None:
  return os.stat(path).st_size if os.path.isfile(path) else None
