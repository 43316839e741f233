"""Cluttered digits: a data set that is made on the spot, small enough for tests and notebooks.

Handwritten digits on a coloured, noisy ground among fragments of other digits. What counts is
local and its place varies, which is what importance-based pooling is for. Nothing is downloaded.
"""

import contextlib
import io
import itertools
import sys
from collections.abc import Iterator
from typing import Any, ClassVar

import simplejpeg
import tensorflow_datasets as tfds
from etils import epath
from tensorflow_datasets.core import constants as tfds_constants

from lip_jax.data.prepare.cluttered_scene import ClutteredDigitsConfig, Condition, draw_scene
from lip_jax.errors import UsageError

_JPEG_QUALITY = 90

_DESCRIPTION = """
Handwritten digits among fragments of other digits, on coloured and noisy grounds, made from the
8x8 images of the UCI data set "Optical Recognition of Handwritten Digits". Training and validation
use digits of different writers. `label` is the class of the largest whole digit, `objects` holds
all whole digits, with boxes (ymin, xmin, ymax, xmax) in parts of the image, tight around the ink.
"""

_CITATION = """
@misc{alpaydin1998optdigits,
  author = {Alpaydin, E. and Kaynak, C.},
  title = {Optical Recognition of Handwritten Digits},
  year = {1998},
  howpublished = {UCI Machine Learning Repository},
  doi = {10.24432/C50P49},
}
"""


def _sizes(
  name: str,
  canvas: int,
  heights: tuple[int, ...],
  fragments: tuple[int, ...],
  *,
  count: int,
  num_train: int,
) -> ClutteredDigitsConfig:
  """Size and clutter apart: `count` images of each pair, and of the validation split."""
  return ClutteredDigitsConfig(
    name=name,
    description=f"One whole digit in {canvas}x{canvas} pixels; size and clutter apart.",
    canvas=canvas,
    digits=(1, 1),
    digit_height=(heights[0], heights[-1]),
    fragments=(fragments[0], fragments[-1]),
    light_grounds=False,
    num_train=num_train,
    num_validation=count,
    conditions=tuple(itertools.starmap(Condition, itertools.product(heights, fragments))),
    num_condition=count,
  )


class ClutteredDigits(tfds.core.GeneratorBasedBuilder):
  """TFDS builder of cluttered digits; needs neither network nor TensorFlow.

  `cluttered_digits/classify`: one digit in 48x48 pixels, 20,000 + 2,000 images, chance is 10 %.
  `cluttered_digits/detect`: two to six digits in 128x128 pixels, 2,000 + 500 images.
  `cluttered_digits/detect_small`: three to twelve small digits in 96x96 pixels, 8,000 + 1,000.
  `cluttered_digits/sizes`: one digit in 28x28 pixels, 30,000 + 1,000 images of many sizes and
  densities of clutter, and 1,000 of each of 16 conditions in splits such as "height8_fragments4".
  `cluttered_digits/sizes_large`: the same in 64x64 pixels, 60,000 + 2,000, and 2,000 of each.
  """

  VERSION = tfds.core.Version("1.0.0")
  RELEASE_NOTES: ClassVar[dict[str, str]] = {"1.0.0": "First release."}
  BUILDER_CONFIGS: ClassVar[list[ClutteredDigitsConfig]] = [
    ClutteredDigitsConfig(
      name="classify",
      description="One whole digit in 48x48 pixels.",
      canvas=48,
      digits=(1, 1),
      digit_height=(16, 30),
      fragments=(3, 6),
      light_grounds=False,
      num_train=20_000,
      num_validation=2_000,
    ),
    ClutteredDigitsConfig(
      name="detect",
      description="Two to six whole digits in 128x128 pixels.",
      canvas=128,
      digits=(2, 6),
      digit_height=(12, 48),
      fragments=(8, 16),
      light_grounds=True,
      num_train=2_000,
      num_validation=500,
    ),
    ClutteredDigitsConfig(
      name="detect_small",
      description="Three to twelve small digits in 96x96 pixels.",
      canvas=96,
      digits=(3, 12),
      digit_height=(8, 34),
      fragments=(6, 14),
      light_grounds=False,
      num_train=8_000,
      num_validation=1_000,
    ),
    _sizes("sizes", 28, (8, 11, 14, 18), (0, 2, 4, 8), count=1_000, num_train=30_000),
    _sizes("sizes_large", 64, (8, 12, 20, 32), (0, 6, 12, 24), count=2_000, num_train=60_000),
  ]
  DEFAULT_BUILDER_CONFIG_NAME = "classify"

  def _info(self) -> tfds.core.DatasetInfo:
    canvas = self.builder_config.canvas
    label = tfds.features.ClassLabel(num_classes=10)
    return _LocalDatasetInfo(
      builder=self,
      description=_DESCRIPTION,
      citation=_CITATION,
      homepage="https://archive.ics.uci.edu/dataset/80",
      # Records stay in the order of k, so that a record's index is the number in its id.
      disable_shuffling=True,
      features=tfds.features.FeaturesDict(
        {
          "id": tfds.features.Text(),
          "image": tfds.features.Image(shape=(canvas, canvas, 3), encoding_format="jpeg"),
          "label": label,
          "objects": tfds.features.Sequence({"bbox": tfds.features.BBoxFeature(), "label": label}),
        }
      ),
    )

  def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
    config = self.builder_config
    examples = {
      "train": self._generate_examples(config, "train", "train", config.num_train),
      "validation": self._generate_examples(
        config, "validation", "validation", config.num_validation
      ),
    }
    for condition in config.conditions:
      examples[condition.split] = self._generate_examples(
        config.at(condition), "validation", condition.split, config.num_condition
      )
    return examples

  def _generate_examples(
    self, config: ClutteredDigitsConfig, digits: str, split: str, count: int
  ) -> Iterator[tuple[int, dict[str, Any]]]:
    """Images of the look `config` with the source digits of the split `digits`."""
    canvas = config.canvas
    for k in range(count):
      scene = draw_scene(config, digits, k)
      yield (
        k,
        {
          "id": f"{split}/{k:06d}",
          # Encoded here, because TFDS would encode an array with TensorFlow.
          "image": simplejpeg.encode_jpeg(scene.image, quality=_JPEG_QUALITY),
          "label": scene.labels[0],
          "objects": [
            {"bbox": tfds.features.BBox(*(side / canvas for side in box)), "label": label}
            for box, label in zip(scene.boxes, scene.labels, strict=True)
          ],
        },
      )


class _LocalDatasetInfo(tfds.core.DatasetInfo):
  """Dataset info that never asks the TFDS bucket for what it knows itself."""

  def initialize_from_bucket(self) -> None:
    pass


def open_builder(config: str | None, data_dir: str, *, prepare: bool) -> ClutteredDigits | None:
  """The builder of a prepared data set; None if it is not there, and not to be made.

  Raises:
    UsageError: it cannot be made, or only a part of it is there.
  """
  builder = ClutteredDigits(config=config, data_dir=data_dir)
  if prepare and not _is_prepared(builder):
    _write(builder)
    builder = ClutteredDigits(config=config, data_dir=data_dir)
  return builder if _is_prepared(builder) else None


def _is_prepared(builder: ClutteredDigits) -> bool:
  return (epath.Path(builder.data_dir) / tfds_constants.DATASET_INFO_FILENAME).exists()


def _write(builder: ClutteredDigits) -> None:
  """Writes the data set; TFDS does it aside and renames at the end."""
  print(f"making {builder.info.full_name} in {builder.data_dir}, this once", file=sys.stderr)
  if not sys.stderr.isatty():
    tfds.disable_progress_bar()  # it would fill a log file
  try:
    # TFDS talks of a download, on stdout, which belongs to the caller.
    with contextlib.redirect_stdout(io.StringIO()):
      builder.download_and_prepare(
        file_format="array_record",
        download_config=tfds.download.DownloadConfig(try_download_gcs=False),
      )
  except OSError as error:
    # Of several processes that prepare at once, one renames; the others find its files there.
    if not _is_prepared(builder):
      raise UsageError(
        f"cannot write data set {builder.info.full_name} to {builder.data_dir}: {error}; "
        "choose another directory with --config.data.data_dir=DIR"
      ) from error
  if not _is_prepared(builder):
    raise UsageError(f"{builder.data_dir} holds no whole data set: delete it and run this again")
