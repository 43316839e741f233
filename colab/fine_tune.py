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
# # Fine-tune a network
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/lip_jax/blob/main/colab/fine_tune.ipynb)
#
# Take a trained network, give it a new classifier, and train it for another task with few images.
# By default all happens here and offline: a network that knows ten digits learns to tell even from
# odd ones. With `FLOWERS = True` it is photographs of flowers from TFDS, and a network that knows
# ImageNet.

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

# %%
FLOWERS = False

# %% [markdown]
# ## The network to start from
#
# Anything that `lip_jax.load` takes: a run, a folder that `lip-jax export` or `lip-jax convert`
# wrote, `hf://ORGANISATION/NAME`. For the flowers, upload the LIP authors' `lip_resnet50.pth` to
# this runtime, and it is converted. For the digits, the embedded job is trained (five minutes on
# two CPU cores; nothing, if another of these notebooks has done it in this runtime).

# %%
import dataclasses

from configs.cluttered_digits import get_config
from lip_jax.export.torch_convert import convert_weights
from lip_jax.training import config as config_lib
from lip_jax.training import trainer
from lip_jax.training.metrics import log_to_stdout

log_to_stdout()
config = get_config()
if FLOWERS:
  START = "lip_resnet50"
  if not Path(START).exists():
    convert_weights("lip_resnet50.pth", START, model="lip_resnet50")
else:
  START = "runs/digits"
  if SMALL:
    config.update({"num_epochs": 1.0, "global_batch_size": 16, "eval_batch_size": 20})
    config.model.update({"width": 4, "logit_width": 4, "bn_group_size": 16})
    config.data.update({"train_split": "train[:64]", "validation_split": "validation[:20]"})
  trainer.train(config_lib.from_dict(config.to_dict()), START)

_, start = lip_jax.load(START)
print(start["model"])
print(start["num_classes"], "classes:", start["class_names"][:10])

# %% [markdown]
# ## The new task
#
# Images of your own belong into folders, `FOLDER/train/CLASS/` and `FOLDER/validation/CLASS/`, and
# the data set is called `folder:FOLDER`. That is what is done here with 200 images of digits for
# training, 20 for each digit on average. The validation digits are by other writers.
#
# A data set of TFDS goes by its name, once it is prepared.

# %%
from lip_jax.data.source import open_split

if FLOWERS:
  import tensorflow_datasets as tfds

  tfds.builder("tf_flowers").download_and_prepare(file_format="array_record")
  data = {
    "dataset": "tf_flowers",
    "train_split": "train[:85%]",
    "validation_split": "train[85%:]",
    "crop_scale": (0.25, 1.0),
    "flip": True,
  }
else:
  for split, count in {"train": 64 if SMALL else 200, "validation": 20 if SMALL else 1000}.items():
    digits = open_split("cluttered_digits/classify", split, None)
    for index in range(count):
      example = digits[index]
      folder = Path("even_or_odd", split, "odd" if example["label"] % 2 else "even")
      folder.mkdir(parents=True, exist_ok=True)
      (folder / f"{index}.jpg").write_bytes(example["image"])
  data = {
    "dataset": "folder:even_or_odd",
    "train_split": "train",
    "validation_split": "validation",
  }

# %% [markdown]
# ## Train
#
# The network stays what it was, and so does the preparation of its images. `weights=` puts its
# weights into the new run: all but the classifier's, as that has other classes now. A lower
# learning rate keeps most of what it has learned.

# %%
config.model = start["model"]
config.data.update(data)
config.data.update({key: tuple(start["preprocess"][key]) for key in ("mean", "std")})
config.data.image_size = start["preprocess"]["image_size"]
config.data.eval_resize = start["preprocess"]["resize"]
config.optim.base_lr = 0.1
config.optim.warmup_epochs = 1.0
config.num_epochs = 1.0 if SMALL else 10.0 if FLOWERS else 20.0
config.eval_every_epochs = config.num_epochs / 2
config.importance_images = 6
new_run = config_lib.from_dict(config.to_dict())

fine_tuned = trainer.train(new_run, "runs/fine_tuned", weights=START)

# %% [markdown]
# The same training, from nothing: is there anything in having learned before?

# %%
new_run = dataclasses.replace(new_run, importance_images=0)  # no picture
from_scratch = trainer.train(new_run, "runs/from_scratch")

print(f"fine-tuned:   {100 * fine_tuned.metrics['top1']:.2f} %")
print(f"from scratch: {100 * from_scratch.metrics['top1']:.2f} %")

# %% [markdown]
# ## Look and share
#
# What the fine-tuned network finds important, and the folder to hand on: weights and what belongs
# to them, without the optimizer's state. `lip_jax.load` reads it wherever you take it.

# %%
import PIL.Image

from lip_jax.export import folders

model, loaded = lip_jax.load("runs/fine_tuned")
folders.save("fine_tuned", model, loaded, overwrite=True)
print(sorted(path.name for path in Path("fine_tuned").iterdir()), loaded["class_names"])

PIL.Image.open(str(fine_tuned.pictures["importance"]))

# %% [markdown]
# From a terminal: `python train.py --config=... --workdir=... --weights=PATH`.
