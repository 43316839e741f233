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
# # Look inside a network
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/lip_jax/blob/main/colab/look_inside.ipynb)
#
# Load a trained network, evaluate it, and see where it looks: importance maps of its LIP layers,
# class activation maps, effective receptive fields. Then put the maps to the test.

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
# ## A network
#
# `PATH` can be the directory of a run, a folder that `lip-jax export` or `lip-jax convert` wrote,
# or `hf://ORGANISATION/NAME`. Without one, the embedded job is trained here (about five minutes on
# two CPU cores; nothing, if `lip_in_ten_minutes` has done it in this runtime).

# %%
PATH = None

if PATH is None:
  from configs.cluttered_digits import get_config
  from lip_jax.training import config as config_lib
  from lip_jax.training import trainer
  from lip_jax.training.metrics import log_to_stdout

  job = get_config()
  if SMALL:
    job.update({"num_epochs": 1.0, "global_batch_size": 16, "eval_batch_size": 20})
    job.model.update({"width": 4, "logit_width": 4, "bn_group_size": 16})
    job.data.update({"train_split": "train[:64]", "validation_split": "validation[:20]"})
  log_to_stdout()
  trainer.train(config_lib.from_dict(job.to_dict()), "runs/digits")
  PATH = "runs/digits"

model, config = lip_jax.load(PATH)
print(config["model"])
print(config["source"])

# %% [markdown]
# ## What it is worth
#
# Every image of the validation split counts once, on any number of devices. A network that is no
# run of ours does not know its data: then say `dataset="imagenet2012"` or `"folder:DIR"`.

# %%
from lip_jax.classification.evaluation import evaluate_loaded

results = evaluate_loaded(model, config)
print(f"top-1: {100 * results['top1']:.2f} %, top-5: {100 * results['top5']:.2f} %")
print(f"{results['count']} images of {results['data']}, {results['images_per_second']:.0f}/s")

# %% [markdown]
# ## What its LIP layers find important
#
# Each map is $e^{G(x)}$ of one layer, mean of the channels, relative to the image's mean: yellow
# pixels count four times as much as the mean, blue ones a quarter.

# %%
import PIL.Image

from lip_jax import visualize
from lip_jax.visualize import compare

network = compare.Network("LIP", PATH, model, config)
data = compare.Data(results["data"].split()[0], "validation", None)
images = compare.first_images([network], data, 20 if SMALL else 200)

figure = visualize.importance_figure(model, images.pixels[:8], network.normalize)
visualize.save_figure(figure, "importance.png")
PIL.Image.open("importance.png")

# %% [markdown]
# ## Where it finds the evidence
#
# Figure 5 of the paper. The class activation map says how much each place speaks for the predicted
# class; the effective receptive field, which pixels moved the map where it is largest (the ring).
# To see networks side by side, as there, add further columns: `compare.load_networks([...])`.

# %%
shown = images.pixels[:3]
column = compare.column(network, shown)
figure = visualize.comparison_figure(shown, [column], images.titles[:3])
visualize.save_figure(figure, "evidence.png")
PIL.Image.open("evidence.png")

# %% [markdown]
# ## Are these the pixels that count?
#
# Occlude pixels with the data's mean colour, from the most important one on, and see how soon the
# network is lost; then in random order, and from the least important one on. If the importance were
# arbitrary, the lines would lie upon each other.

# %%
x = network.normalize(images.pixels)
importance = visualize.pixel_importance(visualize.importance_maps(model, x), model, x.shape[1:3])
predict = visualize.predictor(model)
orders = {
  "most important first": (importance, True),
  "random": (visualize.random_scores(importance.shape), True),
  "least important first": (importance, False),
}
curves = []
for order, (scores, most_first) in orders.items():
  curve = visualize.deletion_curve(predict, x, scores, images.labels, most_first=most_first)
  print(f"{order:22} area under the probability of the class: {curve.area:.3f}")
  curves.append(visualize.Curve(order, "", 100 * curve.fractions, 100 * curve.accuracy))

# %% [markdown]
# And how steady is the prediction when the image moves by a few pixels?

# %%
steady = visualize.shift_consistency(predict, x, shifts=(1, 2, 4, 8))
same = visualize.Curve(network.name, "", list(steady), [100 * part for part in steady.values()])
figure = visualize.curves_figure(
  [
    visualize.Plot("Deletion", "occluded pixels (%)", "top-1 accuracy (%)", curves),
    visualize.Plot("Shift", "shift (pixels)", "same prediction (%)", [same]),
  ]
)
visualize.save_figure(figure, "tests.png")
PIL.Image.open("tests.png")

# %% [markdown]
# The same from a terminal, for any number of networks: `lip-jax evaluate`, `lip-jax predict`,
# `lip-jax visualize` (see `--help`).
