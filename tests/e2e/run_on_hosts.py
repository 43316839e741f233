"""One process of a run that sums numbers over all processes, step by step.

  python run_on_hosts.py [--coordinator_address=... --num_processes=... --process_id=...] [...]

Prints "step N" for each; the last line is "ended".
"""

import argparse
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils

from lip_jax.distributed import startup
from lip_jax.distributed.service_log import EXIT_ERROR
from lip_jax.errors import UsageError


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument("--coordinator_address")
  parser.add_argument("--num_processes", type=int)
  parser.add_argument("--process_id", type=int)
  parser.add_argument("--devices", type=int, default=1)
  parser.add_argument("--steps", type=int, default=10**6)
  parser.add_argument("--bug-at", type=int)
  parser.add_argument("--slow-end", type=float, default=0)
  parser.add_argument("--connect-timeout", type=float, default=120)
  parser.add_argument("--liveness-timeout", type=float, default=30)
  args = parser.parse_args()
  os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={args.devices}"
  if "JAX_FORCE_TPU_INIT" in os.environ:
    emulate_tpu()
  options = startup.Options(
    coordinator_address=args.coordinator_address,
    num_processes=args.num_processes,
    process_id=args.process_id,
    connect_timeout=args.connect_timeout,
    liveness_timeout=args.liveness_timeout,
  )
  try:
    with startup.join(options):
      run(args)
  except UsageError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(EXIT_ERROR)
  print("ended", flush=True)


def emulate_tpu():
  """Makes a machine that has been told to have TPUs compute on its CPU, once jax is connected."""
  os.environ.pop("TPU_SKIP_MDS_QUERY", None)  # as jax sets it where it sees no TPU
  initialize = jax.distributed.initialize

  def then_cpu(*args, **kwargs):
    initialize(*args, **kwargs)
    jax.config.update("jax_platforms", "cpu")

  jax.distributed.initialize = then_cpu


def run(args):
  process, count = jax.process_index(), jax.process_count()
  for step in range(args.steps):
    total = multihost_utils.process_allgather(jnp.int32(process)).sum()
    assert total == count * (count - 1) // 2 > 0
    print("step", step, flush=True)
    if step == args.bug_at:
      raise KeyError("a bug")
    time.sleep(0.05)
  time.sleep(args.slow_end)


main()
