"""The notebooks of colab/: their two forms agree, and they run, as a reader runs them, in short."""

import os
import re
from pathlib import Path

import jupytext
import nbclient
import nbformat
import pytest
from fixture_digits import prepare_digits
from fixture_xla import QUICK

ROOT = Path(__file__).parents[2]
COLAB = ROOT / "colab"
NAMES = sorted(path.stem for path in COLAB.glob("*.py"))


def cells(notebook):
  return [(cell.cell_type, cell.source) for cell in notebook.cells]


@pytest.mark.parametrize("name", NAMES)
def test_both_forms_agree_and_hold_no_output(name):
  notebook = nbformat.read(COLAB / f"{name}.ipynb", as_version=4)
  nbformat.validate(notebook)
  advice = f"run: jupytext --to ipynb --update colab/{name}.py"
  assert cells(notebook) == cells(jupytext.read(COLAB / f"{name}.py")), advice
  code = [cell for cell in notebook.cells if cell.cell_type == "code"]
  assert not any(cell.outputs or cell.execution_count for cell in code), f"strip it: {advice}"


def test_all_start_alike_and_name_one_repository():
  starts, repositories = set(), set()
  for name in NAMES:
    notebook = jupytext.read(COLAB / f"{name}.py")
    text, install = notebook.cells[0].source, notebook.cells[1].source
    repository = re.search(r'REPOSITORY = "https://github.com/(\w[\w-]*/[\w.-]+)"', install)[1]
    assert f"colab.research.google.com/github/{repository}/blob/main/colab/{name}.ipynb" in text
    starts.add(install)
    repositories.add(repository)
  assert len(NAMES) == 5
  assert len(starts) == len(repositories) == 1


@pytest.fixture(scope="module")
def execute(tmp_path_factory):
  """Runs a notebook in a kernel of its own; all of them in one folder, as in one runtime of Colab.

  Returns: name -> (folder, what its cells have printed).
  """
  folder = tmp_path_factory.mktemp("colab")
  for name in ("classify", "detect_small"):
    prepare_digits(folder / "tfds", f"{name}_tiny", like=name)
    made = folder / "tfds" / "cluttered_digits" / f"{name}_tiny"
    made.rename(made.with_name(name))
  environment = {
    **os.environ,
    "LIP_JAX_SMALL": "1",
    "TFDS_DATA_DIR": str(folder / "tfds"),
    "PYTHONPATH": str(ROOT),
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": QUICK,  # one device
    "IPYTHONDIR": str(folder / "ipython"),
    "PYDEVD_DISABLE_FILE_VALIDATION": "1",
  }

  def execute(name):
    notebook = nbformat.read(COLAB / f"{name}.ipynb", as_version=4)
    client = nbclient.NotebookClient(
      notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    client.execute(env=environment)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    shown = [output for output in outputs if "image/png" in output.get("data", {})]
    printed = "".join(output.text for output in outputs if output.get("name") == "stdout")
    return folder, printed, shown

  return execute


def percent(label, text):
  return float(re.search(rf"{re.escape(label)}\s*([\d.]+) %", text)[1])


def is_picture(path):
  return path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_lip_in_ten_minutes(execute):
  folder, printed, shown = execute("lip_in_ten_minutes")
  assert re.search(r"equal logits: the mean +4\.00\n", printed)
  assert "conv2: Conv 3x3, stride 2 -> LIP 3x3, stride 2, then Conv 3x3, stride 1" in printed
  assert "step 4/4  validation" in printed
  assert 0 <= percent("top-1:", printed) <= 100
  assert is_picture(folder / "lan_family.png")
  assert is_picture(folder / "runs" / "digits" / "importance.png")
  assert len(shown) == 2


@pytest.mark.slow
def test_look_inside(execute):
  folder, printed, shown = execute("look_inside")
  assert "20 images of cluttered_digits/classify validation" in printed
  trained = re.findall(r"step 4/4  validation .* top1 ([\d.]+)", printed)
  assert all(percent("top-1:", printed) == pytest.approx(100 * float(t)) for t in trained)
  assert len(re.findall(r"first +area under .*: 0\.\d+", printed)) == 2
  assert all(is_picture(folder / f"{name}.png") for name in ("importance", "evidence", "tests"))
  assert len(shown) == 3


@pytest.mark.slow
def test_fine_tune(execute):
  _, printed, shown = execute("fine_tune")
  assert "the classifier is a new one, of 2 classes" in printed
  assert 0 <= percent("fine-tuned:", printed) <= 100
  assert 0 <= percent("from scratch:", printed) <= 100
  assert "['config.json', 'model.safetensors'] ['even', 'odd']" in printed
  assert len(shown) == 1


@pytest.mark.slow
def test_your_own_logit_module(execute):
  folder, printed, shown = execute("your_own_logit_module")
  assert "gradients agree with finite differences" in printed
  for name in ("average", "projection", "neighbours"):
    assert 0 <= percent(f"{name:12} top-1:", printed) <= 100
  assert is_picture(folder / "neighbours.png")
  assert len(shown) == 2


@pytest.mark.slow
def test_detect_small_objects(execute):
  folder, printed, shown = execute("detect_small_objects")
  assert "20 validation images of the digits 0, 1, 2, 3" in printed
  assert re.search(r"AP: -?\d\.\d{3}, of small digits: -?\d\.\d{3}", printed)
  assert all(is_picture(folder / f"{name}.png") for name in ("images", "found"))
  assert is_picture(folder / "runs" / "detect_digits" / "detections.png")
  assert "new, for 2 classes: head.class_logits.bias" in printed
  assert re.search(r"fine-tuned, AP: -?\d\.\d{3}", printed)
  assert len(shown) == 2
