"""What ONNX has as one operation and JAX as many: suppression, RoIAlign, deformable convolution.

And what detectors need beside: the best of scores, and entries by their numbers.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from lip_jax.export.onnx_nodes import Equation, Graph, Value, pads, unsupported

_LEAST = np.asarray(np.finfo(np.float32).min)  # above the score of what is no candidate, -inf


def gather(graph: Graph, equation: Equation, x: Value, index: Value) -> str:
  """`x[:, index]` of an index that is the same for all, or of one for each image."""
  numbers = equation.params["dimension_numbers"]
  shape, indices = (atom.aval.shape for atom in equation.invars)
  rank, batched = len(shape), len(numbers.operand_batching_dims)
  axis = numbers.start_index_map[0]
  whole = tuple(
    1 if k in (axis, *numbers.operand_batching_dims) else n for k, n in enumerate(shape)
  )
  usual = (
    (numbers.start_index_map, numbers.collapsed_slice_dims) == ((axis,), (axis,))
    and numbers.operand_batching_dims == numbers.start_indices_batching_dims == (0,) * batched
    and equation.params["slice_sizes"] == whole
    and (axis == 1 or not batched)
  )
  places = [k for k in range(rank + len(indices) - 2) if not axis <= k < axis + len(indices) - 1]
  if batched:
    places = list(range(len(indices) - 1, rank + len(indices) - 3))
  if not usual or rank == 4 or list(numbers.offset_dims) != places:
    raise unsupported(equation, "it takes entries in an unusual way")
  if batched:
    return graph.add("GatherND", x, graph.cast(index, np.int64), batch_dims=1)
  if isinstance(index, str):
    return graph.add("Gather", x, graph.reshape(index, indices[:-1]), axis=axis)
  return graph.add("Gather", x, index.reshape(indices[:-1]), axis=axis)


def top_k(graph: Graph, equation: Equation, x: Value) -> list[Value]:
  """The largest along the last axis and their places; of equal ones the first."""
  if len(equation.invars[0].aval.shape) == 4:
    raise unsupported(equation, "it is of four axes")
  values, places = graph.add_several(2, "TopK", x, graph.integers([equation.params["k"]]), axis=-1)
  return [values, graph.cast(places, np.int32)]


def _nms(
  graph: Graph,
  equation: Equation,
  constants: Mapping[str, Any],
  boxes: Value,
  scores: Value,
  labels: Value,
  usable: Value,
) -> list[Value]:
  """`lip_jax.ops.nms.nms` of each image: suppression by class, then the best of all classes."""
  count, limit = equation.invars[1].aval.shape[-1], constants["limit"]
  none = np.asarray(-np.inf, np.float32)
  if constants["inclusive"]:
    boxes = graph.add("Add", boxes, np.asarray([0, 0, 1, 1], np.float32))
  scores = graph.add("Where", usable, scores, none)
  order = _by_class(labels)
  if order is not None:  # classes become images: none has to look at the boxes of others
    boxes, scores = (graph.add("Gather", array, order.ravel(), axis=1) for array in (boxes, scores))
    boxes = graph.reshape(boxes, [None, order.shape[1], 4])
    scores = graph.reshape(scores, [None, 1, order.shape[1]])
  else:
    many = graph.add("ReduceMax", graph.cast(labels, np.int64), keepdims=0)
    many = graph.add("Add", many, np.asarray(1, np.int64))
    classes = graph.add("Range", np.asarray(0, np.int64), many, np.asarray(1, np.int64))
    classes = graph.add("Unsqueeze", classes, graph.integers([1]))
    one_of = graph.add("Unsqueeze", graph.cast(labels, np.int64), graph.integers([-2]))
    scores = graph.add("Unsqueeze", scores, graph.integers([1]))
    scores = graph.add("Where", graph.add("Equal", one_of, classes), scores, none)
  found = graph.add(
    "NonMaxSuppression",
    boxes,
    scores,
    graph.integers([limit]),
    np.asarray([constants["threshold"]], np.float32),
    np.asarray([_LEAST], np.float32),
  )
  kept = graph.add("Expand", none, graph.add("Shape", scores))
  kept = graph.add("ScatterND", kept, found, graph.add("GatherND", scores, found))
  kept = graph.reshape(kept, [None, count]) if order is not None else _flat(graph, kept)
  best, place = graph.add_several(2, "TopK", kept, graph.integers([min(limit, count)]), axis=-1)
  if order is not None:
    index = graph.add("Gather", order.ravel(), place)
  else:
    index = graph.add("Mod", place, np.asarray(count, np.int64))
  valid = graph.add("Greater", best, _LEAST)
  index = graph.cast(graph.add("Where", valid, index, np.asarray(0, np.int64)), np.int32)
  more = graph.integers([0, 0, 0, max(0, limit - count)])
  valid = graph.add("Pad", graph.cast(valid, np.int32), more)
  return [graph.add("Pad", index, more), graph.cast(valid, np.bool_)]


def _by_class(labels: Value) -> np.ndarray | None:
  """Numbers of the candidates of each class, [K, P / K], if that is known and all have as many."""
  if isinstance(labels, str):
    return None
  _, counts = np.unique(labels, return_counts=True)
  if len(set(counts)) != 1:
    return None
  return np.argsort(labels, kind="stable").reshape(len(counts), -1)


def _flat(graph: Graph, x: str) -> str:
  """[N, ...] -> [N, -1]."""
  return graph.add("Reshape", x, graph.integers([0, -1]))


def _roi_align(
  graph: Graph, equation: Equation, constants: Mapping[str, Any], *inputs: Value
) -> list[Value]:
  """`lip_jax.ops.roi_align.multilevel_roi_align` of each image, [N, R, h, w, C]."""
  *maps, boxes, levels, extents = inputs
  shape, strides = equation.outvars[0].aval.shape, constants["strides"]
  batch, regions, height, width, channels = shape
  many = graph.add("Squeeze", graph.sizes([batch]))
  image = graph.add("Range", np.asarray(0, np.int64), many, np.asarray(1, np.int64))
  image = graph.add("Unsqueeze", image, graph.integers([1]))
  image = graph.reshape(graph.expand(image, [batch, regions]), [None])
  boxes, levels = graph.reshape(boxes, [None, 4]), graph.reshape(levels, [None])
  mode = constants["mode"]
  # A shift of half a cell: ONNX has that only without a least width of a region.
  half = "output_half_pixel" if mode == "unaligned" else "half_pixel"
  pooled = graph.expand(np.zeros((), np.float32), [batch * regions, channels, height, width])
  for number, (features, stride) in enumerate(zip(maps, strides, strict=True)):
    here = graph.add("NonZero", graph.add("Equal", levels, np.asarray(number, np.int32)))
    here = graph.reshape(here, [None])
    found = graph.add(
      "RoiAlign",
      _with_edges(graph, features, extents, number, equation),
      graph.add("Add", graph.add("Gather", boxes, here), _shift(mode, stride)),
      graph.add("Gather", image, here),
      output_height=height,
      output_width=width,
      sampling_ratio=constants["samples"],
      spatial_scale=1 / stride,
      coordinate_transformation_mode=half,
    )
    pooled = graph.add("ScatterND", pooled, graph.reshape(here, [None, 1]), found)
  pooled = graph.add("Transpose", pooled, perm=(0, 2, 3, 1))
  return [graph.cast(graph.reshape(pooled, shape), equation.outvars[0].aval.dtype)]


def _shift(mode: str, stride: float) -> np.ndarray:
  """What boxes are moved by so that ONNX reads where `mode` does."""
  half = stride / 2 if mode == "legacy" else 0
  end = half + (1 if mode == "legacy" else 0)  # x2 and y2 are last pixels
  return np.asarray([half, half, end, end], np.float32)


def _with_edges(
  graph: Graph, features: Value, extents: Value, level: int, equation: Equation
) -> Value:
  """A level's features [N, C, H, W], where an image's extent ends with one more row and column.

  A sample between the last and the next, which is padding, is of the last.
  """
  shape = equation.invars[level].aval.shape
  features = graph.cast(features, np.float32)
  for axis in (1, 2):
    ends = graph.add("Gather", extents, np.asarray(level), axis=1)
    ends = graph.add("Gather", ends, np.asarray(axis - 1), axis=1)
    cells = np.arange(shape[axis], dtype=np.int32)
    before = graph.add("Gather", features, np.maximum(cells - 1, 0), axis=axis + 1)
    cells = cells.reshape(-1, *[1] * (2 - axis))
    after = graph.add("Equal", graph.reshape(ends, [None, 1, 1, 1]), graph.constant(cells))
    features = graph.add("Where", after, before, features)
  return features


def _deform_conv(
  graph: Graph,
  equation: Equation,
  constants: Mapping[str, Any],
  x: Value,
  offset: Value,
  kernel: Value,
) -> list[Value]:
  """`lip_jax.ops.deform_conv.deform_conv`."""
  if isinstance(kernel, str):
    raise unsupported(equation, "its kernel depends on the images")
  return [
    graph.add(
      "DeformConv",
      x,
      graph.constant(kernel.transpose(3, 2, 0, 1)),
      offset,
      kernel_shape=kernel.shape[:2],
      strides=[constants["stride"]] * 2,
      pads=pads([[constants["padding"]] * 2] * 2),
      group=equation.invars[0].aval.shape[3] // kernel.shape[2],
    )
  ]


# By kind of `lip_jax.ops.whole.call`, with its constants.
WHOLE: dict[str, Callable[..., list[Value]]] = {
  "deform_conv": _deform_conv,
  "nms": _nms,
  "roi_align": _roi_align,
}
