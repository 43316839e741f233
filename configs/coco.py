r"""Detectors of the paper's tables 5 and 6 on COCO, with its recipe: one command per row.

Command:   python train.py --config=configs/coco.py:faster_rcnn_lip_resnet50 \
             --weights=RUN --workdir=runs/table5_faster_rcnn_lip_resnet50
           RUN is a classifier with the same backbone: a run of configs/imagenet.py, an exported
           folder, or the authors' .pth. With ",tiny" behind the argument all is shrunk to a few
           steps on the embedded data, to see that a row runs at all.
Data:      coco/2017 as TFDS makes it (docs/data.md), or
           --config.data.dataset='coco:DIR/annotations/instances_{split}2017.json@DIR/{split}2017'
           with --config.data.validation_split=val
Hardware:  not yet run here
Expected:  the paper's AP, AP50, AP75, and AP of small, medium and large objects, in percent, on
           COCO's 5,000 validation images (table 5), and on its test-dev images (table 6)

  argument                        AP  AP50  AP75  small  medium  large  our result
  faster_rcnn_resnet50          37.7  59.3  41.1   21.9    41.5   48.7  not yet run
  faster_rcnn_lip_resnet50      39.2  61.2  42.5   24.0    43.1   50.3  not yet run
  faster_rcnn_resnet101         39.4  60.7  43.0   22.1    43.6   52.1  not yet run
  faster_rcnn_lip_resnet101     41.7  63.6  45.6   25.2    45.8   54.0  not yet run
    test-dev                    42.0  64.3  45.8   24.7    45.2   52.3  not yet run
  faster_rcnn_lip_resnet101_md     -     -     -      -       -      -  not yet run
    test-dev                    43.9  65.7  48.1   25.4    46.7   56.3  not yet run
  faster_rcnn_resnext101        40.7  62.1  44.5   23.0    44.5   53.6  not yet run
  retinanet_resnet50            36.6  56.6  38.9   19.6    40.3   48.9  not yet run
  retinanet_lip_resnet50        38.0  58.8  40.5   22.6    41.5   49.9  not yet run
  retinanet_resnet101           38.1  58.1  40.6   20.2    41.8   50.8  not yet run
  retinanet_lip_resnet101          -     -     -      -       -      -  not yet run

resnext101 is ResNeXt-101-64x4d; lip_resnet101_md has deformable layers: which ones is our choice,
as the paper does not say.

Recipe (mmdetection 0.6, which the paper trained with; "2x"): 16 images a step, learning rate 0.02
(RetinaNet: 0.01), reached in 500 steps from a third of it and divided by 10 after 16 and 22 of 24
epochs; gradients clipped at a norm of 35; stem and first stage frozen, batch-norm statistics
everywhere. With another config.global_batch_size the learning rate is scaled from 16 images.
"""

from ml_collections import ConfigDict

from lip_jax.errors import UsageError

_RATES = {"faster_rcnn": 0.02, "retinanet": 0.01}
_BACKBONES = {
  "retinanet": ("resnet50", "lip_resnet50", "resnet101", "lip_resnet101"),
  "faster_rcnn": (
    *("resnet50", "lip_resnet50", "resnet101", "lip_resnet101"),
    *("resnext101_64x4d", "lip_resnet101_md"),
  ),
}
# By argument the detector and its backbone.
_ROWS = {
  f"{detector}_{backbone.removesuffix('_64x4d')}": (detector, backbone)
  for detector, backbones in _BACKBONES.items()
  for backbone in backbones
}
_STEPS_PER_EPOCH = 7330  # of 117,266 images


def get_config(arg: str = "faster_rcnn_lip_resnet50") -> ConfigDict:
  """Configuration of a row.

  Args:
    arg: of the table above; and ",tiny".

  Raises:
    UsageError: anything else, with what there is.
  """
  name, _, size = arg.partition(",")
  if name not in _ROWS or size not in ("", "tiny"):
    raise UsageError(
      f"unknown detector {arg!r}; choose one of {', '.join(_ROWS)}; with ,tiny behind it "
      "for a trial"
    )
  detector, backbone = _ROWS[name]
  config = ConfigDict()
  config.task = "detection"
  config.num_epochs = 24.0
  config.global_batch_size = 16
  config.eval_batch_size = 16
  config.frozen_stages = ("stem", "c2")
  config.model = ConfigDict({"name": detector, "backbone": backbone, "preset": "mmdet1"})
  config.data = ConfigDict({"dataset": "coco/2017"})

  config.optim = ConfigDict()
  config.optim.base_lr = _RATES[detector]
  config.optim.base_batch_size = 16
  config.optim.step_epochs = (16.0, 22.0)
  config.optim.warmup_epochs = 500 / _STEPS_PER_EPOCH
  config.optim.warmup_lr = _RATES[detector] / 3
  config.optim.clip_norm = 35.0
  config.picture_every_epochs = 1.0
  if size:
    _shrink(config)
  return config


def _shrink(config: ConfigDict) -> None:
  """What is left is the kind of network: a few steps of it in a minute."""
  config.num_epochs = 1.0
  config.global_batch_size = 8
  config.eval_batch_size = 8
  config.log_every_steps = 1
  config.model.update({"width": 8, "fpn_channels": 8, "stage_sizes": (1, 1, 1, 1)})
  if config.model.backbone.startswith("resnext"):
    config.model.update({"groups": 2, "group_width": 4})
  if config.model.name == "retinanet":
    config.model.head_convs = 1
  else:
    config.model.update({"fc_features": 16, "num_proposals": 100, "region_samples": 32})
  config.data.update(
    {
      "dataset": "cluttered_digits/detect_small",
      "train_split": "train[:32]",
      "validation_split": "validation[:13]",
      "short_side": 96,
      "long_side": 96,
      "buckets": ("96x96",),
      "num_threads": 2,
    }
  )
