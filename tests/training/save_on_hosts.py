"""One process of several that save the states of test_checkpoint.py, divided among them.

python save_on_hosts.py WORKDIR ADDRESS PROCESS COUNT
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))

import jax
import numpy as np

from lip_jax.distributed import sharding, startup


def main(workdir, address, process, count):
  options = startup.Options(
    coordinator_address=address, num_processes=int(count), process_id=int(process)
  )
  with startup.join(options):
    from test_checkpoint import save, sharded  # which computes states

    place = sharded(sharding.make_mesh())

    def divide(leaf):
      values = np.asarray(leaf)
      return jax.make_array_from_callback(leaf.shape, place(leaf), lambda index: values[index])

    save(workdir, 2, 4, divide=divide, top1_2=0.5, top1_4=0.75)


if __name__ == "__main__":
  main(*sys.argv[1:])
