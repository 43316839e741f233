"""Names of detectors' weights in the files of torchvision and of mmdetection 0.6."""

import re
from collections.abc import Iterator

from flax import nnx

from lip_jax.detection.retinanet import RetinaNet
from lip_jax.models import torch_names

# Our path, dots between its parts -> theirs.
_RULES = {
  "torchvision": (
    (r"^backbone\.", "backbone.body."),
    (r"^fpn\.laterals\.(\d+)\.", r"backbone.fpn.inner_blocks.\1.0."),
    (r"^fpn\.outputs\.(\d+)\.", r"backbone.fpn.layer_blocks.\1.0."),
    (r"^coarser\.", "backbone.fpn.extra_blocks."),
    (r"^head\.class_convs\.(\d+)\.", r"head.classification_head.conv.\1.0."),
    (r"^head\.class_logits\.", "head.classification_head.cls_logits."),
    (r"^head\.box_convs\.(\d+)\.", r"head.regression_head.conv.\1.0."),
    (r"^head\.box_deltas\.", "head.regression_head.bbox_reg."),
  ),
  "mmdet1": (
    (r"^fpn\.laterals\.(\d+)\.", r"neck.lateral_convs.\1.conv."),
    (r"^fpn\.outputs\.(\d+)\.", r"neck.fpn_convs.\1.conv."),
    (r"^coarser\.p6\.", "neck.fpn_convs.3.conv."),
    (r"^coarser\.p7\.", "neck.fpn_convs.4.conv."),
    (r"^head\.class_convs\.", "bbox_head.cls_convs."),
    (r"^head\.class_logits\.", "bbox_head.retina_cls."),
    (r"^head\.box_convs\.", "bbox_head.reg_convs."),
    (r"^head\.box_deltas\.", "bbox_head.retina_reg."),
  ),
}
# Other spellings: torchvision's published files are older than its names, in which a convolution
# became the first part of a sequence; a tower counted its ReLUs, too.
_SPELLINGS = {
  "torchvision": (
    (r"(fpn\.(?:inner|layer)_blocks\.\d+)\.(weight|bias)$", r"\1.0.\2"),
    (
      r"(_head\.conv)\.(\d+)\.(weight|bias)$",
      lambda match: f"{match[1]}.{int(match[2]) // 2}.0.{match[3]}",
    ),
  ),
  "mmdet1": ((r"(_head\.(?:cls|reg)_convs\.\d+)\.conv\.", r"\1."),),
}


@torch_names.torch_names.register
def _names(detector: RetinaNet) -> Iterator[tuple[str, nnx.Variable]]:
  rules = _RULES[detector.preset.name]
  backbone = ((f"backbone.{name}", x) for name, x in torch_names.torch_names(detector.backbone))
  others = (
    (f"{part}.{name}", variable)
    for part in ("fpn", "coarser", "head")
    for name, variable in torch_names.renamed(getattr(detector, part))
  )
  for name, variable in (*backbone, *others):
    for pattern, replacement in rules:
      name, found = re.subn(pattern, replacement, name)
      if found:
        break
    yield name, variable


@torch_names.spellings.register
def _spellings(detector: RetinaNet) -> torch_names.Rules:
  return (*torch_names.SPELLINGS, *_SPELLINGS[detector.preset.name])
