"""Image folders as people have them: what lies beside the images, other names, turned pictures."""

import os
import struct
import tempfile
from pathlib import Path

import numpy as np
import pytest
from fixture_data import jpeg, write_folder
from PIL import Image

from lip_jax import cli
from lip_jax.data import disk, preprocess
from lip_jax.data.pipeline import eval_batches, train_loader
from lip_jax.data.prepare.folder import prepare_folder
from lip_jax.data.prepare.verify import verify
from lip_jax.data.source import open_split
from lip_jax.data.transforms import EvalCrop, TrainCrop
from lip_jax.errors import UsageError


@pytest.fixture
def folder(tmp_path):
  return write_folder(tmp_path / "images", per_class=2)


def opened(folder, split="train"):
  return open_split(f"folder:{folder}", split, None)


def test_what_lies_beside_the_images_is_no_class(folder, tmp_path):
  for path in ("__MACOSX/train/cat/._0.jpg", "@eaDir/train/0.jpg", "masks/instances/0.png"):
    (folder / path).parent.mkdir(parents=True)
    (folder / path).touch()
  (folder / "run/checkpoints/4").mkdir(parents=True)  # a run in the data's folder
  for path in ("train/cat/Thumbs.db", "train/cat/.DS_Store", "train/@eaDir", "train/desktop.ini"):
    (folder / path).touch()
  (folder / "train/dog/@eaDir").mkdir()
  for split in ("train", "validation"):
    assert opened(folder, split).class_names == ["bird", "cat", "dog"]
  result = verify(f"folder:{folder}", None)
  assert result.ok
  assert [split.name for split in result.splits] == ["train", "validation"]
  assert "7 hidden or system files were passed over" in str(result)
  assert "no splits were left alone: masks, run" in str(result)
  made = prepare_folder(folder, "pets", tmp_path / "data", num_shards=1)
  assert "7 hidden or system files" in made
  assert open_split("pets", "train", str(tmp_path / "data")).class_names == ["bird", "cat", "dog"]


def test_classes_that_training_does_not_have_are_named(folder, tmp_path):
  (folder / "validation/cow").mkdir()
  (folder / "validation/cow/0.jpg").write_bytes(jpeg(0))
  assert opened(folder).num_classes == 3
  for use in (
    lambda: opened(folder, "validation"),
    lambda: verify(f"folder:{folder}", None),
    lambda: prepare_folder(folder, "pets", tmp_path / "data"),
  ):
    with pytest.raises(UsageError, match="validation has classes that train does not have: cow"):
      use()


def test_classes_come_from_the_training_split_whatever_its_name(folder):
  (folder / "train").rename(folder / "mine")
  source = open_split(f"folder:{folder}", "validation", None, train_split="mine[:50%]")
  assert source.class_names == ["bird", "cat", "dog"]


def test_other_names_of_splits_are_not_well(folder):
  (folder / "validation").rename(folder / "valid")
  (folder / "val").mkdir()
  (folder / "val/0.jpg").write_bytes(jpeg(0))
  said = r"no split 'validation'; it has train, valid; val has images that are in no class folder"
  with pytest.raises(UsageError, match=said):
    opened(folder, "validation")
  result = verify(f"folder:{folder}", None)
  assert not result.ok
  assert "validation_split" in str(result)
  assert len(opened(folder, "valid")) == 6


def test_val_and_validation_are_not_mistaken_for_each_other(folder, capsys):
  for split in ("val", "validation"):
    (folder / split / "a").mkdir(parents=True, exist_ok=True)
  assert cli.main(["data", "verify", f"folder:{folder}"]) == 1
  assert "both val and validation" in capsys.readouterr().err


def test_a_data_set_is_what_it_holds_not_where_it_lies(folder, tmp_path, monkeypatch):
  def state(source):
    with train_loader(source, TrainCrop(8), global_batch_size=2, seed=0) as loader:
      return loader.get_state()

  before = state(opened(folder))
  moved = folder.rename(tmp_path / "moved")
  monkeypatch.chdir(tmp_path)
  assert state(opened("moved")) == before
  (moved / "train/cat/0.jpg").rename(moved / "train/cat/new.jpg")
  message = "image folder of 6 images in 3 classes, names"
  with train_loader(opened(moved), TrainCrop(8), global_batch_size=2, seed=0) as loader:  # noqa: SIM117
    with pytest.raises(UsageError, match=message):
      loader.set_state(before)


def run(capsys, *arguments):
  status = cli.main(list(map(str, arguments)))
  return status, capsys.readouterr()[1]


@pytest.mark.parametrize("place", ["train/caf\udce9", "train/cat/caf\udce9.jpg"])
def test_names_that_are_not_utf8_are_one_line(folder, tmp_path, place, capsys):
  path = folder / place
  path.write_bytes(jpeg(0)) if place.endswith("jpg") else path.mkdir()
  prepare = ("prepare", "folder", "--folder", folder, "--name=pets", "--data-dir", tmp_path)
  for arguments in (("verify", f"folder:{folder}"), prepare):
    status, err = run(capsys, "data", *arguments)
    assert status == 1
    assert len(err.splitlines()) == 1
    assert r"caf\udce9" in err
    assert "not UTF-8; rename it" in err


@pytest.mark.parametrize("place", ["train", "train/cat", ""])
def test_a_folder_that_may_not_be_read_is_one_line(place, capsys):
  with tempfile.TemporaryDirectory() as top:  # others may enter it, unlike pytest's
    os.chmod(top, 0o755)
    folder = write_folder(Path(top, "images"), per_class=1)
    os.chmod(folder / place, 0)
    user = os.geteuid()
    if user == 0:
      os.seteuid(65534)  # root may read everything
    try:
      status, err = run(capsys, "data", "verify", f"folder:{folder}")
    finally:
      os.seteuid(user)
      os.chmod(folder / place, 0o755)
  assert status == 1
  assert len(err.splitlines()) == 1
  assert f"cannot read folder {folder / place}".rstrip("/") in err
  assert "Permission denied; let this user read it" in err


def test_nobodys_home(monkeypatch):
  monkeypatch.setenv("HOME", "")
  with pytest.raises(UsageError, match="set HOME, or name another directory"):
    disk.absolute("~/tensorflow_datasets")


# Pictures.


def photograph(orientation, kind="JPEG"):
  """A picture whose quarters have different colours, stored as the camera would, and upright."""
  upright = np.zeros((32, 48, 3), np.uint8)
  upright[:16, :24], upright[:16, 24:], upright[16:, :24] = (250, 0, 0), (0, 250, 0), (0, 0, 250)
  inverse = {6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
  inverse |= {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180}
  inverse |= {4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE}
  inverse |= {7: Image.Transpose.TRANSVERSE}
  image = Image.fromarray(upright)
  image = image.transpose(inverse[orientation]) if orientation > 1 else image
  exif = Image.Exif()
  exif[0x0112] = orientation
  return saved(image, kind, exif=exif), upright


def saved(image, kind, **options):
  with tempfile.TemporaryFile() as file:
    image.save(file, kind, **options)
    file.seek(0)
    return file.read()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_are_turned(orientation, kind):
  data, upright = photograph(orientation, kind)
  assert preprocess.orientation_of(data) == orientation
  found = preprocess.decode_jpeg(data, upright=True)
  assert found.shape == upright.shape
  for row, column in ((5, 5), (5, 40), (25, 5), (25, 40)):
    assert abs(found[row, column].astype(int) - upright[row, column]).max() < 20
  as_stored = preprocess.decode_jpeg(data)
  assert as_stored.shape[:2] == ((48, 32) if orientation > 4 else (32, 48))


def test_folders_and_copies_of_them_are_upright_and_counted(tmp_path):
  data, _ = photograph(6)
  for split in ("train", "validation"):
    (tmp_path / f"images/{split}/cat").mkdir(parents=True)
    (tmp_path / f"images/{split}/cat/0.jpg").write_bytes(data)
  prepare_folder(tmp_path / "images", "pets", tmp_path / "kept", num_shards=1)
  prepare_folder(tmp_path / "images", "pets", tmp_path / "small", num_shards=1, shorter_side=16)
  for name, root in ((f"folder:{tmp_path}/images", None), ("pets", tmp_path / "kept")):
    assert "train: 1 images have an EXIF orientation and are turned by it" in str(
      verify(name, root)
    )
  for name, root in (
    (f"folder:{tmp_path}/images", None),
    ("pets", str(tmp_path / "kept")),
    ("pets", str(tmp_path / "small")),
  ):
    source = open_split(name, "train", root)
    (batch,) = eval_batches(source, EvalCrop((16, 24), upright=source.upright), global_batch_size=1)
    with train_loader(
      source, TrainCrop((16, 24), (0.99, 1), upright=source.upright), global_batch_size=1, seed=0
    ) as loader:
      trained = next(loader)
    for image in (batch["image"][0], trained["image"][0]):
      assert image[3, 3].argmax() == 0
      assert image[3, 20].argmax() == 1
      assert image[12, 3].argmax() == 2


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_pictures_without_a_white_are_refused(dtype):
  image = Image.fromarray(np.full((8, 8), 200, dtype))
  with pytest.raises(preprocess.CorruptImage, match="save it with 8 or 16 bits"):
    preprocess.decode_jpeg(saved(image, "TIFF"))
  grey = Image.fromarray(np.full((8, 8), 200 << 8, np.uint16))
  for kind in ("TIFF", "PNG"):
    assert (preprocess.decode_jpeg(saved(grey, kind)) == 200).all()


def test_grey_of_12_bits():
  """Of which two lie in three bytes."""
  pixels = np.arange(0, 4096, 64, dtype=np.uint16).reshape(8, 8)
  first, second = pixels.ravel()[::2], pixels.ravel()[1::2]
  packed = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], axis=1)
  # Width, height, bits, uncompressed, black is zero, offset, samples, rows, bytes.
  tags = {256: 8, 257: 8, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: 8, 279: 96}
  directory = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
  start = struct.pack("<2sHI", b"II", 42, 8 + packed.size)
  tiff = start + packed.astype(np.uint8).tobytes() + struct.pack("<H", len(tags)) + directory
  image = preprocess.decode_jpeg(tiff + struct.pack("<I", 0))
  np.testing.assert_array_equal(image, np.repeat((pixels >> 4)[..., None], 3, axis=2))
