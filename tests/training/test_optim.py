import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lip_jax.training import optim
from lip_jax.training.config import Optim

PAPER = Optim(warmup_epochs=5, warmup_lr=0.1)


def rates(config, batch, epochs, steps_per_epoch=100, num_epochs=90):
  schedule = optim.learning_rate(
    config, global_batch_size=batch, steps_per_epoch=steps_per_epoch, num_epochs=num_epochs
  )
  return [float(schedule(round(epoch * steps_per_epoch))) for epoch in epochs]


def test_paper_recipe_at_256_images():
  epochs = (0, 3, 5, 29.99, 30, 59.99, 60, 79.99, 80, 89.99)
  expected = (0.1, 0.1, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001, 1e-4, 1e-4)
  np.testing.assert_allclose(rates(PAPER, 256, epochs), expected, rtol=1e-5)


def test_large_batches_scale_linearly_and_warm_up_from_the_base():
  """Goyal et al. 2017: from 0.1 to 0.1 * k over five epochs."""
  np.testing.assert_allclose(
    rates(PAPER, 8192, (0, 2.5, 5, 29, 31)), (0.1, 1.65, 3.2, 3.2, 0.32), rtol=1e-5
  )


def test_cosine_ends_at_zero_with_the_last_epoch():
  config = dataclasses.replace(PAPER, schedule="cosine", warmup_lr=0.0)
  middle = 5 + 85 / 2
  np.testing.assert_allclose(
    rates(config, 512, (0, 2.5, 5, middle, 90)), (0, 0.1, 0.2, 0.1, 0), rtol=1e-5, atol=1e-7
  )


def test_sgd_is_pytorchs():
  torch = pytest.importorskip("torch")
  rng = np.random.default_rng(0)
  start, targets = rng.standard_normal(7), rng.standard_normal((5, 7))
  theirs = torch.nn.Parameter(torch.tensor(start))
  optimizer = torch.optim.SGD([theirs], lr=0.1, momentum=0.9, weight_decay=1e-2)
  ours = jnp.asarray(start, jnp.float32)
  transformation = optim.optimizer(
    dataclasses.replace(PAPER, weight_decay=1e-2), optax.constant_schedule(0.1)
  )
  state = transformation.init(ours)
  for target in targets:
    optimizer.zero_grad()
    (0.5 * (theirs - torch.tensor(target)) ** 2).sum().backward()
    optimizer.step()
    updates, state = transformation.update(ours - jnp.asarray(target, jnp.float32), state, ours)
    ours = optax.apply_updates(ours, updates)
  np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=1e-5, atol=1e-6)


def test_weight_decay_reaches_batch_norm_and_biases():
  """Without a gradient, every parameter shrinks by lr * weight_decay."""
  params = {"kernel": jnp.ones((2, 2)), "scale": jnp.ones(3), "bias": jnp.ones(3)}
  transformation = optim.optimizer(PAPER, optax.constant_schedule(0.5))
  zeros = {name: jnp.zeros_like(value) for name, value in params.items()}
  updates, _ = transformation.update(zeros, transformation.init(params), params)
  for update in updates.values():
    np.testing.assert_allclose(update, -0.5e-4, rtol=1e-6)


@pytest.mark.parametrize("name", ["sgd", "adamw", "lamb"])
def test_every_optimizer_finds_the_minimum(name):
  config = dataclasses.replace(PAPER, optimizer=name, weight_decay=0.0)
  transformation = optim.optimizer(config, optax.constant_schedule(0.05))
  params = {"x": jnp.asarray([3.0, -2.0])}
  state = transformation.init(params)
  for _ in range(300):
    updates, state = transformation.update({"x": params["x"] - 1}, state, params)
    params = optax.apply_updates(params, updates)
  np.testing.assert_allclose(params["x"], 1.0, atol=0.1)


def test_gradients_are_clipped_by_the_norm_of_all_before_the_weight_decay():
  params = {"a": jnp.zeros(()), "b": jnp.full((), 2.0)}
  config = dataclasses.replace(PAPER, clip_norm=1.0, weight_decay=0.5)
  transformation = optim.optimizer(config, optax.constant_schedule(1.0))
  grads = {"a": jnp.full((), 3.0), "b": jnp.full((), 4.0)}
  updates, _ = transformation.update(grads, transformation.init(params), params)
  np.testing.assert_allclose([updates["a"], updates["b"]], [-0.6, -0.8 - 1.0], rtol=1e-6)


def test_what_is_not_trained_is_left_as_it_is_and_has_no_state():
  params = {"stem": jnp.ones(3), "head": jnp.ones(3)}
  trained = {"stem": False, "head": True}
  transformation = optim.optimizer(PAPER, optax.constant_schedule(0.5), trained)
  state = transformation.init(params)
  assert sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim) == 3  # momentum of the head
  updates, _ = transformation.update(params, state, params)
  np.testing.assert_array_equal(updates["stem"], 0)
  np.testing.assert_allclose(updates["head"], -0.5 * (1 + 1e-4), rtol=1e-6)
