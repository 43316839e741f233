"""`lip-jax data`: prepare, verify, convert and bench, one after the other on a small data set."""

import errno
import fcntl
import os

import fixture_boxes
import pytest
from fixture_data import to_tfrecord, write_folder, write_tars

from lip_jax import cli


def run(capsys, *arguments):
  status = cli.main(["data", *map(str, arguments)])
  out, err = capsys.readouterr()
  return status, out, err


def test_from_a_folder_to_a_verified_data_set_and_back_from_tfrecord(tmp_path, capsys):
  folder = write_folder(tmp_path / "pets_folder", per_class=8, height=40, width=50)
  data = tmp_path / "data"
  made = run(
    capsys, "prepare", "folder", "--folder", folder, "--name", "pets", "--data-dir", data,
    "--shorter-side", 32, "--quality", 90, "--num-shards", 2, "--num-workers", 1,
  )  # fmt: skip
  assert made[0] == 0
  assert "train 24, validation 24 images" in made[1]
  assert run(capsys, "verify", "pets", "--data-dir", data, "--decode", "all")[0] == 0

  directory = data / "pets" / "1.0.0"
  to_tfrecord(directory)
  converted = tmp_path / "converted"
  done = run(capsys, "convert", "pets", "--data-dir", data, "--out-dir", converted)
  assert done[0] == 0, done
  assert run(capsys, "verify", "pets", "--data-dir", converted)[0] == 0

  # A file cut short: every command's exit status says so.
  shard = sorted(converted.glob("pets/1.0.0/*.array_record-*"))[0]
  shard.write_bytes(shard.read_bytes()[:-100])
  status, out, _ = run(capsys, "verify", "pets", "--data-dir", converted)
  assert status == 1
  assert shard.name in out


@pytest.mark.parametrize("kind", ["array_record", "tfrecord", "folder", "fake", "boxes"])
def test_bench(kind, tmp_path, capsys):
  folder = write_folder(tmp_path / "pets_folder", per_class=6, height=40, width=50)
  boxes = fixture_boxes.write(tmp_path, count=23, split="train")
  source = {"folder": f"folder:{folder}", "fake": "fake:64", "boxes": boxes}.get(kind, "pets")
  if source == "pets":
    assert (
      run(
        capsys, "prepare", "folder", "--folder", folder, "--name", "pets", "--data-dir", tmp_path
      )[0]
      == 0
    )
  if kind == "tfrecord":
    to_tfrecord(tmp_path / "pets" / "1.0.0")
  status, out, err = run(
    capsys, "bench", "--source", source, "--data-dir", tmp_path, "--seconds", 0.3,
    "--num-threads", 2, "--image-size", 32, "--images-per-second", 7, 1e9,
  )  # fmt: skip
  assert status == 0, err
  assert "to feed         7 images/s:     1 core(s), enough here" in out
  assert "not enough here" in out.splitlines()[-1]
  assert ("decode and resize, for each core" in out) == (kind == "boxes")


def test_what_is_wrong_is_one_line(tmp_path, capsys):
  train, validation = write_tars(tmp_path)
  for arguments in (
    ("verify", "pets", "--data-dir", tmp_path),
    ("convert", "pets", "--data-dir", tmp_path, "--out-dir", tmp_path / "x"),
    ("bench", "--source", "fake", "--seconds", 0),
    # Not ImageNet's 1,000 classes.
    (
      "prepare", "imagenet", "--train-tar", train, "--val-tar", validation, "--data-dir", tmp_path,
    ),
  ):  # fmt: skip
    status, _, err = run(capsys, *arguments)
    assert status == 1
    assert err.startswith("error: ")
    assert len(err.strip().splitlines()) == 1, err


def test_numbers_are_positive(capsys):
  with pytest.raises(SystemExit, match="2"):
    cli.main(["data", "verify", "pets", "--num-workers", "-1"])
  assert "-1 is not positive" in capsys.readouterr()[1]


def test_what_is_overwritten_in_the_middle_is_pointed_out(tmp_path, capsys):
  """The decoder takes such a file, with a warning that whole files have as well."""
  folder = write_folder(tmp_path / "pets_folder", height=200, width=300)
  path = folder / "train" / "cat" / "1.jpg"
  data = bytearray(path.read_bytes())
  data[len(data) // 3 : len(data) // 2] = bytes(len(data) // 2 - len(data) // 3)
  path.write_bytes(data)
  status, out, _ = run(capsys, "verify", f"folder:{folder}", "--decode", "all")
  assert "cat/1.jpg" in out
  assert status == ("fault" in out)


def test_a_link_that_leads_nowhere_is_an_unreadable_image(tmp_path, capsys):
  folder = write_folder(tmp_path / "pets_folder")
  (folder / "train" / "cat" / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
  status, out, _ = run(capsys, "verify", f"folder:{folder}")
  assert status == 1
  assert "gone.jpg" in out
  assert "No such file" in out


def test_without_locks_commands_warn_once_and_escape_the_place(tmp_path, capsys, monkeypatch):
  def flock(file, how):
    raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

  monkeypatch.setattr(fcntl, "flock", flock)
  folder = write_folder(tmp_path / "images", per_class=1)
  data, converted = tmp_path / "data\u202e\x1b[2J", tmp_path / "con\xadverted"
  name = ("--folder", folder, "--name", "pets")
  prepared = run(capsys, "prepare", "folder", *name, "--data-dir", data)
  to_tfrecord(data / "pets" / "1.0.0")
  made = run(capsys, "convert", "pets", "--data-dir", data, "--out-dir", converted)
  for (status, out, err), place in ((prepared, r"/data\u202e\x1b[2J/"), (made, r"/con\xadverted/")):
    assert status == 0
    assert "train 3, validation 3 images" in out
    [line] = [line for line in err.splitlines() if "locks" in line]
    assert line.startswith("warning: /")
    assert place in line
    assert line.endswith("see that no other process writes there")


@pytest.mark.parametrize("flag", ["--data-dir", "--out-dir"])
def test_no_directory_is_called_none(tmp_path, capsys, monkeypatch, flag):
  monkeypatch.chdir(tmp_path)
  places = {"--data-dir": "data", "--out-dir": "out", flag: "None"}
  with pytest.raises(SystemExit, match="2"):
    run(capsys, "convert", "pets", *(f"{key}={place}" for key, place in places.items()))
  assert f"argument {flag}: None names no directory" in capsys.readouterr().err
  assert not list(tmp_path.iterdir())
