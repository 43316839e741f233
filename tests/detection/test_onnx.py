"""Detectors as ONNX files, run by ONNX Runtime."""

import fixture_small_detectors as small
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixture_detection import assert_same_detections
from flax import nnx

from lip_jax import cli
from lip_jax.detection.inputs import normalize
from lip_jax.errors import UsageError
from lip_jax.export import folders, onnx_graph, saving, stablehlo_onnx
from lip_jax.models.description import flat_variables
from lip_jax.ops.deform_conv import deform_conv

runtime = pytest.importorskip("onnxruntime")

PREPROCESS = {"short_side": 48, "long_side": 64, "mean": [128.0] * 3, "std": [64.0] * 3}
# So that scores differ, but are not all 1.
QUIET = {"rpn.logits.kernel": 0.05, "box_head.class_logits.kernel": 0.1}
DEFORMABLE = {"backbone": "lip_resnet101_md", "stage_sizes": (1, 2, 2, 2)}
SIZES = np.array([[64, 64], [40, 33], [50, 64]], np.int32)


@pytest.fixture(scope="module")
def images():
  """Noise; the last shows nothing but a little of it."""
  images = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), np.uint8)
  images[2] = 124 + images[2] // 32
  return images


def save(folder, name, sees, **options):
  """An exported folder of a small detector, and the detector."""
  detector = nnx.merge(*small.create(name, mask_padding=True, **options))
  detector.eval()
  for key, variable in flat_variables(detector).items():
    variable.set_value(variable[...] * QUIET.get(key, 1))
  if not sees:
    bias = detector.head.class_logits.bias
    bias.set_value(bias[...] - 1000)
  model = {"name": name, "backbone": "lip_resnet_small", **small.SMALL[name], **options}
  config = {"task": "detection", "num_classes": model.pop("num_classes"), "model": model}
  folders.save(folder, detector, {**config, "preprocess": PREPROCESS})
  return detector


@pytest.mark.parametrize(
  ("name", "sees", "options"),
  [
    ("retinanet", True, {"preset": "torchvision"}),
    ("retinanet", False, {"preset": "mmdet1"}),
    ("faster_rcnn", True, {"preset": "mmdet1", **DEFORMABLE}),
  ],
)
def test_finds_what_the_model_does(name, sees, options, images, tmp_path, capsys):
  """Images of several sizes in one batch, one alone, and a detector that sees objects nowhere."""
  detector = save(tmp_path / "folder", name, sees, **options)
  path = tmp_path / "detector.onnx"
  assert cli.main(["export", str(tmp_path / "folder"), str(path)]) == 0
  printed = capsys.readouterr().out
  assert "takes uint8 RGB images [N, 64, 64, 3] and their sizes [N, 2]" in printed
  said = "px (0.01 is" if sees else "detections are chosen by (0.0001 is"
  assert f"{said} allowed)" in printed
  call, config = stablehlo_onnx.load_onnx(path)
  assert config["outputs"] == ["boxes", "scores", "labels", "valid"]
  pixels = normalize(images, SIZES, PREPROCESS["mean"], PREPROCESS["std"])
  expected = jax.device_get(jax.jit(lambda x, s: detector.detect(x, s))(pixels, SIZES))
  found = call(images, SIZES)
  assert [array.dtype for array in found] == [array.dtype for array in expected]
  assert found[3].any() == sees
  assert not sees or np.median(found[1][found[3]]) < 0.99  # scores that tell
  assert_same_detections(found, expected)
  assert_same_detections(call(images[1:2], SIZES[1:2]), [array[1:2] for array in expected])


def test_half_precision_is_refused(tmp_path):
  save(tmp_path / "folder", "retinanet", True, preset="mmdet1")
  with pytest.raises(UsageError, match="detectors as ONNX compute in float32 only, not float16"):
    saving.write(tmp_path / "folder", tmp_path / "x.onnx", dtype="float16")


@pytest.mark.parametrize(("stride", "groups"), [(1, 2), (2, 1)])
def test_deformable_convolution(stride, groups):
  rng = np.random.default_rng(0)
  x = np.float32(rng.normal(size=(2, 8, 6, 4)))
  kernel = np.float32(rng.normal(size=(3, 3, 4 // groups, 6)))

  def function(x):
    offset = 2 * jnp.concatenate([x * k for k in range(-2, 3)], axis=3)
    strided = jax.lax.slice(offset, (0, 0, 0, 0), (*x.shape[:3], 18), (1, stride, stride, 1))
    return deform_conv(x, strided, kernel, stride=stride).reshape(x.shape[0], -1)

  (batch,) = jax.export.symbolic_shape("batch")
  model = onnx_graph.to_onnx(function, jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype))
  assert any(node.op_type == "DeformConv" for node in model.graph.node)
  (found,) = runtime.InferenceSession(model.SerializeToString()).run(None, {"images": x})
  np.testing.assert_allclose(found, jax.jit(function)(x), rtol=0, atol=1e-4)
