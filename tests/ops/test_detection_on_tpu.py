"""Detection's operators, batched, are compiled for a TPU that is not there."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

SCRIPT = """
import functools
import jax
import jax.numpy as jnp
from jax.experimental import topologies
from lip_jax.detection.anchors import ANCHORS
from lip_jax.detection.matching import RULES, match
from lip_jax.detection.sampling import sample
from lip_jax.ops import boxes, losses
from lip_jax.ops.deform_conv import deform_conv
from lip_jax.ops.nms import nms
from lip_jax.ops.roi_align import multilevel_roi_align, roi_levels

device = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[0]
sharding = jax.sharding.SingleDeviceSharding(device)
image, grids = (128, 160), [(32, 40), (16, 20), (8, 10), (4, 5), (2, 3)]
anchors = ANCHORS["rpn", "mmdet1"]
count = 3 * sum(rows * columns for rows, columns in grids)


def compile(function, *arguments):
  shapes = (jax.ShapeDtypeStruct((2, *shape), dtype, sharding=sharding)
            for shape, dtype in arguments)
  jax.jit(jax.vmap(function)).lower(*shapes).compile()
  print(function.__name__, flush=True)


def suppress(boxes, scores, labels, valid):
  return nms(boxes, scores, labels, threshold=0.5, limit=100, valid=valid)


def targets(gts, valid, size, priorities):
  candidates = jnp.asarray(anchors.boxes(image, grids))
  found = match(
    candidates, gts, valid, rule=RULES["rpn", "mmdet1"], usable=anchors.usable(size, image, grids)
  )
  chosen = sample(found, priorities, size=256, positive_fraction=0.5)
  picked = chosen.indices
  return chosen, boxes.encode(candidates[picked], gts[found[picked]], stds=(1, 1, 1, 1))


def regions(maps, rois):
  def total(maps):
    levels = roi_levels(rois, inclusive=True)
    y = multilevel_roi_align(maps, rois, levels, strides=(4, 8), mode="legacy", implementation=form)
    return jnp.square(y.astype(jnp.float32)).sum()

  return jax.grad(total)(maps)


def deformable(x, offset, kernel):
  total = lambda *inputs: jnp.square(deform_conv(*inputs).astype(jnp.float32)).sum()
  return jax.grad(total, (0, 1, 2))(x[None], offset[None], kernel)


def loss(logits, found, deltas):
  total = lambda x, d: losses.sigmoid_focal(x, found).sum() + losses.smooth_l1(d, beta=0.11).sum()
  return jax.grad(total, (0, 1))(logits, deltas)


f32, bf16 = jnp.float32, jnp.bfloat16
compile(suppress, ((600, 4), f32), ((600,), f32), ((600,), jnp.int32), ((600,), bool))
compile(targets, ((100, 4), f32), ((100,), bool), ((2,), jnp.int32), ((count,), f32))
compile(loss, ((count, 8), f32), ((count, 8), bool), ((count, 4), f32))
compile(deformable, ((16, 20, 32), bf16), ((16, 20, 18), f32), ((3, 3, 32, 8), bf16))
shapes = [jax.ShapeDtypeStruct((2, *grid, 32), bf16, sharding=sharding) for grid in grids[:2]]
rois = jax.ShapeDtypeStruct((2, 64, 4), f32, sharding=sharding)
for form in ("auto", "gather"):
  jax.clear_caches()
  lowered = jax.jit(jax.vmap(regions)).lower(shapes, rois)
  lowered.compile()
  print("regions", form, "gather" in lowered.as_text(), flush=True)
"""


@pytest.mark.slow
@pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None, reason="libtpu, of the tpu extra, is not installed"
)
def test_every_operator_compiles():
  """In a process of its own, which libtpu changes."""
  variables = {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_SKIP_MDS_QUERY": "1", "XLA_FLAGS": ""}
  done = subprocess.run(
    [sys.executable, "-c", SCRIPT],
    capture_output=True,
    text=True,
    env={**os.environ, **variables, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"},
  )
  assert done.returncode == 0, done.stderr
  lines = done.stdout.splitlines()
  assert lines[:4] == ["suppress", "targets", "loss", "deformable"]
  # Products with one-hot matrices are what TPUs get.
  assert lines[4:] == ["regions auto False", "regions gather True"]
