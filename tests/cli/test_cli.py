"""The `lip-jax` command: what it prints, and its exit status."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import lip_jax
from lip_jax import cli
from lip_jax.detection import coco_metric
from lip_jax.errors import UsageError
from lip_jax.models.cost import RULE
from lip_jax.tools import cost, paper
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
    (["tables", "7"], "the paper has tables 1 to 6, got '7'"),
    (["tables", "--json", "--markdown"], "not allowed with"),
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
    "network parameters paper difference FLOPs paper difference",
    "resnet50 25,557,032 25.6 M -0.04 M -0.2 % 4.122 G 4.12 G +0.00 G +0.0 %",
    "table1_average 22,804,520 22.8 M +0.00 M +0.0 % 3.816 G 3.82 G -0.00 G -0.1 %",
    "resnet18 11,689,512 1.822 G",
  ]
  # Aligned: each column of numbers ends at the same place.
  assert len({line.index(" G") for line in lines[1:]}) == 1
  assert f"One image of 224 px: {RULE}." in " ".join(out.split())


def test_models_of_another_size_are_not_compared(capsys):
  status, out, _ = run(capsys, "models", "resnet50", "--image-size=64")
  assert status == 0
  row = " ".join(out.splitlines()[1].split())
  assert row == "resnet50 25,557,032 25.6 M -0.04 M -0.2 % 0.338 G"
  assert "One image of 64 px" in out


def test_models_json(capsys):
  status, out, _ = run(capsys, "models", "--json", "table4_resnet50", "resnet18")
  assert status == 0
  values = json.loads(out)
  assert values["rule"] == RULE
  row, model = values["networks"]
  assert row["name"] == row["row"] == "table4_resnet50"
  assert (row["model"], row["options"], row["image_size"]) == ("resnet50", {}, 224)
  assert (row["parameters"], row["multiply_adds"]) == (25_557_032, 4_089_184_256)
  assert row["flops"] == 4_121_924_096
  assert (row["paper_parameters_m"], row["paper_flops_g"]) == (25.6, 4.12)
  assert row["difference_flops_g"] == pytest.approx(4.121924096 - 4.12)
  assert row["difference_flops_percent"] == pytest.approx(0.04670, abs=1e-4)
  assert model["row"] is None
  assert model["paper_parameters_m"] is None


def test_everything_is_listed_by_default():
  names = cost.default_names()
  assert set(lip_jax.list_models()) < set(names)
  assert [name for name in names if name.startswith("table")] == [
    row.name for row in paper.ROWS if row.table in (1, 3, 4)
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


def results(capsys, runs, table):
  status, out, _ = run(capsys, "tables", str(table), "--json", f"--runs={runs}")
  assert status == 0
  return {row["name"]: row for row in json.loads(out)["rows"]}


def test_tables_without_a_run(capsys, monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)
  status, out, _ = run(capsys, "tables", "1", "2", "6")
  assert status == 0
  lines = {line.split()[0]: line for line in out.splitlines() if line.startswith("table")}
  assert list(lines) == [row.name for row in paper.ROWS if row.table in (1, 2, 6)]
  line = " ".join(lines["table1_dpp_original"].split())
  assert line.endswith("77.22 93.64 not yet run 25.6 25.56 6.59 6.562")
  assert lines["table2_b"].split()[-5:] == ["N/A", "N/A", "not", "yet", "run"]
  assert lines["table6_lip_resnet101_md"].endswith("43.9  65.7  48.1  25.4  46.7  56.3")
  assert "Table 2: " in out
  assert "B failed to train" in out
  assert "--config=configs/imagenet.py:ROW --workdir=runs/ROW" in out


@pytest.mark.parametrize("number", range(1, 7))
def test_a_table_is_one_screen(capsys, monkeypatch, tmp_path, number):
  monkeypatch.chdir(tmp_path)
  status, out, _ = run(capsys, "tables", str(number))
  assert status == 0
  assert out.startswith(f"Table {number}: ")
  lines = out.splitlines()
  assert len(lines) <= 24
  assert max(map(len, lines)) <= 120


def test_tables_json_has_what_is_printed_and_ours(capsys, tmp_path):
  row = results(capsys, tmp_path, 3)["table3_c"]
  assert row["printed"] == {"top1": 77.78, "top5": 93.81, "parameters_m": 23.7, "flops_g": 4.26}
  assert (row["parameters"], round(row["flops"] / 1e9, 3)) == (23_727_656, 4.254)
  assert row["options"] == {"lip_stages": ["c4", "c5"]}
  assert row["command"] == (
    f"python train.py --config=configs/imagenet.py:table3_c --workdir={tmp_path}/table3_c"
  )
  detector = results(capsys, tmp_path, 5)["table5_retinanet_resnet50"]
  assert detector["printed"]["ap_s"] == 19.6
  assert detector["parameters"] is None
  assert detector["result"]["status"] == "not yet run"
  assert detector["command"] == (
    f"python train.py --config=configs/coco.py:retinanet_resnet50 "
    f"--weights={tmp_path}/table4_resnet50 --workdir={tmp_path}/table5_retinanet_resnet50"
  )
  others, *_, ours = results(capsys, tmp_path, 6).values()
  assert others["command"] is others["result"] is None
  assert "coco.py:faster_rcnn_lip_resnet101_md --weights=RUN " in ours["command"]


def test_tables_as_markdown(capsys, tmp_path):
  status, out, _ = run(capsys, "tables", "--markdown", "2", f"--runs={tmp_path}")
  assert status == 0
  title, _, heading, _, first, *_ = out.splitlines()
  assert title.startswith("## Table 2: ")
  assert heading == "| row |  | top-1 | top-5 | here |"
  assert first.startswith("| `table2_a` | A: affine instance norm and amplified sigmoid | 78.19 |")


def test_tables_of_finished_runs(capsys, tmp_path):
  write_run(tmp_path / "table1_average", "table1_average", top1=0.76543)
  # The same network under the name of its model, with a recipe of its own.
  write_run(
    tmp_path / "table1_lip_bottleneck128",
    "lip_resnet50",
    top1=0.7812,
    model={"bn_group_size": 64, "zero_init_residual": False},
    data={"dataset": "imagenet2012:5.1.0"},
  )
  rows = results(capsys, tmp_path, 1)
  assert rows["table1_average"]["result"] == {
    "status": "finished",
    "step": 8,
    "epochs": 2.0,
    "top1": pytest.approx(76.543),
    "top5": pytest.approx(90.0),
    "why": None,
  }
  assert rows["table1_average"]["printed"]["top1"] == 76.96
  assert rows["table1_lip_bottleneck128"]["result"]["top1"] == pytest.approx(78.12)
  assert rows["table1_dpp"]["result"]["status"] == "not yet run"
  _, out, _ = run(capsys, "tables", "1", f"--runs={tmp_path}")
  assert "76.54 / 90.00 (2 epochs)" in out


def test_tables_of_detectors(capsys, tmp_path):
  """Table 5's and 6's own figures are a line below the paper's."""
  get_config = runpy.run_path(str(ROOT / "configs" / "coco.py"))["get_config"]
  figures = {name: 0.3 + k / 100 for k, name in enumerate(coco_metric.NAMES)}
  for row, argument, changes in (
    ("table5_retinanet_lip_resnet50", "retinanet_lip_resnet50", {}),
    ("table6_lip_resnet101_md", "faster_rcnn_lip_resnet101_md", {}),
    ("table5_retinanet_resnet50", "retinanet_resnet101", {}),
    ("table5_retinanet_resnet101", "retinanet_resnet101,tiny", {}),
    ("table5_faster_rcnn_resnet50", "faster_rcnn_resnet50", {"validation_split": "validation[:9]"}),
  ):
    values = get_config(argument).to_dict()
    values["num_epochs"] = 2.0
    values["data"].update(changes)
    (tmp_path / row).mkdir()
    config = config_lib.to_json(config_lib.from_dict(values))
    (tmp_path / row / "config.json").write_text(config)
    with MetricsWriter(tmp_path / row, total_steps=8, start_step=0) as writer:
      writer.write(4, "train", {"loss": 1.0, "epoch": 1.0})
      writer.write(8, "validation", {**figures, "count": 5000})
  found = results(capsys, tmp_path, 5) | results(capsys, tmp_path, 6)
  expected = {"ap": 30, "ap50": 31, "ap75": 32, "ap_s": 33, "ap_m": 34, "ap_l": 35}
  for row in ("table5_retinanet_lip_resnet50", "table6_lip_resnet101_md"):
    result = {"status": "finished", "step": 8, "epochs": 2.0, "why": None, **expected}
    assert found[row]["result"] == pytest.approx(result)
  for row, why in {
    "table5_retinanet_resnet50": "a run of another model: retinanet, backbone=resnet101",
    "table5_retinanet_resnet101": "on cluttered_digits/detect_small, not on coco/2017",
    "table5_faster_rcnn_resnet50": "evaluated on validation[:9] alone",
  }.items():
    assert found[row]["result"]["status"] == "other"
    assert why in found[row]["result"]["why"]
    assert found[row]["result"]["ap"] is None
  _, out, _ = run(capsys, "tables", "5", f"--runs={tmp_path}")
  lines = [" ".join(line.split()) for line in out.splitlines()]
  place = next(k for k, line in enumerate(lines) if line.startswith("table5_retinanet_lip"))
  assert lines[place].endswith("38.0 58.8 40.5 22.6 41.5 49.9")
  assert lines[place + 1] == "here: 2 epochs 30.0 31.0 32.0 33.0 34.0 35.0"


def test_tables_of_runs_that_do_not_count(capsys, tmp_path):
  write_run(tmp_path / "table1_average", "table1_average", finish=False)
  write_run(tmp_path / "table1_dpp", "table1_average", top1=0.7)
  write_run(tmp_path / "table1_strided", "table1_strided,tiny", top1=0.7)
  for name, changes in (
    ("table1_lip_bottleneck128", {"stage_sizes": (1, 1, 1, 1)}),
    ("table1_lip_bottleneck256", {"an_option_of_the_future": 1}),
    ("table1_lip_projection", {"lip_stages": ("c3",)}),
  ):
    write_run(tmp_path / name, name, top1=0.7, model=changes)
  write_run(tmp_path / "table1_dpp_original", "resnet101", top1=0.7)
  (tmp_path / "table1_lip_bottleneck64").mkdir()
  (tmp_path / "table1_lip_bottleneck64" / "config.json").write_text("{")
  found = results(capsys, tmp_path, 1)
  assert found["table1_average"]["result"]["status"] == "running"
  assert found["table1_average"]["result"]["step"] == 4
  for name, why in {
    "table1_dpp": "another model: resnet50, pool=average",
    "table1_strided": "on cluttered_digits/classify, not on imagenet2012",
    "table1_lip_bottleneck128": "another model: lip_resnet50, stage_sizes=(1, 1, 1, 1)",
    "table1_lip_bottleneck256": "another model",
    "table1_lip_bottleneck64": "is damaged",
    "table1_lip_projection": "lip_stages=('c3',)",
    "table1_dpp_original": "another model",
  }.items():
    assert found[name]["result"]["status"] == "other"
    assert found[name]["result"]["top1"] is None
    assert why in found[name]["result"]["why"]
  _, out, _ = run(capsys, "tables", "1", f"--runs={tmp_path}")
  assert "running, step 4" in out
  assert "table1_dpp: not counted: a run of another model: resnet50, pool=average." in out


def test_a_run_that_is_being_written(capsys, tmp_path):
  write_run(tmp_path / "table2_d", "table2_d", finish=False)
  with (tmp_path / "table2_d" / "metrics.jsonl").open("a") as lines:
    lines.write('{"step": 8, "validat')
  (tmp_path / "table2_a").mkdir()
  config = config_lib.from_dict(GET_CONFIG("table2_a").to_dict())
  (tmp_path / "table2_a" / "config.json").write_text(config_lib.to_json(config))
  found = results(capsys, tmp_path, 2)
  for name, step in (("table2_d", 4), ("table2_a", 0)):
    assert (found[name]["result"]["status"], found[name]["result"]["step"]) == ("running", step)


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
  more_than_a_pipe_holds = f"models --json --image-size=32 {'resnet_small ' * 300}"
  command = (
    f"{sys.executable} -m lip_jax.cli {more_than_a_pipe_holds} | head -1; exit ${{PIPESTATUS[0]}}"
  )
  done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
  assert (done.returncode, done.stdout, done.stderr) == (0, "{\n", "")
