import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lip_jax
from lip_jax.errors import UsageError
from lip_jax.models import abstract_model, downsample, lan, layers, logit_modules


def count(model):
  return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


def images(n=2, size=32, seed=0):
  shape = (n, size, size, 3) if isinstance(size, int) else (n, *size, 3)
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.mark.parametrize(
  ("name", "options", "expected"),
  [
    ("lip_resnet50", {}, 23_864_232),
    ("lip_resnet50", {"logit_width": 64}, 23_244_968),
    ("lip_resnet50", {"logit_width": 256}, 25_766_312),
    ("lip_resnet50", {"pool": "average"}, 22_804_520),
    ("lip_resnet101", {}, 42_856_360),
    ("lip_resnet152", {}, 58_500_008),
    ("lip_resnet101_md", {"num_classes": 0}, 41_948_326),
    ("lip_densenet121", {}, 8_690_920),
    # torchvision's
    ("resnet18", {}, 11_689_512),
    ("resnet34", {}, 21_797_672),
    ("resnet50", {}, 25_557_032),
    ("resnet101", {}, 44_549_160),
    ("resnet152", {}, 60_192_808),
    ("resnext50_32x4d", {}, 25_028_904),
    ("resnext101_64x4d", {}, 83_455_272),
    ("densenet121", {}, 7_978_856),
    ("densenet169", {}, 14_149_480),
    ("densenet201", {}, 20_013_928),
    ("densenet161", {}, 28_681_000),
  ],
)
def test_parameter_counts(name, options, expected):
  assert count(abstract_model(name, **options)) == expected


@pytest.mark.parametrize(
  ("name", "expected"),
  [
    ("lip_resnet50", (256, 512, 1024, 2048)),
    ("lip_resnet18", (64, 128, 256, 512)),
    ("resnet50", (256, 512, 1024, 2048)),
    ("lip_densenet121", (256, 512, 1024, 1024)),
  ],
)
def test_features_have_the_named_strides(name, expected):
  model = abstract_model(name)
  shapes = jax.eval_shape(
    lambda model, x: model.features(x), model, jax.ShapeDtypeStruct((2, 224, 192, 3), jnp.float32)
  )
  for level, channels in zip(("c2", "c3", "c4", "c5"), expected, strict=True):
    stride = 2 ** int(level[1])
    assert shapes[level].shape == (2, 224 // stride, 192 // stride, channels)


def test_the_papers_networks_and_the_plain_ones_have_names():
  networks = [f"resnet{depth}" for depth in (18, 34, 50, 101, 152)]
  networks += [f"densenet{depth}" for depth in (121, 161, 169, 201)]
  assert {*networks, *(f"lip_{name}" for name in networks)} <= set(lip_jax.list_models())


SMALL = {
  "resnet": {"name": "resnet_small", "width": 4},
  "basic": {"name": "resnet_small", "width": 8, "block": "basic"},
  "densenet": {"name": "densenet121", "block_sizes": (1, 2, 1, 1), "growth": 4, "width": 8},
}


def small(network, **options):
  options = {**SMALL[network], "num_classes": 10, "logit_width": 4, **options}
  return lip_jax.create_model(**options, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("network", SMALL)
def test_bfloat16_networks_give_float32_logits(network):
  options = {**SMALL[network], "pool": "lip", "num_classes": 7, "dtype": jnp.bfloat16}
  model = abstract_model(options.pop("name"), **options)
  x = jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.float32)
  logits = jax.eval_shape(lambda model, x: model(x), model, x)
  assert (logits.shape, logits.dtype) == ((2, 7), jnp.float32)
  assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))} == {jnp.dtype("float32")}


def with_pool(network, **options):
  """A small network; the average-pooled network gets all its weights that it has, too."""
  model, average = small(network, **options), small(network, pool="average")
  ours = dict(nnx.to_flat_state(nnx.state(model)))
  for path, variable in nnx.to_flat_state(nnx.state(average)):
    if ours[path].shape == variable.shape:
      variable.set_value(ours[path][...])
  return model, average


def run(model, x):
  graph, state = nnx.split(model)
  return jax.jit(lambda s, x: nnx.merge(graph, s, copy=True)(x))(state, x)


@pytest.mark.parametrize(
  ("network", "mode", "options"),
  [
    ("resnet", "train", {"logit": "bottleneck"}),
    ("resnet", "eval", {"logit": "projection"}),
    ("resnet", "eval", {"logit": "bottleneck", "logit_top": "norm"}),
    ("resnet", "eval", {"logit": "projection", "logit_top": "gate"}),
    ("resnet", "eval", {"logit": "bottleneck", "logit_top": "none", "average_steps": 3}),
    ("resnet", "eval", {"logit": "bottleneck", "logit_top": "none"}),
    ("basic", "eval", {"logit": "bottleneck"}),
    ("densenet", "train", {"logit": "bottleneck"}),
    ("densenet", "eval", {"logit": "projection"}),
  ],
  ids=str,
)
def test_lip_networks_start_as_average_pooling(network, mode, options):
  model, average = with_pool(network, pool="lip", **options)
  assert count(model) > count(average)
  getattr(model, mode)()
  getattr(average, mode)()
  x = images(size=64 if network == "densenet" else 32)
  np.testing.assert_allclose(run(model, x), run(average, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("network", SMALL)
def test_networks_differ_in_their_poolings_alone(network):
  """All poolings: the same convolutions everywhere but where they down-sample."""
  options = {k: v for k, v in SMALL[network].items() if k != "name"}
  shapes = {}
  for pool in downsample.POOLS:
    state = nnx.state(abstract_model(SMALL[network]["name"], pool=pool, **options))
    shapes[pool] = {
      ".".join(map(str, path)): variable.shape for path, variable in nnx.to_flat_state(state)
    }
  assert shapes["average"] == shapes["max"] == shapes["soft"] == shapes["lp"]
  assert shapes["original"] == shapes["strided"]
  different = {
    path
    for ours in shapes.values()
    for path in shapes["average"].keys() | ours.keys()
    if shapes["average"].get(path) != ours.get(path)
  }
  assert different
  places = ("pool.", "pool0.") if network == "densenet" else ("pool.",)
  inside = ".pool." if network == "densenet" else ".0.spatial."
  assert all(path.startswith(places) or inside in path for path in different)


@pytest.mark.parametrize("pool", ["exp", "lp", "dpp_full_asym", "soft"])
@pytest.mark.parametrize("network", ["resnet", "densenet"])
def test_every_pooling_runs_in_a_network(network, pool):
  model = small(network, pool=pool)
  model.eval()
  logits = run(model, images(1, (37, 45)))
  assert logits.shape == (1, 10)
  assert np.isfinite(logits).all()


def test_dense_structure_pools_behind_the_block():
  """Saeedan et al. 2018: all convolutions of the block at full resolution, one pooling behind."""
  model = small("resnet", pool="dpp_lite_sym", structure="dense")
  assert isinstance(model.pool, lan.MaxPool)
  block = model.layer2[0]
  assert isinstance(block.pool, lan.DetailPreservingPool)
  assert block.pool.log_alpha.shape == (32,)
  x = images(1, 8)[..., :1] * jnp.ones((1, 1, 1, 16))
  h, shortcut = block.spatial(x, jnp.ones((1, 8, 8, 8)))
  assert h.shape == (1, 8, 8, 8)
  assert shortcut.shape == (1, 8, 8, 32)
  assert block(x).shape == (1, 4, 4, 32)
  assert run(model, images()).shape == (2, 10)


@pytest.mark.parametrize("network", ["resnet", "densenet"])
def test_lip_at_some_places_only(network):
  def lip_layers(stages):
    model = small(network, pool="lip", lip_stages=stages)
    return {
      ".".join(map(str, path)) for path, m in nnx.iter_modules(model) if isinstance(m, lip_jax.LIP)
    }

  everywhere = lip_layers(("stem", "c3", "c4", "c5"))
  assert len(everywhere) == (7 if network == "resnet" else 4)
  assert lip_layers(()) == set()
  some = lip_layers(("stem", "c4"))
  assert some < everywhere
  expected = {"pool", "layer3"} if network == "resnet" else {"pool0", "transition2"}
  assert {name.split(".")[0] for name in some} == expected


@pytest.mark.parametrize("logit", downsample.LOGITS)
def test_the_logits_of_a_downsampling_block_come_from_its_input(logit):
  """Section 3.3, figure 4b: for both branches; those of a bottleneck by one trunk."""
  model = lip_jax.create_model(
    "lip_resnet_small", logit=logit, width=4, num_classes=3, rngs=nnx.Rngs(0)
  )
  transition = model.layer2[0].spatial
  x, h = images(1, 8)[..., :1] * jnp.ones((1, 1, 1, 16)), jnp.ones((1, 8, 8, 8))
  for pool in (transition.residual_pool, transition.shortcut_pool):
    kernel = pool.logits.conv.kernel
    kernel[...] = jnp.asarray(np.random.default_rng(1).standard_normal(kernel.shape), jnp.float32)
  with lan.record_logits() as records:
    transition(x, h)
  shared = transition.trunk(x) if logit == "bottleneck" else x
  assert [layer for layer, _ in records] == [transition.residual_pool, transition.shortcut_pool]
  for layer, logits in records:
    np.testing.assert_allclose(logits, layer.logits(shared), rtol=1e-5, atol=1e-5)


def test_odd_and_non_square_images():
  for network in SMALL:
    model = small(network, pool="lip")
    model.eval()
    assert run(model, images(1, (37, 51))).shape == (1, 10)


def parameters(model, *kinds):
  """Values by path."""
  return {path: leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(model, kinds or nnx.Param))}


@pytest.mark.parametrize("network", ["resnet", "densenet"])
def test_backbones_have_no_classifier_and_take_the_weights_of_networks_with_one(network):
  whole, backbone = small(network, pool="lip"), small(network, pool="lip", num_classes=0)
  theirs, kinds = lip_jax.to_torch_state_dict(whole), (nnx.Param, nnx.BatchStat)
  lip_jax.load_torch_weights(backbone, {name: value + 1 for name, value in theirs.items()})
  ours = parameters(backbone, *kinds)
  expected = parameters(whole, *kinds)
  assert {path[0] for path in expected.keys() - ours.keys()} == {whole.classifier_name}
  for path, value in ours.items():
    np.testing.assert_array_equal(value, expected[path] + 1)
  graph, state = nnx.split(backbone)

  @jax.jit
  def pooled_and_features(state, x):
    model = nnx.merge(graph, state, copy=True)
    model.eval()
    return model(x), model.features(x)

  pooled, features = pooled_and_features(state, images(2, (35, 64)))
  assert pooled.dtype == jnp.float32
  np.testing.assert_allclose(pooled, features["c5"].mean(axis=(1, 2)), rtol=1e-5)
  assert lip_jax.to_torch_state_dict(backbone).keys() < theirs.keys()


@pytest.mark.parametrize("network", ["resnet", "densenet"])
def test_stages_name_what_computes_them(network):
  """What is not a number in the fourth stage reaches the features of no stage before it."""
  model = small(network, pool="lip", num_classes=0, bn_frozen=True)
  named = [name for names in model.stages.values() for name in names]
  assert len(set(named)) == len(named)
  assert {path[0] for path in parameters(model)} | {model.classifier_name} == set(named)
  for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
    if path[0] in model.stages["c4"]:
      variable.set_value(jnp.full_like(variable[...], jnp.nan))
  features = jax.jit(lambda x: model.features(x))(images(1, 64))
  finite = {stage: bool(np.isfinite(value).all()) for stage, value in features.items()}
  assert finite == {"stem": True, "c2": True, "c3": True, "c4": False, "c5": False}


def test_frozen_batch_norm_and_its_epsilon_are_those_of_all_layers():
  model = small("resnet", bn_frozen=True, bn_epsilon=0.0)
  norms = [m for _, m in nnx.iter_modules(model) if isinstance(m, layers.BatchNorm)]
  assert all(norm.frozen and norm.epsilon == 0 for norm in norms)
  before, x = parameters(model, nnx.BatchStat), images(3)
  graph, state = nnx.split(model)

  @jax.jit
  def both(state, x):
    model = nnx.merge(graph, state, copy=True)
    trained = model(x)
    stats = nnx.state(model, nnx.BatchStat)
    model.eval()
    return trained, model(x), stats

  trained, evaluated, stats = both(state, x)
  np.testing.assert_array_equal(trained, evaluated)
  for path, leaf in nnx.to_flat_state(stats):
    np.testing.assert_array_equal(leaf[...], before[path])


@pytest.mark.parametrize("network", SMALL)
@pytest.mark.parametrize("channels", [1, 4])
def test_images_of_other_numbers_of_channels(network, channels):
  options = {**SMALL[network], "pool": "lip", "num_classes": 7, "in_channels": channels}
  model = abstract_model(options.pop("name"), **options)
  forward = lambda channels: jax.eval_shape(  # noqa: E731
    lambda model, x: model(x), model, jax.ShapeDtypeStruct((2, 33, 64, channels), jnp.float32)
  )
  assert forward(channels).shape == (2, 7)
  with pytest.raises(ValueError, match=rf"\[N, H, W, {channels}\], got shape \(2, 33, 64, 3\)"):
    forward(3)


def test_lip_layer_in_a_users_own_model():
  class Net(nnx.Module):
    def __init__(self, rngs):
      self.conv = nnx.Conv(3, 8, (3, 3), rngs=rngs)
      self.pool = lip_jax.LIP(lip_jax.Projection(8, 8, rngs=rngs))

    def __call__(self, x):
      return self.pool(nnx.relu(self.conv(x)))

  net = Net(nnx.Rngs(0))
  x = images(2, 16)
  np.testing.assert_allclose(
    net(x), lip_jax.average_pool(nnx.relu(net.conv(x))), rtol=1e-5, atol=1e-5
  )


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"name": "resnet51"}, "unknown model 'resnet51'; choose one of .*resnet50"),
    ({"logits": "x"}, "unknown option logits for .* valid options: .*logit, logit_top"),
    ({"pool": "lipp"}, "unknown pool 'lipp'; choose one of original, strided, .* lip"),
    ({"logit": "x"}, "unknown logit 'x'; choose one of projection, bottleneck"),
    ({"logit_top": "x"}, "unknown logit_top 'x'; choose one of norm_gate, norm, gate, none"),
    ({"structure": "x"}, "unknown structure 'x'; choose one of baseline, dense"),
    ({"lip_stages": ("c2",)}, r"lip_stages must be some of stem, c3, c4, c5, got \('c2',\)"),
    ({"lip_stages": "c5"}, "lip_stages must be some of"),
    ({"lip_stages": None}, "lip_stages must be some of"),
    ({"average_steps": -1}, "average_steps must be a whole number and at least 0, got -1"),
    ({"average_steps": 1.5}, "average_steps must be a whole number"),
    ({"pool": "lp", "pool_parameter": 0.5}, "exponent .* at least 1; got 0.5"),
    ({"pool": "exp", "pool_parameter": float("nan")}, "must be a finite number"),
    ({"pool": "max", "pool_parameter": 3.0}, "pool 'max' has none"),
    ({"stage_sizes": 3}, "stage_sizes must be four positive numbers, got 3"),
    ({"stage_sizes": (1, 0, 1, 1)}, r"stage_sizes\[1\] must be a whole number and positive, got 0"),
    ({"width": "x"}, "width must be a whole number and positive, got 'x'"),
    ({"dtype": jnp.float64}, "float64 needs JAX's x64 mode"),
    ({"name": "lip_densenet121", "block_sizes": (1,)}, "four positive numbers"),
    ({"name": "lip_densenet121", "growth": 0}, "growth must be .* positive, got 0"),
    ({"block": "x"}, "unknown block 'x'; choose one of bottleneck, basic"),
    ({"stem": "x"}, "unknown stem 'x'; choose one of imagenet, small"),
    ({"stage_sizes": (1, 2)}, "four positive numbers"),
    ({"logit_width": 0}, "logit_width must be .* positive, got 0"),
    ({"bn_group_size": -8}, "bn_group_size must be .* at least 0, got -8"),
    ({"bn_frozen": "yes"}, "bn_frozen must be True or False, got 'yes'"),
    ({"bn_epsilon": -1.0}, "bn_epsilon must be a number and at least 0, got -1.0"),
    ({"in_channels": 0}, "in_channels must be a whole number and positive, got 0"),
    ({"num_classes": -1}, "num_classes must be a whole number and at least 0, got -1"),
  ],
)
def test_errors_name_what_exists(arguments, message):
  with pytest.raises(UsageError, match=message):
    lip_jax.create_model(**{"name": "lip_resnet_small", "rngs": nnx.Rngs(0), **arguments})


def test_images_of_the_wrong_shape():
  model = lip_jax.create_model("resnet_small", width=4, rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match=r"\[N, H, W, 3\], got shape \(3, 8, 8\)"):
    model(jnp.zeros((3, 8, 8)))


def test_core_imports_with_jax_flax_and_numpy_alone():
  """None of the libraries that only training needs is imported by the package or its models."""
  code = """
import sys, flax.nnx
before = set(sys.modules)
import lip_jax, lip_jax.visualize
roots = {name.partition(".")[0] for name in set(sys.modules) - before}
outside = roots - sys.stdlib_module_names - {"lip_jax", "jax", "jaxlib", "flax", "numpy"}
assert not outside, outside
"""
  subprocess.run([sys.executable, "-c", code], check=True)


def test_import_time_is_close_to_that_of_flax():
  """Least CPU time of several processes, lip_jax against flax.nnx; at most 1.5 times as long."""

  def seconds(module):
    code = f"import {module}, time; print(time.process_time())"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return float(done.stdout)

  pairs = [(seconds("flax.nnx"), seconds("lip_jax")) for _ in range(3)]
  assert min(ours for _, ours in pairs) < 1.5 * min(flax for flax, _ in pairs)


def test_what_is_formulated_otherwise_for_gpus_is_the_same_network(x64, monkeypatch):
  model = lip_jax.create_model(
    "lip_resnet50",
    num_classes=3,
    width=4,
    stage_sizes=(1, 2, 1, 1),
    logit_width=4,
    dtype=jnp.float64,
    rngs=nnx.Rngs(0),
  )
  random = np.random.default_rng(0)
  graph, params, rest = nnx.split(model, nnx.Param, ...)
  params = jax.tree.map(lambda a: jnp.asarray(random.normal(0.5, 0.5, a.shape)), params)
  x = images().astype(jnp.float64)

  def loss(params, x):
    class_logits = nnx.merge(graph, params, rest, copy=True)(x)
    return (class_logits * jnp.arange(6.0).reshape(2, 3)).sum(), class_logits

  def on(*platforms):
    for module in (layers, logit_modules):
      monkeypatch.setattr(module, "targets", lambda: set(platforms))
    # A function of its own, or JAX would take the program that it has traced before.
    gradients = jax.jit(jax.value_and_grad(lambda *args: loss(*args), (0, 1), has_aux=True))
    traced = gradients.trace(params, x)
    return traced.jaxpr.pretty_print(), traced.lower().compile()(params, x)

  (program, elsewhere), (gpu_program, on_gpu) = on(), on("cuda")
  assert " reduce[" in gpu_program
  assert " reduce[" not in program
  for one, other in zip(*map(jax.tree.leaves, (on_gpu, elsewhere)), strict=True):
    assert np.isfinite(other).all()
    assert np.any(other)
    np.testing.assert_allclose(one, other, rtol=0, atol=1e-9 * float(jnp.abs(other).max()))
