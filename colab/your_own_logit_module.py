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
# # Your own logit module
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/lip_jax/blob/main/colab/your_own_logit_module.ipynb)
#
# LIP pools with the weights $e^{G(x)}$. The paper has two forms of the network $G$, a *projection*
# and a *bottleneck*. Here you write a third one, check it, put it into a ResNet, and see whether it
# is worth anything.

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
# ## Write it
#
# A logit module takes features [N, H, W, C] and gives logits of the same shape, or [N, H, W, 1] for
# one importance per pixel. Ours asks each pixel's 5x5 neighbourhood, each channel on its own, which
# costs next to nothing.
#
# Two habits of the paper's modules are worth keeping:
# - The last convolution starts at zero. Equal logits are average pooling, a mild start.
# - A *gate*, `12 * sigmoid`, bounds the logits: no pixel counts more than $e^{12}$ times another.
#   Telling so, in `logit_range`, spares the operator the search for the largest logit.

# %%
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


class Neighbours(nnx.Module):
  logit_range = (0.0, 12.0)

  def __init__(self, features, *, dtype=jnp.float32, rngs):
    self.conv = nnx.Conv(
      features,
      features,
      (5, 5),
      feature_group_count=features,
      kernel_init=nnx.initializers.zeros,
      dtype=dtype,
      rngs=rngs,
    )

  def __call__(self, x):
    return 12 * nnx.sigmoid(self.conv(x))


# %% [markdown]
# ## Check it
#
# As a function, `lip_pool(x, logits)`; as a layer, `LIP(G)`. It has to start as average pooling,
# the importance has to add up to one in each window, and the gradients with respect to features
# and logits have to be those of finite differences.

# %%
from jax.test_util import check_grads

x = jax.random.normal(jax.random.key(0), (2, 8, 8, 4))
module = Neighbours(4, rngs=nnx.Rngs(0))
pool = lip_jax.LIP(module, window=3, stride=2, padding=1)

print("pools", x.shape, "to", pool(x).shape)
np.testing.assert_allclose(pool(x), lip_jax.average_pool(x), atol=1e-6)
print("starts as average pooling")

module.conv.kernel[...] = jax.random.normal(jax.random.key(1), module.conv.kernel.shape)
np.testing.assert_allclose(pool.importance(x).sum(axis=3), 1, atol=1e-6)
print("importance adds up to one")

check_grads(lip_jax.lip_pool, (x, module(x)), order=1, modes=["rev"], atol=1e-2, rtol=1e-2)
print("gradients agree with finite differences")

# %% [markdown]
# ## Put it into a network
#
# Our networks take what halves their resolution as an argument, `downsample=`, for each of the
# places where that happens. `Pooled` makes one out of any pooling.

# %%
from lip_jax.models.downsample import PLACES, Pooled
from lip_jax.models.resnet import ResNet


def neighbours(features, *, dtype, rngs, **windows):
  return lip_jax.LIP(Neighbours(features, dtype=dtype, rngs=rngs), **windows)


def projection(features, *, dtype, rngs, **windows):
  return lip_jax.LIP(lip_jax.Projection(features, features, dtype=dtype, rngs=rngs), **windows)


def average(features, *, dtype, rngs, **windows):
  return lip_jax.lan.AveragePool(**windows)


def network(make):
  return ResNet(
    num_classes=10,
    downsample=dict.fromkeys(PLACES, Pooled(make)),
    stage_sizes=(1, 1, 1, 1),
    width=4 if SMALL else 16,
    stem="small",
    rngs=nnx.Rngs(0),
  )


networks = {make.__name__: network(make) for make in (average, projection, neighbours)}
for name, net in networks.items():
  size = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(net, nnx.Param)))
  print(f"{name:12} {size:,} parameters")

# %% [markdown]
# ## Is it worth anything?
#
# The embedded data: which digit is whole, among fragments of others? A plain training loop, a short
# one, the same for all three.

# %%
import io

import matplotlib.pyplot as plt
import optax
import PIL.Image

from lip_jax import visualize
from lip_jax.data.source import open_split


def arrays(split, count):
  source = open_split("cluttered_digits/classify", split, None)
  examples = [source[index] for index in range(min(count, len(source)))]
  images = np.stack([PIL.Image.open(io.BytesIO(example["image"])) for example in examples])
  return (images / 64 - 2).astype(np.float32), np.array([example["label"] for example in examples])


steps, batch_size = (3, 8) if SMALL else (600, 32)
images, labels = arrays("train", steps * batch_size)
new_images, new_labels = arrays("validation", 20 if SMALL else 1000)
optimizer = optax.sgd(optax.cosine_decay_schedule(0.1, steps), momentum=0.9)


def train(net):
  graph, params, statistics = nnx.split(net, nnx.Param, ...)

  def loss_of(params, statistics, images, labels):
    net = nnx.merge(graph, params, statistics, copy=True)
    loss = optax.softmax_cross_entropy_with_integer_labels(net(images), labels).mean()
    return loss, nnx.state(net, nnx.Not(nnx.Param))

  @jax.jit
  def update(params, statistics, momentum, images, labels):
    gradient = jax.value_and_grad(loss_of, has_aux=True)
    (loss, statistics), gradients = gradient(params, statistics, images, labels)
    changes, momentum = optimizer.update(gradients, momentum, params)
    return optax.apply_updates(params, changes), statistics, momentum, loss

  momentum, losses = optimizer.init(params), []
  for start in range(0, len(images), batch_size):
    rows = slice(start, start + batch_size)
    params, statistics, momentum, loss = update(
      params, statistics, momentum, images[rows], labels[rows]
    )
    losses.append(float(loss))
  nnx.update(net, params, statistics)
  return losses


def accuracy(net):
  net.eval()
  logits = visualize.predictor(net)(new_images)
  return (logits.argmax(axis=1) == new_labels).mean()


losses = {}
for name, net in networks.items():
  losses[name] = train(net)
  print(f"{name:12} top-1: {100 * accuracy(net):.1f} %", flush=True)

# %%
figure, axis = plt.subplots(figsize=(6, 3.5), layout="constrained")
width = 1 if SMALL else 25
for (name, values), style in zip(losses.items(), ("-", "--", ":"), strict=True):
  axis.plot(np.convolve(values, np.full(width, 1 / width), "valid"), style, label=name)
axis.set(xlabel="step", ylabel=f"training loss, mean of {width} steps")
axis.spines[["top", "right"]].set_visible(False)
axis.legend(frameon=False)
figure.savefig("losses.png")

# %% [markdown]
# ## What does it look at?

# %%
figure = visualize.importance_figure(
  networks["neighbours"], (64 * (new_images[:8] + 2)).astype(np.uint8), lambda x: x / 64 - 2
)
visualize.save_figure(figure, "neighbours.png")
PIL.Image.open("neighbours.png")

# %% [markdown]
# One run of a few hundred steps says little about which pooling is better: train for longer, and
# with several seeds, before you believe a difference. `benchmarks/compare_pools.py` does so for the
# poolings that have a name.
