"""The greatest share of copy bandwidth that GPUs allow the kernels: the model of docs/gpu.md.

python benchmarks/gpu_model.py
"""

from lip_jax.tools import chips

_FUNCTIONS = 16  # results a clock of a multiprocessor's special-function units
_LANES = 128  # of a multiprocessor, that each do one instruction a clock

BYTES = {"forward": 4.5, "backward": 8.5}  # of a pixel and channel, in bfloat16
# Of a pixel and channel: exponentials and reciprocals, and instructions of the loop over the rows
# as compiled for sm_90.
WORK = {
  ("forward", "range known"): (1.25, 14),
  ("backward", "range known"): (2.25, 31),
  ("forward", "fused"): (3.25, 19),
  ("backward", "fused"): (4.25, 44),
}


def share(gpu: str, pass_: str, logits: str) -> float:
  """Of `chips.GPUS`, "forward" or "backward", with logits "range known" or "fused"."""
  one = chips.GPUS[gpu]
  functions, instructions = WORK[pass_, logits]
  moving = BYTES[pass_] / one.chip.memory_bandwidth
  clocks = max(functions / _FUNCTIONS, instructions / _LANES)
  return min(1.0, moving / (clocks / (one.processors * one.clock * 1e9)))


def main() -> None:
  """Prints the rows of the table."""
  for pass_, logits in WORK:
    cells = [f"{share(gpu, pass_, logits):.0%}" for gpu in ("a100", "h100", "h200", "b200", "l4")]
    print(f"| {pass_}, {logits} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
  main()
