"""One process that reads training batches, and may be killed at any time.

  python read_numbered.py FOLDER OUT PROCESS_INDEX PROCESS_COUNT STEPS

Reads the data set of fixture_numbered, out of memory and out of its files at once. Writes what each
step would have got to OUT, and "checkpoints" of the loaders every 3 steps. Started again, with any
PROCESS_COUNT, it goes on from the latest checkpoint that all processes of a run have written.
"""

import json
import os
import sys
import time
import zlib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import fixture_numbered
import jax
import numpy as np

from lip_jax.data import pipeline
from lip_jax.data.transforms import TrainCrop
from lip_jax.distributed import sharding

OPTIONS = {"transform": TrainCrop(8, (0.3, 1.0)), "global_batch_size": 8, "seed": 3}
KINDS = ("memory", "tfrecord")


def loader(kind, folder, index, count):
  source = getattr(fixture_numbered, f"open_{kind}")(folder)
  return pipeline.train_loader(
    source, **OPTIONS, process_index=index, process_count=count, num_threads=2, prefetch=3
  )


def seen(batch):
  """Labels and checksums of the images, row by row."""
  sums = [zlib.crc32(np.ascontiguousarray(image).tobytes()) for image in batch["image"]]
  return [batch["label"].tolist(), sums]


def latest(out):
  """The last step of which there are the states of all processes that a run had, and these."""
  best = 0, []
  for first in out.glob("state-*-0-of-*.json"):
    _, step, _, _, count = first.stem.split("-")
    paths = [out / f"state-{step}-{p}-of-{count}.json" for p in range(int(count))]
    if int(step) > best[0] and all(path.exists() for path in paths):
      best = int(step), paths
  return best[0], [json.loads(path.read_text()) for path in best[1]]


def main(folder, out, index, count, steps):
  out, index, count, steps = Path(out), int(index), int(count), int(steps)
  loaders = {kind: loader(kind, folder, index, count) for kind in KINDS}
  start, states = latest(out)
  if states:
    for kind in KINDS:
      loaders[kind].set_state(pipeline.joined([state[kind] for state in states]))
  mesh = sharding.make_mesh()
  feeds = {
    kind: sharding.Prefetch(each, mesh, position=each.position) for kind, each in loaders.items()
  }
  with open(out / f"seen-{index}-of-{count}.jsonl", "a", encoding="utf-8") as file:
    for step in range(start, steps):
      batches = {kind: jax.device_get(next(feed)) for kind, feed in feeds.items()}
      file.write(json.dumps([step, {kind: seen(batch) for kind, batch in batches.items()}]) + "\n")
      file.flush()
      time.sleep(0.02)  # or it would be over before anybody can kill it
      if (step + 1) % 3 == 0:
        state = {kind: loaders[kind].get_state(feeds[kind].position) for kind in KINDS}
        path = out / f"state-{step + 1}-{index}-of-{count}.json"
        path.with_suffix(".tmp").write_text(json.dumps(state))
        os.replace(path.with_suffix(".tmp"), path)
  for kind in KINDS:
    feeds[kind].close()
    loaders[kind].close()


if __name__ == "__main__":
  main(*sys.argv[1:])
