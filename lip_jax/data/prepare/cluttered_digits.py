"""Cluttered digits: a data set that is made on the spot, small enough for tests and notebooks.

Handwritten digits on a coloured, noisy ground among fragments of other digits. What counts is
local and its place varies, which is what importance-based pooling is for. Nothing is downloaded.
"""

import itertools
from collections.abc import Iterator
from typing import Any, ClassVar

import simplejpeg
import tensorflow_datasets as tfds

from lip_jax.data.prepare.cluttered_scene import ClutteredDigitsConfig, Condition, draw_scene

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


class ClutteredDigits(tfds.core.GeneratorBasedBuilder):
  """TFDS builder of cluttered digits; needs neither network nor TensorFlow.

  `cluttered_digits/classify`: one digit in 48x48 pixels, 20,000 + 2,000 images, chance is 10 %.
  `cluttered_digits/detect`: two to six digits in 128x128 pixels, 2,000 + 500 images.
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
      name="sizes",
      description="One whole digit in 28x28 pixels; size and clutter apart (benchmarks).",
      canvas=28,
      digits=(1, 1),
      digit_height=(8, 18),
      fragments=(0, 8),
      light_grounds=False,
      num_train=30_000,
      num_validation=1_000,
      conditions=tuple(
        itertools.starmap(Condition, itertools.product((8, 11, 14, 18), (0, 2, 4, 8)))
      ),
      num_condition=1_000,
    ),
    ClutteredDigitsConfig(
      name="sizes_large",
      description="One whole digit in 64x64 pixels; size and clutter apart (benchmarks).",
      canvas=64,
      digits=(1, 1),
      digit_height=(8, 32),
      fragments=(0, 24),
      light_grounds=False,
      num_train=60_000,
      num_validation=2_000,
      conditions=tuple(
        itertools.starmap(Condition, itertools.product((8, 12, 20, 32), (0, 6, 12, 24)))
      ),
      num_condition=2_000,
    ),
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
