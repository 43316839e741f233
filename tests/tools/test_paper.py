"""configs/imagenet.py: every row of the paper's tables builds, compiles and trains."""

import dataclasses
import functools
import json
import re
import runpy
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest
from flax import nnx

from lip_jax import list_models
from lip_jax.classification.task import Classification
from lip_jax.errors import UsageError
from lip_jax.models import abstract_model
from lip_jax.tools import paper
from lip_jax.training import config as config_lib
from lip_jax.training import optim
from lip_jax.training.train_step import Program

PATH = Path(__file__).parents[2] / "configs" / "imagenet.py"
CONFIG = runpy.run_path(str(PATH))

every_row = pytest.mark.parametrize("row", paper.NETWORKS.values(), ids=lambda row: row.name)
rows_of_the_paper = pytest.mark.parametrize(
  "row", [row for row in paper.NETWORKS.values() if row.table], ids=lambda row: row.name
)


def read(arg):
  return config_lib.from_dict(CONFIG["get_config"](arg).to_dict())


class Trained(NamedTuple):
  losses: list[float]
  before: dict  # parameters by path
  after: dict


@functools.cache  # many rows are the same network once they are tiny
def two_steps(model):
  """Trains the network of a model section, in JSON, for two steps."""
  config = read("resnet50,tiny")
  # Without decay, what changes has had a gradient. A learning rate of 0.1.
  undecayed = dataclasses.replace(config.optim, weight_decay=0.0, base_lr=25.6 / 8)
  config = dataclasses.replace(config, model=json.loads(model), optim=undecayed)
  program = Program(
    Classification(config, num_classes=10), steps_per_epoch=99, devices=jax.devices()[:1]
  )
  rng = np.random.default_rng(0)
  size = config.data.image_size
  batch = {
    "image": rng.integers(0, 256, (config.global_batch_size, size, size, 3), np.uint8),
    "label": rng.integers(0, 10, config.global_batch_size, np.int32),
  }
  state = program.init()
  before, losses = flat(state.params), []
  for _ in range(2):
    state, metrics = program.update(state, batch, np.zeros(1, np.int32))
    losses.append(float(metrics["loss"]))
  return Trained(losses, before, flat(state.params))


def flat(params):
  return {
    jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params)
  }


def tiny_model(row):
  """The model section of a row's tiny configuration."""
  section = dict(read(f"{row.name},tiny").model)
  # With one block in each stage there is no depth left in which these could differ.
  section["name"] = re.sub("resnet1(01|52)", "resnet50", section["name"])
  return section


@rows_of_the_paper
def test_a_tiny_network_trains(row):
  """Two steps change every parameter, but for those that only a third step can reach."""
  losses, before, after = two_steps(json.dumps(tiny_model(row)))
  assert np.isfinite(losses).all()
  assert all(np.isfinite(leaf).all() for leaf in after.values())
  unreached = {path for path in before if np.array_equal(before[path], after[path])}
  late = r"residual_pool\.logits\.norm\.scale"  # behind a batch norm and a convolution of zeros
  if row.options.get("average_steps"):
    late += r"|\.trunk\."  # the first step is average pooling's
  assert all(re.search(late, path) for path in unreached), unreached

  predicting = [path for path in before if re.search(r"logits\.(projection\.)?conv", path)]
  assert len(predicting) == logit_modules(row)
  for path in predicting:
    assert not before[path].any(), path
    assert after[path].any(), path


def logit_modules(row):
  if not row.model.startswith("lip_"):
    return 0
  each = 1 if "densenet" in row.model else 2  # of the places but the stem
  places = row.options.get("lip_stages", ("stem", "c3", "c4", "c5"))
  return sum(1 if place == "stem" else each for place in places)


def structure(name, **options):
  """What makes a network what it is: its graph and the shapes of its variables."""
  graph, state = nnx.split(abstract_model(name, **options))
  return graph, {path: leaf.shape for path, leaf in nnx.to_flat_state(state)}


@functools.cache
def full_size(model):
  return structure(**json.loads(model))


@every_row
def test_a_full_network_is_the_rows(row):
  """The configuration repeats the defaults of `create_model`, and must not change them."""
  model = read(row.name).model
  norm = {"bn_group_size": 64 if "densenet" in row.model else 32}
  written = full_size(json.dumps(model))
  assert written == full_size(json.dumps({"name": row.model, **row.options, **norm}))
  assert model["name"] == row.model


@pytest.mark.parametrize("name", list_models())
def test_a_models_configuration_is_the_model(name):
  model = dict(read(name).model)
  assert model.pop("name") == name
  assert model.get("zero_init_residual", "densenet" in name)
  sizes = {"block_sizes" if "densenet" in name else "stage_sizes": (1, 1, 1, 1)}
  plain = structure(name, bn_group_size=model["bn_group_size"], **sizes)
  assert structure(name, **model, **sizes) == plain


def test_the_recipe():
  """The authors' training script, and section 4.1."""
  config = read("lip_resnet50")
  assert (config.global_batch_size, config.num_epochs, config.label_smoothing) == (256, 90, 0)
  schedule = optim.learning_rate(
    config.optim, global_batch_size=256, steps_per_epoch=10, num_epochs=config.num_epochs
  )
  rates = [float(schedule(step)) for step in (0, 299, 301, 599, 601, 799, 801, 899)]
  np.testing.assert_allclose(rates, [0.1, 0.1, 0.01, 0.01, 0.001, 0.001, 0.0001, 0.0001], rtol=1e-5)
  assert (config.optim.momentum, config.optim.weight_decay) == (0.9, 1e-4)
  assert config.model["bn_group_size"] == 32
  assert read("lip_densenet121").model["bn_group_size"] == 64
  data = config.data
  assert (data.image_size, data.crop_scale, data.eval_resize, data.flip) == (
    224,
    (0.08, 1.0),
    256,
    True,
  )


def test_the_header_says_what_the_paper_says():
  lines = re.findall(
    r"^  ((?:table|further)\S+) +(\S+) +(\S+)  (.*)$", CONFIG["__doc__"], re.MULTILINE
  )

  def figure(row, column):
    value = row.printed.get(column)
    missing = "N/A" if row.printed else "-"
    return missing if value is None else f"{value:.2f}"

  assert lines == [
    (row.name, figure(row, "top1"), figure(row, "top5"), "not yet run")
    for row in paper.NETWORKS.values()
  ]


@pytest.mark.parametrize(
  ("arg", "message"),
  [
    ("resnet51", "unknown network 'resnet51'.* lip_resnet50.*table1_average"),
    ("", "unknown network ''"),
    ("lip_resnet50,small", "unknown size 'small'.*lip_resnet50,tiny"),
    ("lip_resnet50,tiny,tiny", "unknown size 'tiny,tiny'"),
    (",tiny", "unknown network ''"),
  ],
)
def test_arguments_that_are_none(arg, message):
  with pytest.raises(UsageError, match=message):
    CONFIG["get_config"](arg)
