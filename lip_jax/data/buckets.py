"""Shapes that batches of images are padded to."""

import re
from collections.abc import Sequence

from lip_jax.errors import UsageError


def parse_buckets(buckets: Sequence[str]) -> list[tuple[int, int]]:
  """Height and width of buckets such as "800x1344".

  Raises:
    UsageError: there is none, or one has another form.
  """
  matches = [re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", bucket) for bucket in buckets]
  if not matches or None in matches or len(set(buckets)) < len(buckets):
    raise UsageError(
      f"buckets={tuple(buckets)}; expected different shapes HEIGHTxWIDTH such as ('800x1344',)"
    )
  return [(int(match[1]), int(match[2])) for match in matches if match]
