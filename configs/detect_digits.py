"""The embedded detector: a small LIP-RetinaNet finds digits of 8 to 34 px among clutter, 96 px.

Command:   python train.py --config=configs/detect_digits.py --workdir=runs/detect_digits
Data:      cluttered_digits/detect_small, made on first use
Hardware:  2 CPU cores
Expected:  64.6 AP, of small digits 52.5 (one seed, measured), in 10 minutes beside other work

Behind the file's name, ":faster_rcnn" is a small Faster R-CNN with the same backbone: 75.2 AP, of
small digits 69.0 (one seed, measured), in 14 minutes beside other work.
The backbone that pools otherwise: --config.model.backbone=resnet_small --config.model.pool=strided
(or average, max, soft).
"""

from ml_collections import ConfigDict


def get_config(detector: str = "retinanet") -> ConfigDict:
  """Configuration of the embedded detector, "retinanet" or "faster_rcnn"."""
  config = ConfigDict()
  config.task = "detection"
  config.num_epochs = 2.0
  config.global_batch_size = 16
  config.eval_batch_size = 50

  config.model = ConfigDict()
  config.model.name = detector
  config.model.backbone = "lip_resnet_small"
  config.model.width = 8
  config.model.logit_width = 8
  config.model.fpn_channels = 32
  # Anchors from 8 px on.
  if detector == "faster_rcnn":
    config.model.update({"anchor_scale": 4.0, "fc_features": 128})
    config.model.update({"num_proposals": 200, "anchor_samples": 128, "region_samples": 64})
  else:
    config.model.update({"anchor_scale": 2.0, "head_convs": 1})
  config.model.bn_frozen = False  # from fresh weights
  config.model.bn_group_size = 16

  config.data = ConfigDict()
  config.data.dataset = "cluttered_digits/detect_small"
  config.data.short_side = 96
  config.data.long_side = 96
  config.data.buckets = ("96x96",)
  config.data.max_boxes = 12
  config.data.flip = False  # a mirrored digit is another shape
  config.data.mean = (128.0, 128.0, 128.0)
  config.data.std = (64.0, 64.0, 64.0)
  config.data.num_threads = 2

  config.optim = ConfigDict()
  config.optim.optimizer = "adamw"
  config.optim.base_lr = 2e-3
  config.optim.base_batch_size = 16
  config.optim.schedule = "cosine"
  config.optim.warmup_epochs = 0.1
  config.optim.clip_norm = 35.0

  config.log_every_steps = 20
  config.checkpoint_every_steps = 200
  return config
