"""One network of the experiment with small objects in clutter, docs/small_objects.md.

Command:   python benchmarks/small_objects.py trains and compares all of them;
           python train.py --config=configs/small_objects.py --workdir=runs/one trains one
Hardware:  2 CPU cores; configs/small_objects.py:large (64 px, four times as wide), which wants an
           accelerator, is not yet run
Expected:  docs/small_objects.md

All else is that of configs/cluttered_digits.py.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

from lip_jax.errors import UsageError

_BASE = Path(__file__).with_name("cluttered_digits.py")


def get_config(size: str = "small") -> ConfigDict:
  """Configuration of a LIP network.

  Args:
    size: "small" (28 px) or "large" (64 px).

  Raises:
    UsageError: another size.
  """
  if size not in ("small", "large"):
    raise UsageError(f"unknown size {size!r}; choose one of small, large")
  large = size == "large"
  config = runpy.run_path(str(_BASE))["get_config"]()
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
