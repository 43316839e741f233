"""Names of detectors' weights in the files of torchvision and of mmdetection 0.6."""

import re
from collections.abc import Iterator

from flax import nnx

from lip_jax.detection.detector import Detector
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
    (r"^rpn\.conv\.", "rpn.head.conv.0.0."),
    (r"^rpn\.logits\.", "rpn.head.cls_logits."),
    (r"^rpn\.box_deltas\.", "rpn.head.bbox_pred."),
    (r"^box_head\.fc1\.", "roi_heads.box_head.fc6."),
    (r"^box_head\.fc2\.", "roi_heads.box_head.fc7."),
    (r"^box_head\.class_logits\.", "roi_heads.box_predictor.cls_score."),
    (r"^box_head\.box_deltas\.", "roi_heads.box_predictor.bbox_pred."),
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
    (r"^rpn\.conv\.", "rpn_head.rpn_conv."),
    (r"^rpn\.logits\.", "rpn_head.rpn_cls."),
    (r"^rpn\.box_deltas\.", "rpn_head.rpn_reg."),
    (r"^box_head\.fc1\.", "bbox_head.shared_fcs.0."),
    (r"^box_head\.fc2\.", "bbox_head.shared_fcs.1."),
    (r"^box_head\.class_logits\.", "bbox_head.fc_cls."),
    (r"^box_head\.box_deltas\.", "bbox_head.fc_reg."),
  ),
}
# Other spellings: torchvision's published files are older than its names, in which a convolution
# became the first part of a sequence; a tower counted its ReLUs, too.
_SPELLINGS = {
  "torchvision": (
    (r"(fpn\.(?:inner|layer)_blocks\.\d+)\.(weight|bias)$", r"\1.0.\2"),
    (r"(rpn\.head\.conv)\.(weight|bias)$", r"\1.0.0.\2"),
    (
      r"(_head\.conv)\.(\d+)\.(weight|bias)$",
      lambda match: f"{match[1]}.{int(match[2]) // 2}.0.{match[3]}",
    ),
  ),
  "mmdet1": ((r"(_head\.(?:cls|reg)_convs\.\d+)\.conv\.", r"\1."),),
}


@torch_names.torch_names.register
def _names(detector: Detector) -> Iterator[tuple[str, nnx.Variable]]:
  rules = _RULES[detector.preset.name]
  backbone = ((f"backbone.{name}", x) for name, x in torch_names.torch_names(detector.backbone))
  others = (
    (f"{part}.{name}", variable)
    for part in ("fpn", "coarser", "head", "rpn", "box_head")
    if hasattr(detector, part)
    for name, variable in torch_names.renamed(getattr(detector, part))
  )
  for name, variable in (*backbone, *others):
    for pattern, replacement in rules:
      name, found = re.subn(pattern, replacement, name)
      if found:
        break
    yield name, variable


@torch_names.spellings.register
def _spellings(detector: Detector) -> torch_names.Rules:
  return (*torch_names.SPELLINGS, *_SPELLINGS[detector.preset.name])
