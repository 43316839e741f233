import dataclasses

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lip_jax.training import optim
from lip_jax.training.config import Optim

PAPER = Optim(
  base_lr=0.1,
  schedule="step",
  step_epochs=(30, 60, 80),
  step_factor=0.1,
  warmup_epochs=5,
  warmup_lr=0.1,
  momentum=0.9,
  weight_decay=1e-4,
)


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
  transformation = optim.sgd(
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
  transformation = optim.sgd(PAPER, optax.constant_schedule(0.5))
  zeros = {name: jnp.zeros_like(value) for name, value in params.items()}
  updates, _ = transformation.update(zeros, transformation.init(params), params)
  for update in updates.values():
    np.testing.assert_allclose(update, -0.5e-4, rtol=1e-6)
