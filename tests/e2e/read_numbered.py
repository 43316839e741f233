"""One process that reads training batches, and may be killed at any time.

  python read_numbered.py FOLDER OUT PROCESS_INDEX PROCESS_COUNT STEPS

Reads the data set of fixture_numbered, with random access and in order at once. Writes the labels
of each batch that a step would have got to OUT, and "checkpoints" of the loaders every 3 steps.
Started again it goes on from the latest checkpoint that all processes have written.
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import fixture_numbered

from lip_jax.data import pipeline
from lip_jax.distributed import sharding

OPTIONS = {"image_size": 8, "global_batch_size": 8, "seed": 3, "shuffle_window": 20}
KINDS = ("source", "stream")


def loader(kind, folder, index, count):
  source = getattr(fixture_numbered, f"open_{kind}")(folder)
  return pipeline.train_loader(
    source, **OPTIONS, process_index=index, process_count=count, num_threads=2, prefetch=3
  )


def main(folder, out, index, count, steps):
  out, index, count, steps = Path(out), int(index), int(count), int(steps)
  loaders = {kind: loader(kind, folder, index, count) for kind in KINDS}
  complete = [
    step
    for step in range(0, steps + 1, 3)
    if all((out / f"state-{step}-{p}.json").exists() for p in range(count))
  ]
  start = max(complete, default=0)
  if start:
    states = [json.loads((out / f"state-{start}-{p}.json").read_text()) for p in range(count)]
    for kind in KINDS:
      loaders[kind].set_state(pipeline.joined([state[kind] for state in states]))
  mesh = sharding.make_mesh()
  feeds = {
    kind: sharding.Prefetch(each, mesh, position=each.position) for kind, each in loaders.items()
  }
  with open(out / f"seen-{index}.jsonl", "a", encoding="utf-8") as seen:
    for step in range(start, steps):
      seen.write(
        json.dumps([step, {kind: next(feed)["label"].tolist() for kind, feed in feeds.items()}])
        + "\n"
      )
      seen.flush()
      if (step + 1) % 3 == 0:
        state = {kind: loaders[kind].get_state(feeds[kind].position) for kind in KINDS}
        path = out / f"state-{step + 1}-{index}.json"
        path.with_suffix(".tmp").write_text(json.dumps(state))
        os.replace(path.with_suffix(".tmp"), path)
  for kind in KINDS:
    feeds[kind].close()
    loaders[kind].close()


if __name__ == "__main__":
  main(*sys.argv[1:])
