"""One process of a detector's evaluation: 4 devices in all, on data sets of fixture_boxes.

  python evaluate_boxes.py PORT PROCESS_INDEX PROCESS_COUNT DATASET...

Prints of the evaluation of each data set: how much it found, in how many images, what it returned,
and what once the last process was asked to stop; or what it said.
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lip_jax.data.boxes import open_boxes
from lip_jax.detection.config import Data
from lip_jax.detection.evaluation import Evaluator
from lip_jax.detection.registry import abstract_detector
from lip_jax.distributed import sharding
from lip_jax.errors import UsageError
from lip_jax.models import description
from lip_jax.training import train_state


def main(port, index, count, *datasets):
  index, count = int(index), int(count)
  os.environ["XLA_FLAGS"] += f" --xla_force_host_platform_device_count={4 // count}"
  if count > 1:
    jax.distributed.initialize(f"127.0.0.1:{port}", count, index)
  assert (jax.process_count(), jax.device_count()) == (count, 4)
  detector = untrained()
  detector.eval()
  print(json.dumps([evaluate(detector, dataset, index == count - 1) for dataset in datasets]))


def untrained():
  """A detector that finds as much as it may, with scores that rounding does not swap."""
  detector = abstract_detector(
    "retinanet", backbone="resnet_small", num_classes=2, width=4, fpn_channels=8, head_convs=0
  )
  rng = np.random.default_rng(0)
  for name, variable in description.flat_variables(detector).items():
    value = np.full(variable.shape, float(name.endswith((".scale", ".var"))))
    if len(variable.shape) > 1:
      value = rng.normal(0, 0.1, variable.shape)
    variable.set_value(jnp.asarray(value, variable.dtype))
  return detector


def evaluate(detector, dataset, asked_to_stop):
  data = Data(
    dataset=dataset,
    train_split="all",
    validation_split="all",
    short_side=48,
    long_side=64,
    buckets=("64x64", "32x64"),
    num_threads=2,
  )
  mesh = sharding.make_mesh()
  weights = jax.device_put(jax.device_get(train_state.split(detector)), sharding.replicated(mesh))
  source, graph = open_boxes(dataset, "all"), nnx.graphdef(detector)
  evaluator = Evaluator(data, 8, source, graph, mesh, preset=detector.preset)
  try:
    found = evaluator.detect(*weights)
    stopped = evaluator(*weights, lambda: asked_to_stop)
    seen = len(set(found.image_ids.tolist()))
    return len(found.scores), seen, evaluator(*weights), stopped
  except UsageError as error:
    return str(error)


main(*sys.argv[1:])
