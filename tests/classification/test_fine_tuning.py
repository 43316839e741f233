import dataclasses
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixture_runs import CLASSES, NAME, OPTIONS, SIZE, make_model

from lip_jax.classification import fine_tuning
from lip_jax.classification.task import Classification
from lip_jax.errors import UsageError
from lip_jax.export import folders
from lip_jax.models.description import flat_variables
from lip_jax.training import config as config_lib
from lip_jax.training import train_state
from lip_jax.training.train_step import Program

CONFIG = Path(__file__).parents[2] / "configs" / "cluttered_digits.py"


@pytest.fixture(scope="module")
def network(tmp_path_factory):
  """An exported network of three classes: (folder, its arrays)."""
  folder = tmp_path_factory.mktemp("network") / "exported"
  config = {
    "model": {"name": NAME, **OPTIONS},
    "num_classes": 3,
    "class_names": CLASSES,
    "preprocess": {"image_size": SIZE, "resize": SIZE, "mean": [0.0] * 3, "std": [64.0] * 3},
  }
  model = make_model()
  folders.save(folder, model, config)
  return folder, {key: np.asarray(v[...]) for key, v in flat_variables(model).items()}


@pytest.fixture(scope="module")
def first_state():
  """(configuration, first state) of a run of two classes and two batch-norm groups a step."""
  values = runpy.run_path(str(CONFIG))["get_config"]().to_dict()
  values["model"].update(name=NAME, **OPTIONS)
  values["data"]["image_size"] = SIZE
  config = config_lib.from_dict(values | {"global_batch_size": 8, "eval_batch_size": 8})
  program = Program(Classification(config, num_classes=2), steps_per_epoch=1.0)
  zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype, device=a.sharding), program.state)
  return config, zeros


def arrays_of(state):
  """Arrays by name, of the statistics those of the last group."""
  last = jax.tree.map(lambda array: array[-1], state.batch_stats)
  return {
    jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(array)
    for tree in (state.params, last)
    for path, array in jax.tree_util.tree_leaves_with_path(tree)
  }


def test_all_but_the_classifier_is_taken_over(network, first_state, caplog):
  path, theirs = network
  config, before = first_state
  with caplog.at_level("INFO", "lip_jax"):
    state = fine_tuning.start_from(path, before, config, ["cat", "dog"])
  ours = arrays_of(state)
  assert sorted(ours) == sorted(theirs)
  for name, array in theirs.items():
    if not name.startswith("fc."):
      np.testing.assert_array_equal(ours[name], array, err_msg=name)
  np.testing.assert_array_equal(ours["fc.kernel"], arrays_of(before)["fc.kernel"])
  same = jax.tree.map(lambda new, old: new.sharding == old.sharding, state, before)
  assert jax.tree.all(same)
  assert "a new one, of 2 classes" in caplog.text
  assert "was trained with data.mean [0.0, 0.0, 0.0]" in caplog.text
  assert "data.std" not in caplog.text


@pytest.mark.parametrize(("classes", "kept"), [(CLASSES, True), (["ant", "bee", "dog"], False)])
def test_the_classifier_is_kept_for_the_same_classes(network, first_state, classes, kept):
  path, theirs = network
  config, before = first_state
  fc = {"kernel": jnp.zeros((64, 3)), "bias": jnp.zeros(3)}
  fc = jax.device_put(fc, before.params["fc"]["bias"].sharding)
  before = before.replace(params=before.params | {"fc": fc})
  ours = arrays_of(fine_tuning.start_from(path, before, config, classes))
  assert (ours["fc.kernel"] == theirs["fc.kernel"]).all() == kept


def test_weights_of_another_network_are_refused(network, first_state):
  config, before = first_state
  params, _ = train_state.split(make_model())
  params["conv1"]["kernel"] = params["conv1"]["kernel"][..., :1]
  other = dataclasses.replace(config, model={"name": "resnet_small"})
  with pytest.raises(UsageError, match=r"not those of config.model .*shape of conv1.kernel"):
    fine_tuning.start_from(network[0], before.replace(params=params), other, ["cat", "dog"])
