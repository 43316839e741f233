"""The run of a detector with arbitrary weights, as small as it can be, without training."""

import json

from fixture_runs import with_weights, write_checkpoints

from lip_jax.detection import registry
from lip_jax.detection.config import Config, Data
from lip_jax.models.description import flat_variables

MODEL = {
  "name": "retinanet",
  "backbone": "lip_resnet_small",
  "lip_stages": ["c4"],
  "logit": "projection",
  "width": 4,
  "fpn_channels": 8,
  "head_convs": 0,
}
_OF_TWO_STAGES = {"fc_features": 16, "num_proposals": 50, "region_samples": 20}
# So that scores differ and are not 1, and boxes differ.
_LOUD = {
  "head.class_logits.kernel": 0.05,
  "head.box_deltas.kernel": 0.1,
  "rpn.box_deltas.kernel": 0.1,
  "box_head.class_logits.kernel": 0.1,
  "box_head.box_deltas.kernel": 0.1,
}


def describe(name="retinanet", **changes):
  """What config.model is."""
  model = {**MODEL, "name": name}
  if name == "faster_rcnn":
    del model["head_convs"]
    model |= _OF_TWO_STAGES
  return model | changes


def make_detector(num_classes=2, **changes):
  model = describe(**changes)
  detector = with_weights(registry.abstract_detector(num_classes=num_classes, **model))
  for name, variable in flat_variables(detector).items():
    variable.set_value(variable[...] * _LOUD.get(name, 1))
  return detector


def write(workdir, dataset, names=("bird", "cat"), ids=(7, 200), **changes):
  data = Data(
    dataset=dataset, train_split="all", validation_split="all", short_side=48, long_side=64,
    buckets=("64x64",), num_threads=2, mean=(128.0,) * 3, std=(64.0,) * 3,
  )  # fmt: skip
  config = Config(model=describe(**changes), data=data, eval_batch_size=8)
  workdir.mkdir()
  (workdir / "classes.json").write_text(json.dumps({"class_names": names}))
  (workdir / "categories.json").write_text(json.dumps({"category_ids": ids}))
  metrics = {"AP": 0.25, "count": 9}
  detector = make_detector(len(names), **changes)
  write_checkpoints(workdir, config, {4: detector}, {4: metrics}, "AP")
