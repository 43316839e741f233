"""Reference values of whole detectors, and how their weights and images are made (NumPy only)."""

import fnmatch
import json

import jax
import jax.numpy as jnp
import numpy as np
from fixture_detection import DATA, nhwc, priority
from fixture_weights import normal
from fixture_weights import weight as plain_weight
from flax import nnx

import lip_jax
from lip_jax.detection.registry import abstract_detector

MODELS = json.loads((DATA / "models.json").read_text())


def weight(key: str, shape: tuple[int, ...], rules) -> np.ndarray:
  """Of one entry of a state dict; the first rule (pattern, scale, shift) that fits changes it."""
  value = plain_weight(key, shape)
  if value.dtype == np.int64:
    return value
  for pattern, scale, shift in rules:
    if fnmatch.fnmatchcase(key, pattern):
      return value.astype(np.float64) * scale + shift
  return value.astype(np.float64)


def state_dict(model: str) -> dict[str, np.ndarray]:
  spec = MODELS[model]
  return {
    key: weight(key, tuple(shape), spec["rules"]) for key, shape in spec["state_dict"].items()
  }


def image(name: str, height: int, width: int) -> np.ndarray:
  """[3, H, W] of noise in blocks of 64, 16 and 4 pixels, and a little noise per pixel."""
  shape = (3, height, width)
  out = 0.25 * normal(f"image/{name}/1", shape).astype(np.float64)
  for block in (4, 16, 64):
    small = (3, -(-height // block), -(-width // block))
    coarse = normal(f"image/{name}/{block}", small).astype(np.float64)
    out += coarse.repeat(block, 1).repeat(block, 2)[:, :height, :width]
  return out


def batch(names: list[str]) -> tuple[np.ndarray, np.ndarray]:
  """(images [N, H, W, 3], sizes [N, 2]) of scenes, padded with zeros to a multiple of 32."""
  scenes = [MODELS["scenes"][name] for name in names]
  sizes = np.array([[scene["height"], scene["width"]] for scene in scenes])
  height, width = -(-sizes.max(axis=0) // 32) * 32
  images = np.zeros((len(scenes), 3, height, width))
  for k, scene in enumerate(scenes):
    pixels = image(scene["image"], scene["height"], scene["width"])
    images[k, :, : scene["height"], : scene["width"]] = pixels
  return nhwc(images), sizes


def targets(names: list[str], preset: str) -> dict[str, np.ndarray]:
  """What the scenes contain, padded to eight boxes each."""
  out = {
    "boxes": np.zeros((len(names), 8, 4)),
    "labels": np.zeros((len(names), 8), np.int32),
    "valid": np.zeros((len(names), 8), bool),
    "crowd": np.zeros((len(names), 8), bool),
  }
  for k, name in enumerate(names):
    scene = MODELS["scenes"][name]
    count = len(scene["boxes_xywh"])
    boxes = np.array(scene["boxes_xywh"], np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    out["boxes"][k, :count] = boxes
    out["labels"][k, :count] = np.array(scene["classes"], np.int32) + (preset == "torchvision")
    out["valid"][k, :count] = True
  return out


def priorities(model: str, case: str, anchors: int, room: int) -> dict[str, np.ndarray]:
  """Of the samplers of two images, for so many anchors and, of each image, boxes."""
  counts = {"rpn": anchors, "proposal": 2000, "gt": room}
  drawn = {"rpn": anchors, "proposal": 2000, "gt": 100}
  return {
    kind: np.stack(
      [priority(f"detection/{model}/{case}/{kind}/{k}", drawn[kind])[:count] for k in range(2)]
    )
    for kind, count in counts.items()
  }


def detector(model: str, dtype=jnp.float64, **options):
  """The detector of a reference, with its weights; quick, as nothing is initialised."""
  preset, name, backbone = model.replace("fasterrcnn", "faster-rcnn").split("_", 2)
  name = name.replace("-", "_")
  options = {"mask_padding": None, **options}
  made = abstract_detector(name, backbone=backbone, preset=preset, dtype=dtype, **options)
  lip_jax.load_torch_weights(made, state_dict(model))
  return made


def convolve_by_products(module: nnx.Module) -> None:
  """Makes convolutions matrix products: in float64 XLA has none that are quick on CPUs."""
  for _, part in nnx.iter_modules(module):
    if isinstance(part, nnx.Conv):
      part.conv_general_dilated = _by_product


def _by_product(x, kernel, strides, pads, **_):
  height, width, inputs, outputs = kernel.shape
  down, right = strides
  x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
  rows, columns = (x.shape[1] - height) // down + 1, (x.shape[2] - width) // right + 1
  taps = [
    jax.lax.slice(
      x,
      (0, i, j, 0),
      (len(x), i + down * (rows - 1) + 1, j + right * (columns - 1) + 1, inputs),
      (1, down, right, 1),
    )
    for i in range(height)
    for j in range(width)
  ]
  return jnp.concatenate(taps, axis=3) @ kernel.reshape(-1, outputs)


def check_detections(found, name, rtol):
  expected = np.load(DATA / f"{name}.npz")
  pixel = np.array([0, 0, 1, 1]) * name.startswith("mmdet1")
  for k, count in enumerate(MODELS[name]["eval"]["detections"]):
    assert found.valid[k].sum() == count
    np.testing.assert_array_equal(found.labels[k, :count], expected[f"eval/{k}/labels"])
    np.testing.assert_allclose(found.scores[k, :count], expected[f"eval/{k}/scores"], rtol=rtol)
    boxes = expected[f"eval/{k}/boxes"] + pixel
    np.testing.assert_allclose(found.boxes[k, :count], boxes, rtol=rtol, atol=rtol)


def check_gradients(gradients, name, case):
  """Those in a detector's parameters, against norms and, of a few, all values."""
  named = lip_jax.to_torch_state_dict(gradients)
  for key, norm in MODELS[name]["train"][case]["gradient_norms"].items():
    np.testing.assert_allclose(np.linalg.norm(named[key]), norm, rtol=1e-8, err_msg=key)
  stored = np.load(DATA / f"{name}.npz")
  for key in stored.files:
    if key.startswith(f"train/{case}/gradient/"):
      of, full = named[key.rpartition("/")[2]], stored[key]
      np.testing.assert_allclose(of, full, rtol=0, atol=1e-8 * np.abs(full).max(), err_msg=key)
