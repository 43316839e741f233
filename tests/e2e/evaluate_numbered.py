"""One process of an evaluation: a linear model on the data set of fixture_numbered.

  python evaluate_numbered.py PORT PROCESS_INDEX PROCESS_COUNT FOLDER...

Prints what the evaluation of each folder, out of memory and out of its files, returned or said.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import fixture_numbered
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lip_jax.classification.config import Data
from lip_jax.classification.evaluation import Evaluator
from lip_jax.distributed import sharding
from lip_jax.errors import UsageError
from lip_jax.training import train_state


class Linear(nnx.Module):
  """Small whole numbers, divided by a power of two: no sum in it is rounded, in whatever order."""

  def __init__(self, num_classes):
    values = np.random.default_rng(0).integers(-3, 4, (8 * 8 * 3, num_classes))
    self.weights = nnx.Param(jnp.asarray(values / 1024, jnp.float32))

  def __call__(self, images):
    return images.reshape(len(images), -1) @ self.weights[...]


def main(port, index, count, *folders):
  if int(count) > 1:
    jax.distributed.initialize(f"127.0.0.1:{port}", int(count), int(index))
  assert jax.process_count() == int(count)
  results = [
    evaluate(getattr(fixture_numbered, f"open_{kind}")(folder))
    for folder in folders
    for kind in ("memory", "tfrecord")
  ]
  print(json.dumps(results))


def evaluate(source):
  data = Data(
    dataset="none",
    image_size=8,
    crop_scale=None,
    eval_resize=9,
    mean=(128.0, 120.0, 110.0),
    std=(1.0, 2.0, 4.0),
    num_threads=1,
  )
  model = Linear(source.num_classes)
  try:
    evaluator = Evaluator(data, 64, source, nnx.graphdef(model), sharding.make_mesh())
    return evaluator(*train_state.split(model))
  except UsageError as error:
    return str(error)


main(*sys.argv[1:])
