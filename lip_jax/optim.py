"""Learning-rate schedules and SGD as the paper's recipe has them (section 4.1)."""

import optax

from lip_jax.config import Optim


def learning_rate(
  config: Optim, *, global_batch_size: int, steps_per_epoch: float, num_epochs: float
) -> optax.Schedule:
  """Learning rate as a function of the step (Goyal et al. 2017).

  The peak is base_lr * global_batch_size / 256. It is reached by a linear warm-up from warmup_lr
  and then either multiplied by step_factor at each of step_epochs, or brought to zero by a cosine
  that ends with the last epoch.
  """
  peak = config.base_lr * global_batch_size / 256
  warmup_steps = round(config.warmup_epochs * steps_per_epoch)
  if config.schedule == "cosine":
    decay_steps = round(num_epochs * steps_per_epoch) - warmup_steps
    after = optax.cosine_decay_schedule(peak, max(decay_steps, 1))
  else:
    factors: dict[int, float] = {}
    for epoch in config.step_epochs:
      step = round(epoch * steps_per_epoch) - warmup_steps
      factors[step] = factors.get(step, 1.0) * config.step_factor
    after = optax.piecewise_constant_schedule(peak, factors)
  warmup = optax.linear_schedule(config.warmup_lr, peak, warmup_steps)
  return optax.join_schedules([warmup, after], [warmup_steps])


def sgd(config: Optim, schedule: optax.Schedule) -> optax.GradientTransformation:
  """SGD with plain momentum, weight decay on all parameters, in PyTorch's order of operations.

  The two changes that section 4.1 makes to the recipe of Goyal et al. 2017: no Nesterov momentum,
  and batch norms decay, too.

  v <- momentum * v + (gradient + weight_decay * p);  p <- p - lr * v.
  """
  return optax.chain(
    optax.add_decayed_weights(config.weight_decay),
    optax.trace(decay=config.momentum, nesterov=False),
    optax.scale_by_learning_rate(schedule),
  )
