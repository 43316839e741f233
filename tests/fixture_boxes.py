"""Tiny data sets of images with boxes: COCO's JSON beside a folder, and TFDS's `coco/2017`."""

import json
from typing import ClassVar

import numpy as np
import simplejpeg
import tensorflow_datasets as tfds

from lip_jax.data import coco_categories

# Height and width of image k; wide, tall and square ones.
SIZES = [(40, 60), (60, 40), (50, 50), (33, 64), (64, 33), (48, 60), (60, 44)]


def picture(k, height, width):
  """A dark image with a bright rectangle, encoded, and the rectangle as x, y, width, height."""
  x, y = width // 4 + k % 3, height // 3
  box = [x, y, width // 3, height // 4]
  pixels = np.full((height, width, 3), 20, np.uint8)
  pixels[y : y + box[3], x : x + box[2]] = 230
  return simplejpeg.encode_jpeg(pixels, quality=98, colorsubsampling="444"), box


def content(count, first_id=0):
  """The JSON of `count` images with one box each; image k has the id first_id + k."""
  images, annotations = [], []
  for k in range(count):
    height, width = SIZES[k % len(SIZES)]
    number = first_id + k
    images.append({"id": number, "file_name": f"{k}.jpg", "height": height, "width": width})
    box = picture(k, height, width)[1]
    annotations.append(
      {"id": k + 1, "image_id": number, "category_id": 7 if k % 2 else 200, "bbox": box,
       "area": box[2] * box[3] / 2, "iscrowd": 0, "segmentation": {"counts": "abc", "size": [1, 2]}}
    )  # fmt: skip
  categories = [{"id": 200, "name": "cat"}, {"id": 7, "name": "bird"}]
  return {"images": images, "annotations": annotations, "categories": categories}


def write(folder, values=None, *, count=23, split=None):
  """Writes the annotation file and its images; returns the name of the data set."""
  values = content(count) if values is None else values
  file = folder / ("all.json" if split is None else f"{split}.json")
  images = folder / ("images" if split is None else split)
  images.mkdir(parents=True, exist_ok=True)
  for k, image in enumerate(values["images"]):
    height, width = SIZES[k % len(SIZES)]
    (images / image["file_name"]).write_bytes(picture(k, height, width)[0])
  file.write_text(json.dumps(values))
  if split is None:
    return f"coco:{file}@{images}"
  return f"coco:{folder}/{{split}}.json@{folder}/{{split}}"


class Coco(tfds.core.GeneratorBasedBuilder):
  """The features of TFDS's `coco/2017`, of the annotations above."""

  VERSION = tfds.core.Version("1.1.0")
  BUILDER_CONFIGS: ClassVar = [tfds.core.BuilderConfig(name="2017")]

  def _info(self):
    objects = {
      "id": np.int64,
      "area": np.int64,
      "bbox": tfds.features.BBoxFeature(),
      "label": tfds.features.ClassLabel(names=list(coco_categories.NAMES)),
      "is_crowd": np.bool_,
    }
    features = {
      "image": tfds.features.Image(encoding_format="jpeg"),
      "image/filename": tfds.features.Text(),
      "image/id": np.int64,
      "objects": tfds.features.Sequence(objects),
    }
    return tfds.core.DatasetInfo(
      builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
    )

  def _split_generators(self, dl_manager):
    return {"train": self._generate_examples(23), "validation": self._generate_examples(9)}

  def _generate_examples(self, count):
    for k in range(count):
      height, width = SIZES[k % len(SIZES)]
      data, (x, y, w, h) = picture(k, height, width)
      box = tfds.features.BBox(y / height, x / width, (y + h) / height, (x + w) / width)
      objects = [
        {"id": k, "area": w * h // 2, "bbox": box, "label": 79 - k, "is_crowd": k == 4},
      ]
      yield (
        k,
        {
          "image": data,
          "image/filename": f"{1000 + k:012d}.jpg",
          "image/id": 1000 + k,
          "objects": [] if k == 5 else objects,
        },
      )
