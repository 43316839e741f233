"""The docs site, built as `make docs` builds it, where what it needs is installed."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import lip_jax
from lip_jax import cli, visualize
from lip_jax.tools import paper

pytest.importorskip("material")
pytest.importorskip("mkdocstrings")
pytest.importorskip("latex2mathml")

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
  folder = tmp_path_factory.mktemp("site")
  done = subprocess.run(
    [sys.executable, "-m", "mkdocs", "--quiet", "build", "--strict", "--site-dir", folder],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*.html")}


def test_every_public_name_is_in_the_reference(site):
  pages = "".join(text for path, text in site.items() if path.startswith("reference/"))
  documented = {name.rpartition(".")[2] for name in re.findall(r'id="(lip_jax\.[\w.]+)"', pages)}
  assert set(lip_jax.__all__) - {"lan"} <= documented
  assert set(visualize.__all__) <= documented
  layers = {name for name, kind in vars(lip_jax.lan).items() if isinstance(kind, type)}
  assert {name for name in layers if vars(lip_jax.lan)[name].__module__ == "lip_jax.lan"} <= (
    documented
  )


def test_every_command_is_in_the_reference(site, capsys):
  with pytest.raises(SystemExit):
    cli.main(["--help"])
  _, _, listed = capsys.readouterr().out.partition("  COMMAND\n")
  commands = re.findall(r"^ {4}(\w+)", listed.partition("\n\n")[0], re.MULTILINE)
  assert {"evaluate", "data"} <= set(commands)
  for command in [*commands, "data verify", "data prepare imagenet"]:
    assert f"usage: lip-jax {command}" in site["reference/commands.html"], command


def test_nothing_is_fetched_from_elsewhere(site):
  for path, text in site.items():
    fetched = re.findall(r'<(?:script|img|iframe)[^>]*?src="?(https?:[^" >]+)', text)
    fetched += re.findall(r'<link[^>]*?rel="?stylesheet[^>]*?href="?(https?:[^" >]+)', text)
    assert not fetched, path


def test_formulas_and_what_pages_include_are_there(site):
  assert site["concepts.html"].count('<math xmlns="http://www.w3.org/1998/Math/MathML"') > 20
  assert "arithmatex" not in site["concepts.html"]
  assert "make train" in site["index.html"]
  assert "bit-identical" in site["quick_start.html"]
  assert "<code>python train.py --config=configs/cluttered" in site["quick_start.html"]
  for row in (*paper.ROWS, *paper.FURTHER):
    assert row.name in site["paper_tables.html"]


@pytest.mark.parametrize("page", ["concepts", "your_own_network"])
def test_the_code_runs_as_it_stands(page):
  blocks = re.findall(r"```python\n(.*?)```", (ROOT / f"docs/{page}.md").read_text(), re.DOTALL)
  assert len(blocks) == 2
  names = {}
  for block in blocks:
    exec(compile(block, f"{page}.md", "exec"), names)
  if page == "concepts":
    assert names["pooled"] == {
      "AveragePool": 1.67,
      "StridedPool": 2.0,
      "MaxPool": 6.0,
      "SoftPool": 5.59,
    }
    assert names["shares"]["SoftPool"] == 0.85
