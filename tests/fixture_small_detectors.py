"""Small detectors with arbitrary weights, images of noise and boxes for them."""

import functools

import jax
import numpy as np
from fixture_runs import with_weights
from flax import nnx

from lip_jax.detection.registry import abstract_detector
from lip_jax.models.torch_names import torch_names

_SMALL = {"num_classes": 3, "width": 8, "fpn_channels": 16}
SMALL = {
  "retinanet": {**_SMALL, "head_convs": 1},
  "faster_rcnn": {**_SMALL, "fc_features": 32, "num_proposals": 50, "region_samples": 20},
}


@functools.cache
def create(name="retinanet", backbone="lip_resnet_small", **options):
  """(structure, arrays) of a small detector with arbitrary weights, which finds something."""
  model = with_weights(
    abstract_detector(name, backbone=backbone, **{"mask_padding": None, **SMALL[name], **options})
  )
  for key, variable in torch_names(model):
    if "retina_cls.bias" in key or "cls_logits.bias" in key:
      variable.set_value(variable[...] - 3)
    if any(part in key for part in ("retina_reg", "bbox_reg", "rpn_reg", "fc_reg", "bbox_pred")):
      variable.set_value(variable[...] * 0.1)
  return nnx.split(model)


@functools.partial(jax.jit, static_argnums=0)
def detect(graph, state, images, sizes):
  return nnx.merge(graph, state, copy=True).detect(images, sizes)


@functools.partial(jax.jit, static_argnums=0)
def losses(graph, state, images, sizes, targets):
  return nnx.merge(graph, state, copy=True).losses(images, sizes, targets)


@functools.partial(jax.jit, static_argnums=0)
def gradients(graph, state, images, sizes, targets):
  """(gradients of the sum of the losses by the parameters, losses)."""
  graphdef, params, others = nnx.split(nnx.merge(graph, state, copy=True), nnx.Param, ...)

  def total(params):
    found = nnx.merge(graphdef, params, others, copy=True).losses(images, sizes, targets)
    return sum(found.values()), found

  return jax.grad(total, has_aux=True)(params)


def hard_batch():
  """(images, sizes, targets): all that may be unusual about boxes and sizes."""
  many = np.random.default_rng(0).uniform(0, 40, (150, 4))
  many[:, 2:] += many[:, :2]
  gts = targets(
    [],
    [[3, 4, 30, 40]],  # a crowd
    [[5, 5, 5, 5], [20, 20, 10, 30], [0, 0, 0.5, 0.5], [90, 90, 95, 95], [0, 0, np.inf, 9]],
    [],  # only padding
    many,
    [[0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 1, 1]],
    room=150,
    crowd=(1,),
  )
  gts["labels"][5, 1:3] = 99, -1  # of no class
  sizes = [(64, 64), (60, 64), (50, 60), (0, 0), (64, 50), (1, 1)]
  return *images(sizes, 64, 64), gts


def images(sizes, height, width):
  """Images of these sizes, each of its own noise, in a batch of that size."""
  out = np.zeros((len(sizes), height, width, 3), np.float32)
  for image, (rows, columns) in zip(out, sizes, strict=True):
    rng = np.random.default_rng(1000 * rows + columns)
    image[:rows, :columns] = rng.normal(size=(rows, columns, 3))
  return out, np.array(sizes)


def targets(*boxes, room=4, crowd=()):
  """Of one image for each argument: a list of boxes."""
  out = {
    "boxes": np.zeros((len(boxes), room, 4), np.float32),
    "labels": np.zeros((len(boxes), room), np.int32),
    "valid": np.zeros((len(boxes), room), bool),
    "crowd": np.zeros((len(boxes), room), bool),
  }
  for k, found in enumerate(boxes):
    out["boxes"][k, : len(found)] = np.reshape(found, (-1, 4))
    out["labels"][k, : len(found)] = np.arange(len(found)) % 3
    out["valid"][k, : len(found)] = True
    out["crowd"][k] = k in crowd
  return out
