# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Detect small objects
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/lip_jax/blob/main/colab/detect_small_objects.ipynb)
#
# Train a detector of small things on images that are made on the spot, see what it finds, and what
# the LIP layers of its backbone find important. About ten minutes on two CPU cores.

# %%
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = "https://github.com/OWNER/lip_jax"
SMALL = os.environ.get("LIP_JAX_SMALL") == "1"  # a rehearsal, too short to learn anything


def run(*command):
  subprocess.run(command, check=True)


if importlib.util.find_spec("lip_jax") is None:
  # The jax that is here fits this runtime's CPU, GPU or TPU: pip has to leave it as it is.
  packages = importlib.metadata.distributions()
  held = {f"{p.name}=={p.version}" for p in packages if p.name.startswith(("jax", "libtpu"))}
  Path("held.txt").write_text("\n".join(sorted(held)))
  run("git", "clone", "--quiet", "--depth=1", REPOSITORY, "lip_jax_source")
  pip = (sys.executable, "-m", "pip", "install", "--quiet")
  run(*pip, "--constraint", "held.txt", "./lip_jax_source[train]")
  sys.path.insert(0, str(Path("lip_jax_source").resolve()))

import lip_jax

sys.path.append(str(Path(lip_jax.__file__).parents[1]))  # where configs/ is

# %% [markdown]
# ## The images
#
# Digits of 8 to 34 pixels among fragments of digits, with the boxes of the whole ones. They are
# made on first use, in about a minute.

# %%
import PIL.Image

from configs.detect_digits import get_config
from lip_jax import visualize
from lip_jax.data import preprocess
from lip_jax.data.boxes import open_boxes

job = get_config()
if SMALL:
  job.update({"num_epochs": 1.0, "eval_batch_size": 20})
  job.model.update({"width": 4, "logit_width": 4, "fpn_channels": 8, "head_convs": 0})
  job.data.update({"train_split": "train[:64]", "validation_split": "validation[:20]"})

validation = open_boxes(job.data.dataset, job.data.get("validation_split", "validation"))
print(f"{len(validation)} validation images of the digits {', '.join(validation.class_names)}")


def row(index):
  """A validation image and what is there."""
  example = validation[index]
  truth = visualize.Boxes(example["boxes"], example["labels"])
  pixels = preprocess.decode_jpeg(example["image"])
  return visualize.Picture(f"image {index}", pixels, {"truth": truth})


figure = visualize.boxes_figure([row(0), row(1)], validation.class_names)
visualize.save_figure(figure, "images.png")
PIL.Image.open("images.png")

# %% [markdown]
# ## The detector
#
# RetinaNet: a LIP-ResNet, a feature pyramid on it, and a head that says for each of many fixed
# boxes, the anchors, what is in it and how far it is off. The configuration is that of
# `make detect`.

# %%
from lip_jax.training import config as config_lib
from lip_jax.training import trainer
from lip_jax.training.metrics import log_to_stdout

log_to_stdout()
result = trainer.train(config_lib.from_dict(job.to_dict()), "runs/detect_digits")

# %% [markdown]
# The average precision (AP) is COCO's: of boxes that overlap what is there by 50 to 95 %, over all
# classes, between 0 and 1; `AP_small` is that of the smallest third of the digits.

# %%
print(f"AP: {result.metrics['AP']:.3f}, of small digits: {result.metrics['AP_small']:.3f}")

# %% [markdown]
# ## What it finds, and what it looks at
#
# The importance of a pixel is $e^{G(x)}$, the geometric mean over the backbone's LIP layers,
# relative to the image's mean: yellow pixels count four times as much as the mean, blue ones a
# quarter.

# %%
from lip_jax.detection import prediction

detector, config = lip_jax.load("runs/detect_digits")
rows = [row(index) for index in range(4)]
paths = [Path(f"digits_{index}.png") for index in range(4)]
for path, one in zip(paths, rows, strict=True):
  PIL.Image.fromarray(one.image).save(path)

found = prediction.predict(detector, config, paths, threshold=0.3)
pictures = [
  one._replace(boxes={**one.boxes, "found": seen.boxes}, importance=seen.importance)
  for one, seen in zip(rows, found, strict=True)
]
figure = visualize.boxes_figure(pictures, config["class_names"])
visualize.save_figure(figure, "found.png")
PIL.Image.open("found.png")

# %% [markdown]
# From a terminal, for images of any size:
# `lip-jax predict runs/detect_digits IMAGE --threshold .3 --output found.png --importance`.
#
# To see what the pooling is good for, train another backbone: `job.model.backbone = "resnet_small"`
# and `job.model.pool = "strided"` (or average, max, soft).

# %% [markdown]
# ## Images of your own
#
# What is wanted for each split is an annotation file in COCO's format and a folder with its images.
# Here they are made of a few images, in whose annotations a digit is just even or odd.

# %%
import json

FOLDER = Path("even_or_odd_boxes")

for split, count in {"train": 32 if SMALL else 200, "validation": 20 if SMALL else 200}.items():
  digits = open_boxes(job.data.dataset, split)
  (FOLDER / split).mkdir(parents=True, exist_ok=True)
  images, annotations = [], []
  for index in range(count):
    example = digits[index]
    height, width = example["size"].tolist()
    (FOLDER / split / f"{index}.png").write_bytes(example["image"])
    images.append({"id": index, "file_name": f"{index}.png", "height": height, "width": width})
    for (x1, y1, x2, y2), label in zip(example["boxes"].tolist(), example["labels"], strict=True):
      box = {"bbox": [x1, y1, x2 - x1, y2 - y1], "category_id": 1 + int(label) % 2}
      annotations.append({"id": len(annotations) + 1, "image_id": index, **box})
  categories = [{"id": 1, "name": "even"}, {"id": 2, "name": "odd"}]
  content = {"images": images, "annotations": annotations, "categories": categories}
  (FOLDER / f"{split}.json").write_text(json.dumps(content))

# %% [markdown]
# From the detector above, which has other classes: the layer that predicts them starts anew, and
# the log says so. Put your own folder here; `job.frozen = ("backbone",)` trains the rest only.

# %%
job.update({"num_epochs": 1.0 if SMALL else 10.0})
job.data.dataset = f"coco:{FOLDER}/{{split}}.json@{FOLDER}/{{split}}"
job.data.update({"train_split": "train", "validation_split": "validation"})
tuned = trainer.train(
  config_lib.from_dict(job.to_dict()), "runs/even_or_odd_boxes", weights="runs/detect_digits"
)
print(f"fine-tuned, AP: {tuned.metrics['AP']:.3f}")
