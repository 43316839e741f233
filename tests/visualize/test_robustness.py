"""Shift consistency and deletion curves, and the command that prints and draws them."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from fixture_weights import weight
from flax import nnx
from PIL import Image

from lip_jax import cli, visualize
from lip_jax.export import folders
from lip_jax.models import abstract_model

RNG = np.random.default_rng(0)


def looks_at(row, column):
  """Predicts class 0 where that pixel is above 1/2, else class 1; logits are the pixel and 1/2."""
  return lambda images: np.stack(
    [images[:, row, column, 0], np.full(len(images), 0.5, images.dtype)], axis=1
  )


def counts_bright(images):
  """Does not depend on where anything is."""
  count = (images > 0.5).sum(axis=(1, 2, 3))
  return np.stack([count, np.full(len(images), images[0].size / 2)], axis=1)


def square(size, half):
  """A white square of side 2 * half + 1 in the middle of a black image."""
  images = np.zeros((1, size, size, 3))
  middle = slice(size // 2 - half, size // 2 + half + 1)
  images[:, middle, middle] = 1
  return images


def test_a_network_that_ignores_places_is_consistent():
  images = RNG.random((20, 10, 12, 3))
  predictions = counts_bright(images).argmax(axis=1)
  assert 0 < predictions.sum() < 20  # both classes
  found = visualize.shift_consistency(counts_bright, images, border="wrap")
  assert found == dict.fromkeys(range(1, 9), 1.0)


@pytest.mark.parametrize("border", ["zero", "reflect", "wrap"])
def test_a_network_that_looks_at_one_pixel_loses_it(border):
  images = square(21, 2)
  found = visualize.shift_consistency(looks_at(10, 10), images, border=border)
  assert found == {d: float(d <= 2) for d in range(1, 9)}


def test_what_a_shift_brings_in():
  images = np.zeros((1, 12, 12, 3))
  images[:, 0] = 1  # one edge
  # In the image at that edge, or black behind it: of eight directions the three that move the image
  # down bring in the outside (3/8 differ where it is black), and three others bring in the inside.
  differ = {"zero": 6 / 8, "reflect": 6 / 8, "wrap": 6 / 8}
  for border, part in differ.items():
    found = visualize.shift_consistency(looks_at(0, 5), images, [1], border)
    assert found == {1: 1 - part}
  images[:, 1:3] = 1  # a broad edge: only zeros differ from it
  for border, part in {"zero": 3 / 8, "reflect": 0, "wrap": 3 / 8}.items():
    assert visualize.shift_consistency(looks_at(0, 5), images, [1], border) == {1: 1 - part}
  # Cropped, the looked-at pixel is that of the middle; a shift of 2 moves the image, not the frame.
  images = square(25, 1)
  found = visualize.shift_consistency(looks_at(10, 10), images, [1, 2], "crop")
  assert found == {1: 1.0, 2: 0.0}
  with pytest.raises(ValueError, match="too small for a shift of 12"):
    visualize.shift_consistency(looks_at(0, 0), np.zeros((1, 12, 12, 3)), [12])
  with pytest.raises(ValueError, match="unknown border 'blur'"):
    visualize.shift_consistency(looks_at(0, 0), images, [1], "blur")


def test_deletion_of_the_pixel_that_counts():
  images = np.full((3, 4, 5, 3), 7.0)
  images[:, 2, 3] = 1.0
  scores = RNG.random((3, 4, 5))
  scores[:, 2, 3] = 2.0
  fractions = np.linspace(0, 1, 21)
  # Logits 1 and 1/2, and then 0 and 1/2.
  before, after = 1 / (1 + np.exp(-0.5)), 1 / (1 + np.exp(0.5))
  predict = looks_at(2, 3)
  most = visualize.deletion_curve(predict, images, scores)
  np.testing.assert_allclose(most.fractions, fractions)
  np.testing.assert_array_equal(most.accuracy, [1.0] + [0.0] * 20)
  np.testing.assert_allclose(most.probability, [before] + [after] * 20, rtol=1e-12)
  assert most.area == pytest.approx(after + (before - after) / 40)
  assert most.accuracy_area == pytest.approx(1 / 40)
  least = visualize.deletion_curve(predict, images, scores, most_first=False)
  np.testing.assert_array_equal(least.accuracy, [1.0] * 20 + [0.0])
  wrong = visualize.deletion_curve(predict, images, scores, np.array([1, 1, 0]))
  np.testing.assert_allclose(wrong.accuracy, [1 / 3] + [2 / 3] * 20)
  kept = visualize.deletion_curve(predict, images, scores, fill=1.0, fractions=[0, 0.5, 1])
  np.testing.assert_array_equal(kept.accuracy, [1, 1, 1])
  with pytest.raises(ValueError, match=r"scores must be \(3, 4, 5\)"):
    visualize.deletion_curve(predict, images, scores[:, :2])


def test_a_predictor_takes_any_number_of_images():
  model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
  images = RNG.standard_normal((7, 3)).astype(np.float32)
  found = visualize.predictor(model, batch_size=3)(images)
  np.testing.assert_allclose(found, model(jnp.asarray(images)), rtol=1e-5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Two exported networks, "lip" and "max", and images of two classes."""
  path = tmp_path_factory.mktemp("visualize")
  for name in ("lip", "max"):
    options = {"width": 2, "logit_width": 2, "pool": name}
    model = abstract_model("lip_resnet_small", num_classes=2, **options)
    for place, variable in nnx.to_flat_state(nnx.state(model, (nnx.Param, nnx.BatchStat))):
      key = ".".join(map(str, place)).replace("var", "running_var")
      variable.set_value(jnp.asarray(weight(key, variable.shape), variable.dtype))
    preprocess = {"image_size": 16, "resize": 16, "mean": [128.0] * 3, "std": [64.0] * 3}
    network = {"model": {"name": "lip_resnet_small", **options}, "num_classes": 2}
    config = {**network, "preprocess": preprocess, "class_names": ["cat", "dog"]}
    folders.save(path / name, model, config)
  for split in ("train", "validation"):
    for label in ("cat", "dog"):
      (path / "data" / split / label).mkdir(parents=True)
      for number in range(2):
        pixels = RNG.integers(0, 256, (16, 16, 3), np.uint8)
        Image.fromarray(pixels).save(path / "data" / split / label / f"{number}.png")
  return path


def run(capsys, *arguments):
  """Exit status, stdout and stderr of `lip-jax visualize`."""
  status = cli.main(["visualize", *map(str, arguments)])
  return status, *capsys.readouterr()


def test_the_figure(capsys, folder, tmp_path):
  out = tmp_path / "figure.svg"
  data = f"--data=folder:{folder / 'data'}"
  status, printed, _ = run(capsys, folder / "lip", folder / "max", data, f"--out={out}")
  assert (status, printed) == (0, f"figure: {out}\n")
  text = out.read_text()
  assert text.startswith("<?xml")
  for label in ("lip", "max", "label: cat", "no LIP", "importance", "activation", "receptive"):
    assert f"<!-- {label}" in text
  out = tmp_path / "figure.png"
  image = folder / "data" / "train" / "cat" / "0.png"
  asked = ("--class=dog", "--location=0,0", "--location=0,0", f"--out={out}")
  assert run(capsys, folder / "max", image, *asked)[0] == 0
  assert out.read_bytes().startswith(b"\x89PNG")


def test_the_numbers(capsys, folder, tmp_path):
  out = tmp_path / "numbers.pdf"
  arguments = (
    *(folder / "lip", folder / "max", "--names", "LIP", "maximum"),
    *("--shift-consistency", "--border=wrap", "--deletion", f"--data=folder:{folder / 'data'}"),
  )
  status, printed, _ = run(capsys, *arguments, "--json", f"--out={out}")
  assert status == 0
  assert out.read_bytes().startswith(b"%PDF")
  report = json.loads(printed)
  assert (report["border"], report["fill"]) == ("wrap", "dataset")
  for entry, name, by in zip(
    report["networks"], ("LIP", "maximum"), ("importance", "cam"), strict=True
  ):
    assert (entry["name"], entry["images"], entry["deletion"]["pixels_by"]) == (name, 4, by)
    consistency = list(entry["shift_consistency"].values())
    assert len(consistency) == 8
    assert all((32 * value).is_integer() for value in consistency)  # 4 images, 8 directions
    assert entry["mean_shift_consistency"] == pytest.approx(np.mean(consistency))
    curves = [entry["deletion"][order] for order in visualize.compare.ORDERS]
    for end in (0, -1):  # whatever the order, the whole images, and nothing of them
      assert len({curve["probability"][end] for curve in curves}) == 1
  image = folder / "data" / "train" / "cat" / "0.png"
  numbers = ("--shift-consistency", "--border=wrap", "--deletion")
  status, printed, _ = run(capsys, folder / "max", image, *numbers)
  assert status == 0
  assert "survive a shift, in percent: 1 images in 8 directions, border: wrap" in printed
  assert "least important first" in printed
  assert "against their predictions for the whole images" in printed


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["{lip}"], "does not say what it was trained on; give image files"),
    (["{lip}", "--out=x.gif"], "must end in .png, .svg, .pdf"),
    (["{lip}", "--out=none/x.png"], "there is no folder none"),
    (["{lip}/none", "a.png"], "there is no folder"),
    (["a.png"], "no network is given"),
    (["{lip}", "none.png"], "cannot read the image none.png"),
    (["{lip}", "{image}", "--class=cow"], "no class 'cow'; give a name, such as cat, dog"),
    (["{max}", "{image}", "--location=0,9"], "outside the map; rows are 0 to 0"),
    (["{max}", "{image}", "--layers"], "has no LIP layer"),
    (["{max}", "{image}", "--deletion", "--by=importance"], "has no LIP layer"),
    (["{lip}", "--data=fake:4", "--deletion"], "the network has 2 classes and fake:4 validation"),
    (["{lip}", "{image}", "--shift-consistency", "--border=crop"], "needs 8 pixels"),
    (["{lip}", "{image}", "--json"], "add --shift-consistency or --deletion"),
    (["{lip}", "{image}", "--names", "a", "b"], "2 names for 1 networks"),
  ],
)
def test_errors(capsys, monkeypatch, tmp_path, folder, arguments, message):
  monkeypatch.chdir(tmp_path)
  image = folder / "data" / "train" / "cat" / "0.png"
  # --names takes all that follows it, so that it stands behind the paths here.
  filled = [a.format(lip=folder / "lip", max=folder / "max", image=image) for a in arguments]
  status, out, err = run(capsys, *filled)
  assert (status, out) == (1, "")
  assert message in err
  assert len(err.splitlines()) == 1
  assert not list(tmp_path.iterdir())
