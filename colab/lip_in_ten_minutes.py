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
# # LIP in ten minutes
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/lip_jax/blob/main/colab/lip_in_ten_minutes.ipynb)
#
# Pooling replaces each window of pixels by one number. *Local importance-based pooling* (LIP; Gao,
# Wang and Wu, ICCV 2019) takes a weighted mean, and lets a small network $G$ learn from the
# features themselves which pixels count:
#
# $$y = \frac{\sum x \, e^{G(x)}}{\sum e^{G(x)}} \quad \text{over each window}$$
#
# Here you pool by hand, see how other poolings are the same formula with another weight, put LIP
# into a network of your own, and train one. Any runtime will do: CPU, GPU or TPU.

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
# ## The operator
#
# `lip_pool` takes features and *logits*, the logarithms of the weights: as many as there are
# features, or one for all channels of a pixel.

# %%
import jax
import jax.numpy as jnp

print(f"jax {jax.__version__} on {jax.devices()[0].device_kind}")

x = jnp.array([[1.0, 2.0], [3.0, 10.0]]).reshape(1, 2, 2, 1)  # [N, H, W, C], one image
window = {"window": 2, "stride": 2, "padding": 0}

for text, logits in {
  "equal logits: the mean": 0 * x,
  "logits x / 10: large pixels count more": x / 10,
  "logits 100 x: the maximum": 100 * x,
  "logits -100 x: the minimum": -100 * x,
}.items():
  print(f"{text:40} {lip_jax.lip_pool(x, logits, **window).item():5.2f}")

# %% [markdown]
# ## One family
#
# Section 3.1 of the paper: average, max, strided and other poolings are weighted means, too, and
# differ in the weight $F(x)$ alone. Each layer of `lip_jax.lan` tells the `importance` that it
# pools with, $F / \sum F$. Below, one image of the embedded data set is pooled over windows of 4x4
# pixels. The $G$ of the last column is written by hand: what stands out from its neighbourhood is
# important.

# %%
import io

import matplotlib.pyplot as plt
import PIL.Image

from lip_jax import lan
from lip_jax.data.source import open_split

source = open_split("cluttered_digits/classify", "validation", None)  # made here, on first use
image = jnp.asarray(PIL.Image.open(io.BytesIO(source[1]["image"]))) / 255  # [48, 48, 3]
features = 4 * image.mean(axis=2)[None, :, :, None]


def stands_out(x):
  smooth = lip_jax.average_pool(x, window=3, stride=1, padding=1)
  return 4 * jnp.abs(smooth - lip_jax.average_pool(x, window=13, stride=1, padding=6))


window = {"window": 4, "stride": 4, "padding": 0}
family = {
  "average": ("F = 1", lan.AveragePool(**window)),
  "strided": ("F = 1 for one pixel", lan.StridedPool(**window)),
  "max": ("F = 1 for the largest", lan.MaxPool(**window)),
  "SoftPool": ("F = exp(x)", lan.SoftPool(**window)),
  "detail-preserving": ("F = distance to the mean", lan.DetailPreservingPool(1, **window)),
  "LIP": ("F = exp(G(x))", lan.LIP(stands_out, **window)),
}

figure, axes = plt.subplots(2, len(family) + 1, figsize=(14, 4.6), layout="constrained")
axes[0, 0].imshow(image)
axes[0, 0].set_title("image")
axes[1, 0].axis("off")
for column, (name, (weight, pool)) in zip(axes.T[1:], family.items(), strict=True):
  shares = pool.importance(features)  # [1, 12, 12, 16, 1]: the pixels of each window, row by row
  shares = shares.reshape(12, 12, 4, 4).transpose(0, 2, 1, 3).reshape(48, 48)
  column[0].imshow(shares, cmap="cividis", vmin=0, vmax=1 / 4)
  column[0].set_title(f"{name}\n{weight}", fontsize=10)
  column[1].imshow(pool(features)[0, :, :, 0], cmap="gray", vmin=0, vmax=4)
axes[0, 1].set_ylabel("importance")
axes[1, 1].set_ylabel("pooled")
for axis in axes.flat:
  axis.set(xticks=[], yticks=[])
figure.savefig("lan_family.png")

# %% [markdown]
# ## In a network of your own
#
# `replace_downsampling` finds the poolings and strided convolutions of any Flax NNX model and puts
# LIP in their place. New logits start at zero: the network starts with average pooling, and learns
# from there.

# %%
from functools import partial

from flax import nnx


class Net(nnx.Module):
  def __init__(self, rngs):
    self.conv1 = nnx.Conv(3, 16, (3, 3), rngs=rngs)
    self.pool = partial(nnx.max_pool, window_shape=(2, 2), strides=(2, 2))
    self.conv2 = nnx.Conv(16, 32, (3, 3), strides=2, rngs=rngs)
    self.classifier = nnx.Linear(32, 10, rngs=rngs)

  def __call__(self, x):
    x = self.pool(nnx.relu(self.conv1(x)))
    return self.classifier(nnx.relu(self.conv2(x)).mean(axis=(1, 2)))


net = Net(nnx.Rngs(0))
images = jax.ShapeDtypeStruct((8, 48, 48, 3), jnp.float32)
for change in lip_jax.replace_downsampling(net, images, rngs=nnx.Rngs(1)):
  print(change)
print("logits of the classes:", net(jnp.zeros((8, 48, 48, 3))).shape)

# %% [markdown]
# ## Train one
#
# The embedded job: find the one whole digit among fragments of others, in 20,000 images of 48x48
# pixels that were made above. All hyper-parameters are in `configs/cluttered_digits.py`; change
# what you like before it starts. It takes about five minutes on two CPU cores. Interrupt it, and
# the same cell goes on where it stopped.

# %%
from configs.cluttered_digits import get_config
from lip_jax.training import config as config_lib
from lip_jax.training import trainer
from lip_jax.training.metrics import log_to_stdout

config = get_config()
# Another pooling: config.model.pool = "max"  # or average, strided, soft, dpp_lite_sym, ...
if SMALL:
  config.update({"num_epochs": 1.0, "global_batch_size": 16, "eval_batch_size": 20})
  config.model.update({"width": 4, "logit_width": 4, "bn_group_size": 16})
  config.data.update({"train_split": "train[:64]", "validation_split": "validation[:20]"})
log_to_stdout()
result = trainer.train(config_lib.from_dict(config.to_dict()), "runs/digits")
print(f"top-1: {100 * result.metrics['top1']:.2f} % of {result.metrics['count']} images")

# %% [markdown]
# ## What it finds important
#
# The run has drawn the importance $e^{G(x)}$ of its LIP layers, over validation images: the first
# layers tell ink from ground, the last ones the whole digit from the fragments. Nobody told it
# where the digit is.

# %%
PIL.Image.open(str(result.pictures["importance"]))

# %% [markdown]
# Next: [look_inside](look_inside.ipynb) evaluates this network and looks further into it,
# [fine_tune](fine_tune.ipynb) trains it for another task, and
# [your_own_logit_module](your_own_logit_module.ipynb) replaces $G$.
