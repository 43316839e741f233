"""The `lip-jax` command: what it prints, and its exit status."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import lip_jax
from lip_jax import cli
from lip_jax.errors import UsageError
from lip_jax.models import cost
from lip_jax.tools import paper
from lip_jax.training import config as config_lib
from lip_jax.training.metrics import MetricsWriter

ROOT = Path(__file__).parents[2]
GET_CONFIG = runpy.run_path(str(ROOT / "configs" / "imagenet.py"))["get_config"]


def run(capsys, *arguments):
  """Exit status, stdout and stderr."""
  try:
    status = cli.main(arguments)
  except SystemExit as end:  # argparse's
    status = end.code
  return status, *capsys.readouterr()


def test_a_real_process():
  def process(*arguments):
    command = [sys.executable, "-m", "lip_jax.cli", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)

  done = process("models", "resnet_small", "--image-size=32")
  assert done.returncode == 0, done.stderr
  assert "1,017,464" in done.stdout
  assert not done.stderr  # progress is for terminals
  done = process("models", "resnet51")
  assert (done.returncode, done.stdout) == (1, "")
  assert done.stderr.startswith("error: unknown network 'resnet51'; choose ")
  assert len(done.stderr.splitlines()) == 1


def test_help_and_version(capsys):
  status, out, _ = run(capsys, "--help")
  assert status == 0
  for command in ("models", "tables", "convert"):
    assert command in out
  assert run(capsys, "--version") == (0, f"lip-jax {lip_jax.__version__}\n", "")


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ([], "COMMAND"),
    (["model"], "invalid choice: 'model'"),
    (["models", "--size=3"], "--size"),
    (["models", "--image-size=big"], "'big'"),
    (["convert", "weights.pth"], "OUT"),
    (["convert", "a.pth", "b", "--option=logit_width"], "'logit_width' is not of the form KEY=VAL"),
    (["convert", "a.pth", "b", "--option=logit-width=3"], "'logit-width=3' is not of the form"),
  ],
)
def test_arguments_that_cannot_be_parsed(capsys, arguments, message):
  status, out, err = run(capsys, *arguments)
  assert (status, out) == (2, "")
  assert message in err


def test_models(capsys):
  status, out, _ = run(capsys, "models", "resnet50", "table1_average", "resnet18")
  assert status == 0
  lines = out.split("\n\n")[0].splitlines()
  assert [" ".join(line.split()) for line in lines] == [
    "network parameters paper difference multiply-adds paper difference",
    "resnet50 25,557,032 25.6 M -0.04 M -0.2 % 4.089 G 4.12 G -0.03 G -0.7 %",
    "table1_average 22,804,520 n/a 3.781 G n/a",
    "resnet18 11,689,512 1.814 G",
  ]
  # Aligned: each column of numbers ends at the same place.
  assert len({line.index(" G") for line in lines[1:]}) == 1
  assert cost.RULE in out
  assert "One image of 224 px" in out


def test_models_of_another_size_are_not_compared(capsys):
  status, out, _ = run(capsys, "models", "resnet50", "--image-size=64")
  assert status == 0
  row = " ".join(out.splitlines()[1].split())
  assert row == "resnet50 25,557,032 25.6 M -0.04 M -0.2 % 0.336 G"
  assert "One image of 64 px" in out


def test_models_json(capsys):
  status, out, _ = run(capsys, "models", "--json", "table4_resnet50", "resnet18")
  assert status == 0
  values = json.loads(out)
  assert values["rule"] == cost.RULE
  row, model = values["networks"]
  assert row["name"] == row["row"] == "table4_resnet50"
  assert (row["model"], row["options"], row["image_size"]) == ("resnet50", {}, 224)
  assert (row["parameters"], row["multiply_adds"]) == (25_557_032, 4_089_184_256)
  assert (row["paper_parameters_m"], row["paper_multiply_adds_g"]) == (25.6, 4.12)
  assert row["difference_multiply_adds_g"] == pytest.approx(4.089184256 - 4.12)
  assert row["difference_multiply_adds_percent"] == pytest.approx(-0.74795, abs=1e-4)
  assert row["source"] == "authors' README"
  assert model["row"] is None
  assert model["paper_parameters_m"] is None


def test_everything_is_listed_by_default():
  names = cost.default_names()
  assert set(lip_jax.list_models()) < set(names)
  assert [name for name in names if name.startswith("table")] == [
    row.name for row in paper.ROWS if row.table != 2
  ]


def write_run(directory, arg, *, top1=None, finish=True, **changes):
  """What training leaves behind: 8 steps in all, evaluated in the middle and at the end."""
  values = GET_CONFIG(arg).to_dict()
  values["model"].update(changes.pop("model", {}))
  values["data"].update(changes.pop("data", {}))
  values.update(num_epochs=2.0, **changes)
  directory.mkdir(parents=True)
  (directory / "config.json").write_text(config_lib.to_json(config_lib.from_dict(values)))
  with MetricsWriter(directory, total_steps=8, start_step=0) as writer:
    writer.write(3, "train", {"loss": 1.0, "epoch": 3 / 4})
    writer.write(4, "validation", {"top1": 0.1, "top5": 0.2, "count": 50000})
    if finish:
      writer.write(8, "validation", {"top1": top1, "top5": 0.9, "count": 50000})


def results(capsys, runs):
  status, out, _ = run(capsys, "tables", "--json", f"--runs={runs}")
  assert status == 0
  return {row["name"]: row for row in json.loads(out)["rows"]}


def test_tables_without_a_run(capsys, tmp_path):
  status, out, _ = run(capsys, "tables", f"--runs={tmp_path}")
  assert status == 0
  lines = {line.split()[0]: line for line in out.splitlines() if line.startswith("table")}
  assert list(lines) == [row.name for row in paper.ROWS]
  for name, line in lines.items():
    assert f"--config=configs/imagenet.py:{name} --workdir={tmp_path}/{name}" in line
    assert "not yet run" in line
  assert "78.19 / 93.96" in lines["table4_lip_resnet50"]
  assert "78.15 / n/a" in lines["table1_lip_bottleneck256"]
  assert "  n/a  " in lines["table1_average"]
  for number in range(1, 5):
    assert f"Table {number}: " in out


def test_tables_of_finished_runs(capsys, tmp_path):
  write_run(tmp_path / "table1_average", "table1_average", top1=0.76543)
  # The same network under the name of its model, with a recipe of its own.
  write_run(
    tmp_path / "table4_lip_resnet50",
    "lip_resnet50",
    top1=0.7812,
    model={"bn_group_size": 64, "zero_init_residual": False},
    data={"dataset": "imagenet2012:5.1.0"},
  )
  rows = results(capsys, tmp_path)
  assert rows["table1_average"]["result"] == {
    "status": "finished",
    "step": 8,
    "epochs": 2.0,
    "top1": pytest.approx(76.543),
    "top5": pytest.approx(90.0),
    "why": None,
  }
  assert rows["table1_average"]["paper_top1"] is None
  assert rows["table4_lip_resnet50"]["result"]["top1"] == pytest.approx(78.12)
  assert rows["table1_max"]["result"]["status"] == "not yet run"
  _, out, _ = run(capsys, "tables", f"--runs={tmp_path}")
  assert "76.54 / 90.00 (2 epochs)" in out


def test_tables_of_runs_that_do_not_count(capsys, tmp_path):
  write_run(tmp_path / "table1_average", "table1_average", finish=False)
  write_run(tmp_path / "table1_max", "table1_average", top1=0.7)
  write_run(tmp_path / "table1_strided", "table1_strided,tiny", top1=0.7)
  write_run(tmp_path / "table2_a", "table2_a", top1=0.7, model={"stage_sizes": (1, 1, 1, 1)})
  write_run(tmp_path / "table2_b", "table2_b", top1=0.7, model={"an_option_of_the_future": 1})
  write_run(tmp_path / "table3_a", "table3_b", top1=0.7)
  write_run(tmp_path / "table4_resnet101", "resnet50", top1=0.7)
  (tmp_path / "table2_c").mkdir()
  (tmp_path / "table2_c" / "config.json").write_text("{")
  found = results(capsys, tmp_path)
  assert found["table1_average"]["result"]["status"] == "running"
  assert found["table1_average"]["result"]["step"] == 4
  for name, why in {
    "table1_max": "another model: resnet50, pool=average",
    "table1_strided": "on cluttered_digits/classify, not on imagenet2012",
    "table2_a": "another model: lip_resnet50, pool=lip, stage_sizes=(1, 1, 1, 1)",
    "table2_b": "another model",
    "table2_c": "is damaged",
    "table3_a": "another model: lip_resnet50, lip_stages=('c3',), pool=lip",
    "table4_resnet101": "another model",
  }.items():
    assert found[name]["result"]["status"] == "other"
    assert found[name]["result"]["top1"] is None
    assert why in found[name]["result"]["why"]
  _, out, _ = run(capsys, "tables", f"--runs={tmp_path}")
  assert "running, step 4" in out
  assert "not counted: a run of another model: resnet50, pool=average" in out


def test_a_run_that_is_being_written(capsys, tmp_path):
  write_run(tmp_path / "table2_d", "table2_d", finish=False)
  with (tmp_path / "table2_d" / "metrics.jsonl").open("a") as lines:
    lines.write('{"step": 8, "validat')
  (tmp_path / "table3_e").mkdir()
  config = config_lib.from_dict(GET_CONFIG("table3_e").to_dict())
  (tmp_path / "table3_e" / "config.json").write_text(config_lib.to_json(config))
  found = results(capsys, tmp_path)
  assert (found["table2_d"]["result"]["status"], found["table2_d"]["result"]["step"]) == (
    "running",
    4,
  )
  assert (found["table3_e"]["result"]["status"], found["table3_e"]["result"]["step"]) == (
    "running",
    0,
  )


@pytest.fixture
def converted(monkeypatch):
  """Calls of `lip_jax.export.torch_convert.convert_weights`, which does nothing."""
  from lip_jax.export import torch_convert

  calls = []

  def fake(source, out, **arguments):
    calls.append((source, out, arguments))
    if source == "none.pth":
      raise UsageError("there is no none.pth")
    return f"{source} -> {out}"

  monkeypatch.setattr(torch_convert, "convert_weights", fake)
  return calls


def test_convert_passes_on_what_is_given(capsys, converted):
  status, out, _ = run(
    capsys,
    *("convert", "a.pth", "out", "--model=lip_resnet50", "--num-classes=10", "--overwrite"),
    *("--option", "logit_width=64", "--option", "lip_stages=('c4', 'c5')"),
    *("--option", "logit=projection", "--option", "width=None"),
  )
  assert (status, out) == (0, "a.pth -> out\n")
  assert converted == [
    (
      "a.pth",
      "out",
      {
        "model": "lip_resnet50",
        "num_classes": 10,
        "overwrite": True,
        "logit_width": 64,
        "lip_stages": ("c4", "c5"),
        "logit": "projection",
        "width": None,
      },
    )
  ]
  assert run(capsys, "convert", "folder", "weights.npz")[0] == 0
  assert converted[1] == (
    "folder",
    "weights.npz",
    {"model": None, "num_classes": None, "overwrite": False},
  )


def test_convert_says_what_is_wrong(capsys, converted):
  assert run(capsys, "convert", "none.pth", "out", "--model=resnet50") == (
    1,
    "",
    "error: there is no none.pth\n",
  )
  status, _, err = run(capsys, "convert", "a.pth", "out", "--option", "num_classes=3")
  assert status == 1
  assert err == "error: num_classes is no option of a model; give it as --num-classes\n"


def test_interrupted(capsys, monkeypatch):
  def interrupt(*_):
    raise KeyboardInterrupt

  monkeypatch.setattr(cost, "costs", interrupt)
  assert run(capsys, "models", "resnet50") == (130, "", "error: interrupted\n")


def test_progress_on_a_terminal(capsys, monkeypatch):
  monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
  _, _, err = run(capsys, "models", "resnet_small", "resnet18", "--image-size=32")
  assert "1/2 resnet_small" in err
  assert "2/2 resnet18" in err
  assert err.endswith("\r\033[K")


def test_a_reader_that_has_enough_is_no_error():
  command = f"{sys.executable} -m lip_jax.cli tables | head -1; exit ${{PIPESTATUS[0]}}"
  done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
  assert (done.returncode, done.stderr) == (0, "")
  assert done.stdout.startswith("Table 1")
