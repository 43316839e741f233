"""Digests of what training gives, to show that a change of the code changes no bit of it.

  python benchmarks/training_digest.py                     # of this checkout
  python benchmarks/training_digest.py --checkout DIR      # of another one, to compare

Trains the embedded job for 50 steps as real processes: on 1 and on 8 devices, once straight and
once stopped at step 25 and resumed, and evaluates the result. Prints one line each, with the
SHA-256 of all parameters and statistics. Equal lines of two checkouts mean bit-identical training.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

_STEPS = 50
_TRAIN_IMAGES = 6400  # below: a split of its own, so that an epoch is 200 steps of 32
_DIGEST = """
import hashlib, json, sys
import jax, numpy as np
from flax import nnx
import lip_jax
model, config = lip_jax.load(sys.argv[1] + "/checkpoints/" + sys.argv[2])
digest = hashlib.sha256()
for path, leaf in sorted(nnx.state(model).flat_state(), key=lambda pair: str(pair[0])):
  digest.update(str(path).encode() + np.asarray(leaf[...]).tobytes())
print(json.dumps({"digest": digest.hexdigest()}))
"""


def main() -> None:
  """Prints the digests."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--checkout", type=Path, default=Path(__file__).parents[1])
  args = parser.parse_args()
  checkout = args.checkout.resolve()
  with tempfile.TemporaryDirectory() as directory:
    for devices in (1, 8):
      straight, resumed = (f"{directory}/{name}{devices}" for name in ("straight", "resumed"))
      _train(checkout, straight, devices)
      print(f"{devices} device(s), straight:", _digest(checkout, straight), flush=True)
      _train(checkout, resumed, devices, stop_at=_STEPS // 2)
      _train(checkout, resumed, devices)
      print(f"{devices} device(s), resumed: ", _digest(checkout, resumed), flush=True)
      print(f"{devices} device(s), evaluated:", _evaluate(checkout, straight, devices), flush=True)


def _environment(checkout: Path, devices: int) -> dict[str, str]:
  flags = f"--xla_force_host_platform_device_count={devices}"
  return {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": str(checkout)}


def _train(checkout: Path, workdir: str, devices: int, stop_at: int | None = None) -> None:
  """Trains to the end, or until SIGTERM after the first checkpoint at or beyond `stop_at`."""
  command = [
    sys.executable,
    "train.py",
    "--config=configs/cluttered_digits.py",
    f"--workdir={workdir}",
    f"--config.data.train_split=train[:{_TRAIN_IMAGES}]",
    f"--config.num_epochs={_STEPS * 32 / _TRAIN_IMAGES}",
    "--config.data.validation_split=validation[:400]",
    "--config.log_every_steps=1",
    "--config.eval_every_epochs=10",
    f"--config.checkpoint_every_steps={_STEPS // 2}",
    "--config.importance_images=0",
  ]
  process = subprocess.Popen(
    command, cwd=checkout, env=_environment(checkout, devices), stdout=subprocess.DEVNULL
  )
  if stop_at is not None:
    while process.poll() is None:
      try:
        process.wait(0.05)
      except subprocess.TimeoutExpired:
        if Path(workdir, "checkpoints", str(stop_at)).exists():
          process.terminate()
          break
  if process.wait() != 0:
    sys.exit(f"training in {checkout} ended with status {process.returncode}")


def _digest(checkout: Path, workdir: str) -> str:
  command = [sys.executable, "-c", _DIGEST, workdir, str(_STEPS)]
  return str(_output(command, checkout, 1)["digest"])


def _evaluate(checkout: Path, workdir: str, devices: int) -> str:
  command = [sys.executable, "-m", "lip_jax.cli", "evaluate", workdir, "--json"]
  results = _output(command, checkout, devices)
  return ", ".join(f"{key} {results[key]!r}" for key in ("top1", "top5", "loss", "count"))


def _output(command: list[str], checkout: Path, devices: int) -> dict[str, object]:
  environment = _environment(checkout, devices)
  done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
  if done.returncode != 0:
    sys.exit(done.stderr)
  return json.loads(done.stdout)


if __name__ == "__main__":
  main()
