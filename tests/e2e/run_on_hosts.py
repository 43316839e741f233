"""One process of a run that sums numbers over all processes, step by step.

  python run_on_hosts.py ADDRESS PROCESS COUNT [--steps=N] [...]

Prints "step N" for each; the last line is "ended".
"""

import argparse
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import jax.numpy as jnp
from jax.experimental import multihost_utils

from lip_jax.distributed import startup
from lip_jax.distributed.service_log import EXIT_ERROR
from lip_jax.errors import UsageError


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument("address")
  parser.add_argument("process", type=int)
  parser.add_argument("count", type=int)
  parser.add_argument("--devices", type=int, default=1)
  parser.add_argument("--steps", type=int, default=10**6)
  parser.add_argument("--usage-error-at", type=int)
  parser.add_argument("--bug-at", type=int)
  parser.add_argument("--slow-end", type=float, default=0)
  parser.add_argument("--connect-timeout", type=float, default=60)
  parser.add_argument("--liveness-timeout", type=float, default=30)
  args = parser.parse_args()
  os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={args.devices}"
  options = startup.Options(
    coordinator_address=args.address,
    num_processes=args.count,
    process_id=args.process,
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


def run(args):
  for step in range(args.steps):
    total = multihost_utils.process_allgather(jnp.int32(args.process)).sum()
    assert total == args.count * (args.count - 1) // 2
    print("step", step, flush=True)
    if step == args.usage_error_at:
      raise UsageError("--config.model.pool=lipp is none of: average, max")
    if step == args.bug_at:
      raise KeyError("a bug")
    time.sleep(0.05)
  time.sleep(args.slow_end)


main()
