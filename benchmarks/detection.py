"""Images/s of detectors: training steps of configs/coco.py on noise, and torchvision's beside ours.

  python benchmarks/detection.py --set dtype=bfloat16                                  # GPU or TPU
  python benchmarks/detection.py --networks retinanet_lip_resnet50,tiny --seconds 0.1  # CPU
  python benchmarks/detection.py --networks --compare retinanet faster_rcnn --parts    # CPU
  python benchmarks/detection.py --networks --metric 5000

--compare takes detectors with ResNet-50 in preset torchvision, float32; where torch and torchvision
are installed, theirs run beside ours, with the same weights, on the same noise. Inference is from
pixels to boxes, ours with folded batch norms, theirs frozen and in channels_last. The weights are
random, scaled so that the heads' outputs are spread as those of a trained detector: some thousand
scores pass the threshold. Training is forward, backward and SGD on all but stem and first stage,
with eight boxes in an image; ours is the step of train.py. All take turns, in changing order, and
times are medians, from the call to its result.
"""

import argparse
import dataclasses
import functools
import importlib.util
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import lip_jax
from lip_jax.cli import configuration
from lip_jax.data.buckets import parse_buckets
from lip_jax.detection import coco_metric, registry
from lip_jax.detection.inputs import normalize
from lip_jax.distributed import sharding
from lip_jax.errors import UsageError
from lip_jax.tools import step_bench
from lip_jax.training import task as task_lib
from lip_jax.training import train_state
from lip_jax.training.train_step import Program

ROOT = Path(__file__).parents[1]
NETWORKS = ("retinanet_lip_resnet50", "retinanet_resnet50")
THIRD = {"retinanet": "outputs", "faster_rcnn": "proposals"}  # part after the pyramid
MODES = ("inference", "training")
BOXES = 8  # in an image
# The outputs' standard deviations, and what is subtracted from the logits of a RetinaNet, of whose
# pairs of an anchor and a class few pass.
LOGITS, DELTAS, RARE = 1.0, 0.2, 6.5
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)

Calls = dict[str, Callable[[], Any]]  # by the part that it goes up to the end of


def main() -> None:
  """Measures and prints the tables."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--networks", nargs="*", default=NETWORKS, help="rows of configs/coco.py")
  parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="as for train.py")
  parser.add_argument("--seconds", type=float, default=5, help="of each network")
  parser.add_argument("--compare", nargs="+", default=[], choices=registry.list_detectors())
  parser.add_argument("--modes", nargs="+", default=MODES, choices=MODES)
  parser.add_argument(
    "--parts", action="store_true", help="inference up to the end of each part, too"
  )
  parser.add_argument("--image-size", default="800x1344", metavar="HxW", help="multiples of 32")
  parser.add_argument("--batches", type=int, nargs="+", default=[1])
  parser.add_argument("--repeats", type=int, default=5, help="turns that medians are taken of")
  parser.add_argument("--metric", type=int, default=0, help="images, also time COCO's metric")
  parser.add_argument("--json", type=Path, help="also write the figures to this file")
  args = parser.parse_args()
  if min(args.batches) < 1 or args.repeats < 1:
    parser.error("--batches and --repeats must be at least 1")
  try:
    (size,) = parse_buckets([args.image_size])
    rows = _steps(args)
    for name in args.compare:
      for batch in args.batches:
        rows += _compare(name, batch, size, args)
    if args.metric:
      rows.append(_metric(args.metric))
  except UsageError as error:
    sys.exit(f"error: {error}")
  if args.json:
    result = {"device": jax.devices()[0].device_kind, "rows": rows}
    args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def _steps(args: argparse.Namespace) -> list[dict[str, Any]]:
  """Training steps of the networks."""
  if not args.networks:
    return []
  rows = []
  print("| detector | speed |\n|---|---|", flush=True)
  for network in args.networks:
    config = configuration.load(f"{ROOT / 'configs' / 'coco.py'}:{network}", args.set)
    found = step_bench.measure(config, seconds=args.seconds, progress=_say)
    print(f"| {network} | {found} |", flush=True)
    row = {"name": network, "images_per_second": found.rate, "batch": found.batch_size}
    rows.append(row | {"compile_seconds": found.compile_seconds})
  return rows


def _compare(
  name: str, batch: int, size: tuple[int, int], args: argparse.Namespace
) -> list[dict[str, Any]]:
  """A row for each mode."""
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (batch, *size, 3), np.uint8)
  boxes = _boxes(rng, batch, size)
  _say(f"creating {name}")
  model = _create(name, images)
  theirs = _Torchvision(name, model, images, boxes) if _has_torchvision() else None
  rows = []
  for mode in args.modes:
    _say(f"compiling {name}, {mode}, batch {batch}")
    if mode == "training":
      sides = {"ours": _training(name, model, images, boxes)}
    else:
      sides = {"ours": _inference(name, model, images, args.parts)}
    if theirs is not None:
      calls = theirs.training() if mode == "training" else theirs.inference()
      sides["torchvision"] = {part: calls[part] for part in sides["ours"]}
    seconds = _take_turns(sides, args.repeats)
    row = {"name": name, "mode": mode, "image_size": args.image_size, "batch": batch}
    row["seconds"] = seconds
    if mode == "inference":
      row |= _agreement({side: calls["whole"]() for side, calls in sides.items()})
    print(_table(row), flush=True)
    rows.append(row)
  return rows


def _table(row: dict[str, Any]) -> str:
  """Times up to the end of each part, and how far the scores of the detections agree."""
  sides = row["seconds"]
  lines = [
    f"\n{row['name']}, {row['mode']}, {row['image_size']}, batch {row['batch']}\n",
    "| up to the end of | " + " | ".join(f"{side}, ms" for side in sides) + " | ratio |",
    "|---|" + "---|" * (len(sides) + 1),
  ]
  for part, own in sides["ours"].items():
    times = [side[part] for side in sides.values()]
    ratio = f"{own / times[1]:.2f}" if len(times) > 1 else ""
    lines.append(f"| {part} | " + " | ".join(f"{1e3 * x:.0f}" for x in times) + f" | {ratio} |")
  if "boxes" in row:
    found = ", ".join(map(str, row["boxes"].values()))
    lines.append(f"\nboxes in the first image: {found}")
  if "scores_differ" in row:
    lines[-1] += f"; scores differ by at most {row['scores_differ']:.1e}"
  return "\n".join(lines)


def _agreement(scores: dict[str, list[float]]) -> dict[str, Any]:
  """How many boxes are found, and how far their scores, which decrease, are apart."""
  found: dict[str, Any] = {"boxes": {side: len(values) for side, values in scores.items()}}
  if len(scores) > 1 and all(scores.values()):
    found["scores_differ"] = max(abs(a - b) for a, b in zip(*scores.values(), strict=False))
  return found


def _take_turns(sides: dict[str, Calls], repeats: int) -> dict[str, dict[str, float]]:
  """Medians in seconds."""
  calls = [(side, part, call) for side, parts in sides.items() for part, call in parts.items()]
  times: dict[tuple[str, str], list[float]] = {(side, part): [] for side, part, _ in calls}
  for turn in range(repeats + 1):
    _say(f"turn {turn} of {repeats}")
    for side, part, call in random.Random(turn).sample(calls, len(calls)):
      start = time.perf_counter()
      call()
      if turn:  # the first warms up
        times[side, part].append(time.perf_counter() - start)
  return {
    side: {part: statistics.median(times[side, part]) for part in parts}
    for side, parts in sides.items()
  }


def _boxes(rng: np.random.Generator, batch: int, size: tuple[int, int]) -> np.ndarray:
  """[N, 8, 4], corners in pixels; sides from 16 to half of the image's."""
  limits = np.array([size[1], size[0]])
  sides = np.exp(rng.uniform(np.log(16), np.log(limits / 2), (batch, BOXES, 2)))
  corners = rng.uniform(0, 1, sides.shape) * (limits - sides)
  return np.concatenate([corners, corners + sides], axis=2).astype(np.float32)


def _create(name: str, images: np.ndarray) -> Any:
  """A detector whose outputs are spread as a trained one's."""
  options: Any = {"backbone": "resnet50", "preset": "torchvision", "rngs": nnx.Rngs(0)}
  model = lip_jax.create_detector(name, **options)
  model.eval()
  graph, state = nnx.split(model)
  sizes = _sizes(images[:1])

  @jax.jit
  def predict(state, pixels):
    return nnx.merge(graph, state).predictions(normalize(pixels, sizes, MEAN, STD), sizes)

  found = predict(state, images[:1])
  head = model.head if name == "retinanet" else model.box_head
  layers = {"classification": head.class_logits, "boxes": head.box_deltas}
  if name == "faster_rcnn":
    layers |= {"rpn_classification": model.rpn.logits, "rpn_boxes": model.rpn.box_deltas}
  for term, layer in layers.items():
    spread = DELTAS if term.endswith("boxes") else LOGITS
    layer.kernel.set_value(layer.kernel[...] * (spread / found[term].std()))
    rare = name == "retinanet" and term == "classification"
    layer.bias.set_value(jnp.full_like(layer.bias[...], -RARE if rare else 0))
  return model


def _sizes(images: np.ndarray) -> jax.Array:
  return jnp.tile(jnp.asarray(images.shape[1:3], jnp.int32), (len(images), 1))


def _inference(name: str, model: Any, images: np.ndarray, parts: bool) -> Calls:
  """The whole, which gives the scores in the first image, and its beginnings."""
  graph, state = nnx.split(lip_jax.fold_batch_norm(model))
  pixels, sizes = jnp.asarray(images), _sizes(images)

  def compiled(function: Callable[..., Any]) -> Callable[[], Any]:
    def run(state, pixels, sizes):
      return function(nnx.merge(graph, state), normalize(pixels, sizes, MEAN, STD), sizes)

    program = jax.jit(run).lower(state, pixels, sizes).compile()
    return lambda: jax.block_until_ready(program(state, pixels, sizes))

  detect = compiled(lambda model, x, sizes: model.detect(x, sizes))

  def whole() -> list[float]:
    found = detect()
    return np.asarray(found.scores[0])[np.asarray(found.valid[0])].tolist()

  if not parts:
    return {"whole": whole}
  functions: dict[str, Callable[..., Any]] = {
    "backbone": lambda model, x, sizes: model.backbone.features(x),
    "pyramid": lambda model, x, sizes: model.features(x, sizes),
    THIRD[name]: lambda model, x, sizes: getattr(model, THIRD[name])(x, sizes),
  }
  return {part: compiled(function) for part, function in functions.items()} | {"whole": whole}


def _training(name: str, model: Any, images: np.ndarray, boxes: np.ndarray) -> Calls:
  """What `train.py` does with a batch that is on the device."""
  size = "x".join(map(str, images.shape[1:3]))
  settings = [
    "model.preset=torchvision",
    "model.mask_padding=False",
    f"global_batch_size={len(images)}",
    f"eval_batch_size={len(images)}",
    f"data.buckets=('{size}',)",
    "optim.base_lr=1e-9",
    "optim.warmup_lr=1e-9",
    "optim.clip_norm=None",
  ]
  config = configuration.load(f"{ROOT / 'configs' / 'coco.py'}:{name}_resnet50", settings)
  task = task_lib.make(config, num_classes=80)
  program = Program(task, steps_per_epoch=1e6, devices=jax.local_devices()[:1])
  state, stop = program.init(), sharding.StopFlags(program.mesh)(False)
  params, _ = train_state.split(model)
  places = jax.tree.map(lambda leaf: leaf.sharding, state.params)
  state = dataclasses.replace(state, params=jax.device_put(params, places))
  batch = {
    name: np.zeros(shape.shape, shape.dtype)
    for name, shape in task.batch_shapes(len(images), size).items()
  }
  batch |= {"image": images, "size": np.asarray(_sizes(images))}
  batch["boxes"][:, :BOXES], batch["valid"][:, :BOXES] = boxes, True
  batch["labels"][:, :BOXES] = 1
  placed = sharding.put_batch(batch, program.mesh)

  def step() -> None:
    nonlocal state
    state, metrics = program.update(state, placed, stop)
    jax.block_until_ready((state, metrics))

  return {"whole": step}


def _has_torchvision() -> bool:
  missing = [one for one in ("torch", "torchvision") if importlib.util.find_spec(one) is None]
  if missing:
    _say(f"{' and '.join(missing)} not installed: nothing to compare with")
  return not missing


class _Torchvision:
  """torchvision's detector with the weights of ours."""

  def __init__(self, name: str, model: Any, images: np.ndarray, boxes: np.ndarray):
    import torch
    from torchvision.models import detection
    from torchvision.ops.feature_pyramid_network import LastLevelP6P7

    self.torch, self.name = torch, name
    on_gpu = jax.default_backend() == "gpu" and torch.cuda.is_available()
    self.device = "cuda" if on_gpu else "cpu"
    make = detection.backbone_utils.resnet_fpn_backbone
    options = {"backbone_name": "resnet50", "weights": None, "trainable_layers": 3}
    height, width = images.shape[1:3]
    sides = {"min_size": min(height, width), "max_size": max(height, width)}
    if name == "retinanet":
      backbone = make(**options, returned_layers=[2, 3, 4], extra_blocks=LastLevelP6P7(256, 256))
      self.model = detection.RetinaNet(backbone, 91, **sides)
    else:
      self.model = detection.FasterRCNN(make(**options), 91, **sides)
    weights = lip_jax.to_torch_state_dict(model)
    self.model.load_state_dict({key: torch.tensor(value) for key, value in weights.items()})
    self.model.to(self.device, memory_format=torch.channels_last)
    self.images = [
      torch.tensor(image, device=self.device).permute(2, 0, 1) / 255 for image in images
    ]
    self.targets = [
      {
        "boxes": torch.tensor(one, device=self.device),
        "labels": torch.ones(len(one), dtype=torch.int64, device=self.device),
      }
      for one in boxes
    ]

  def inference(self) -> Calls:
    model = self.model.eval()

    def pyramid() -> tuple[Any, Any]:
      images, _ = model.transform(self.images)
      return images, model.backbone(images.tensors)

    def third() -> Any:
      images, features = pyramid()
      if hasattr(model, "rpn"):
        return model.rpn(images, features)
      return model.head(list(features.values()))

    calls: Calls = {
      "backbone": lambda: model.backbone.body(model.transform(self.images)[0].tensors),
      "pyramid": pyramid,
      THIRD[self.name]: third,
      "whole": lambda: model(self.images)[0]["scores"].tolist(),
    }
    return {part: functools.partial(self._run, call) for part, call in calls.items()}

  def _run(self, call: Callable[[], Any]) -> Any:
    with self.torch.inference_mode():
      found = call()
    self._wait()
    return found

  def training(self) -> Calls:
    model = self.model.train()
    learned = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = self.torch.optim.SGD(learned, lr=1e-9, momentum=0.9, weight_decay=1e-4)

    def step() -> None:
      optimizer.zero_grad(set_to_none=True)
      sum(model(self.images, self.targets).values()).backward()
      optimizer.step()
      self._wait()

    return {"whole": step}

  def _wait(self) -> None:
    if self.device == "cuda":
      self.torch.cuda.synchronize()


def _metric(count: int) -> dict[str, Any]:
  """Time of COCO's metric for so many images: a hundred detections near eight boxes in each."""
  rng = np.random.default_rng(0)
  ids = np.arange(count)
  boxes = _boxes(rng, count, (480, 640)).astype(np.float64)
  boxes[..., 2:] -= boxes[..., :2]
  classes = rng.integers(1, 81, (count, BOXES))
  annotations = [
    {"image_id": int(image), "category_id": int(label), "bbox": box.tolist(), "iscrowd": 0}
    | {"id": number + 1, "area": float(box[2] * box[3])}
    for number, (image, label, box) in enumerate(
      zip(ids.repeat(BOXES), classes.ravel(), boxes.reshape(-1, 4), strict=True)
    )
  ]
  truth = {
    "images": [{"id": int(image), "height": 480, "width": 640} for image in ids],
    "categories": [{"id": label, "name": str(label)} for label in range(1, 81)],
    "annotations": annotations,
  }
  which = rng.integers(0, BOXES, (count, 100))
  found = np.take_along_axis(boxes, which[..., None], axis=1)
  found = (found * rng.uniform(0.8, 1.2, found.shape)).reshape(-1, 4)
  results = coco_metric.Results(
    ids.repeat(100),
    np.take_along_axis(classes, which, axis=1).ravel(),
    found,
    rng.uniform(size=len(found)),
  )
  start = time.perf_counter()
  score = coco_metric.score(truth, results)
  seconds = time.perf_counter() - start
  print(f"\nCOCO's metric of {count:,} images by {score.library}: {seconds:.1f} s", flush=True)
  return {"name": "metric", "images": count, "library": score.library, "seconds": seconds}


def _say(message: str) -> None:
  print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
  main()
