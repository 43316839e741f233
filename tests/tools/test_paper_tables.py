"""The paper's tables against tests/data/paper_tables.json, typed from its text, not from ours."""

import collections
import json
from pathlib import Path

import pytest

from lip_jax.tools import paper

TYPED = json.loads((Path(__file__).parents[1] / "data" / "paper_tables.json").read_text())


def number(text):
  return None if text == "N/A" else float(text.rstrip("MG"))


@pytest.mark.parametrize("table", range(1, 7))
def test_every_printed_number(table):
  """Row by row, in the order of the paper."""
  _, *typed = TYPED[str(table)]
  rows = [row for row in paper.ROWS if row.table == table]
  assert [tuple(row.printed) for row in rows] == [paper.COLUMNS[table]] * len(typed)
  assert [list(row.printed.values()) for row in rows] == [
    [number(text) for text in figures] for _, *figures in typed
  ]
  for row, (label, *_) in zip(rows, typed, strict=True):
    if table in (1, 2, 3):
      assert row.label[0].lower() == label[0].lower()
    else:
      assert row.label == label


def test_the_networks_of_tables_1_to_4():
  networks = collections.Counter(row.table for row in paper.NETWORKS.values())
  assert networks == {1: 8, 2: 4, 3: 5, 4: 7, None: len(paper.FURTHER)}
  options = {name: row.options for name, row in paper.NETWORKS.items()}
  tops = [options[f"table2_{letter}"]["logit_top"] for letter in "abcd"]
  assert tops == ["norm_gate", "norm", "gate", "none"]
  assert [(paper.NETWORKS[name].model, options[name]) for name in options if "table1" in name] == [
    ("resnet50", {}),
    ("resnet50", {"pool": "average"}),
    ("resnet50", {"pool": "dpp_lite_sym"}),
    ("resnet50", {"pool": "dpp_lite_sym", "structure": "dense"}),
    ("lip_resnet50", {"logit": "projection"}),
    *(("lip_resnet50", {"logit_width": width}) for width in (64, 128, 256)),
  ]
  assert options["table2_d"] == {"logit_top": "none", "average_steps": 2000}
  assert [options[f"table3_{letter}"].get("lip_stages") for letter in "abcd"] == [
    None,
    ("c3", "c4", "c5"),
    ("c4", "c5"),
    ("c5",),
  ]
  assert paper.NETWORKS["table3_e"].model == "resnet50"


def test_rows_have_their_own_names_and_further_ones_no_printed_figures():
  rows = [*paper.ROWS, *paper.FURTHER]
  assert len({row.name for row in rows}) == len(rows)
  for row in paper.ROWS:
    assert row.name.startswith(f"table{row.table}_")
  for row in paper.FURTHER:
    assert (row.table, row.printed) == (None, {})
    assert row.name.startswith("further_")
