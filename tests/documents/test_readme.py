import re
from pathlib import Path

import lip_jax

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_the_code_runs_as_it_stands():
  blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
  assert len(blocks) == 3
  names = {}
  for block in blocks:
    exec(compile(block, "README.md", "exec"), names)
  assert names["y"].shape == (8, 28, 28, 64)
  assert names["class_logits"].shape == (2, 10)
  assert isinstance(names["net"].pool, lip_jax.LIP)


def test_what_it_links_to_is_there():
  links = re.findall(r"\]\(([^)]+)\)", README)
  assert links
  for link in links:
    assert (ROOT / link).exists(), link
