"""The embedded data set with few images."""

import dataclasses
from pathlib import Path

from lip_jax.data.prepare.cluttered_digits import ClutteredDigits


def prepare_digits(
  data_dir: Path,
  name: str,
  builder: type[ClutteredDigits] = ClutteredDigits,
  like: str = "classify",
) -> None:
  """Writes `cluttered_digits/<name>`, 64 + 20 images like those of another name."""
  (own,) = (config for config in ClutteredDigits.BUILDER_CONFIGS if config.name == like)
  config = dataclasses.replace(own, name=name, num_train=64, num_validation=20)
  builder(config=config, data_dir=data_dir).download_and_prepare(file_format="array_record")
