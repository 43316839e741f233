"""One network of the experiment with small objects in clutter: cluttered_digits/sizes.

Command:   python benchmarks/small_objects.py trains them all, for docs/small_objects.md;
           python train.py --config=configs/small_objects.py --workdir=runs/one trains one
Hardware:  2 CPU cores; :large, for an accelerator, is not yet run
Expected:  see docs/small_objects.md
"""

import importlib.util
from pathlib import Path

from ml_collections import ConfigDict

_BASE = Path(__file__).with_name("cluttered_digits.py")


def get_config(size: str = "small") -> ConfigDict:
  """Configuration of a LIP network; size is "small" (28 px) or "large" (64 px)."""
  spec = importlib.util.spec_from_file_location("cluttered_digits_config", _BASE)
  assert spec is not None
  assert spec.loader is not None
  base = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(base)
  config = base.get_config()

  large = {"small": False, "large": True}[size]
  config.data.dataset = "cluttered_digits/sizes_large" if large else "cluttered_digits/sizes"
  config.data.image_size = 64 if large else 28
  config.num_epochs = 20.0 if large else 1.6  # 37,500 or 1,500 steps
  config.model.width = 32 if large else 8
  config.model.logit_width = 32 if large else 8
  config.optim.base_lr = 0.4  # per 256 images: 0.05 at 32
  config.optim.warmup_epochs = config.num_epochs / 10
  config.eval_batch_size = 500
  config.eval_every_epochs = 100.0  # at the end only
  config.checkpoint_every_steps = 200
  config.log_every_steps = 50
  config.importance_images = 0
  return config
