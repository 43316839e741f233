"""Learning-rate schedules and optimizers."""

import optax

from lip_jax.training.config import Optim
from lip_jax.training.train_state import Tree


def learning_rate(
  config: Optim, *, global_batch_size: int, steps_per_epoch: float, num_epochs: float
) -> optax.Schedule:
  """Learning rate as a function of the step (Goyal et al. 2017, the recipe of section 4.1).

  The peak is base_lr * global_batch_size / base_batch_size. It is reached by a linear warm-up from
  warmup_lr and then either multiplied by step_factor at each of step_epochs, or brought to zero by
  a cosine that ends with the last epoch.
  """
  peak = config.base_lr * global_batch_size / config.base_batch_size
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


def optimizer(
  config: Optim, schedule: optax.Schedule, trained: Tree | None = None
) -> optax.GradientTransformation:
  """The optimizer of that name, with weight decay on all parameters that are trained.

  Section 4.1 makes two changes to the recipe of Goyal et al. 2017, which "sgd" has: plain instead
  of Nesterov momentum, and weight decay of batch norms, too.

  Args:
    config: "sgd" is PyTorch's, in its order of operations and with plain momentum:
      v <- momentum * v + (gradient + weight_decay * p);  p <- p - lr * v.
    trained: whether each parameter is; None: all are. The others are left as they are, and have no
      state.
  """
  clip = [] if config.clip_norm is None else [optax.clip_by_global_norm(config.clip_norm)]
  decay = config.weight_decay
  if config.optimizer == "sgd":
    chosen = optax.chain(
      *clip,
      optax.add_decayed_weights(decay),
      optax.trace(decay=config.momentum, nesterov=False),
      optax.scale_by_learning_rate(schedule),
    )
  else:
    make = {"adamw": optax.adamw, "lamb": optax.lamb}[config.optimizer]
    adaptive = make(schedule, b1=config.b1, b2=config.b2, eps=config.eps, weight_decay=decay)
    chosen = optax.chain(*clip, adaptive)
  if trained is None:
    return chosen
  return optax.partition({True: chosen, False: optax.set_to_zero()}, trained)
