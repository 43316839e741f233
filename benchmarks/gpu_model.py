"""The greatest share of copy bandwidth that GPUs allow the kernels: the model of docs/gpu.md.

python benchmarks/gpu_model.py
"""

from lip_jax.tools import chips

_UNITS = 16  # results a clock of a multiprocessor's special-function units

BYTES = {"forward": 4.5, "backward": 8.5}  # of a pixel and channel, in bfloat16
EVALUATIONS = {"forward": 1.5, "backward": 2.25 * 81 / 64 + 1}
FUNCTIONS = {"range known": 1, "fused": 3}  # exponentials and reciprocals of an evaluation


def share(gpu: str, pass_: str, logits: str) -> float:
  """Of `chips.GPUS`, "forward" or "backward", with logits "range known" or "fused"."""
  one = chips.GPUS[gpu]
  moving = BYTES[pass_] / one.chip.memory_bandwidth
  functions = EVALUATIONS[pass_] * FUNCTIONS[logits]
  computing = functions / (_UNITS * one.processors * one.clock * 1e9)
  return min(1.0, moving / computing)


def main() -> None:
  """Prints the rows of the table."""
  for logits in FUNCTIONS:
    for pass_ in BYTES:
      cells = [f"{share(gpu, pass_, logits):.0%}" for gpu in ("a100", "h100", "h200", "b200", "l4")]
      print(f"| {pass_}, {logits} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
  main()
