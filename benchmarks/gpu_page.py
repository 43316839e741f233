"""Page and summary of what gpu_day.sh has left in a folder: page.md and summary.json.

python benchmarks/gpu_page.py runs/gpu_day
"""

import argparse
import json
from pathlib import Path
from typing import Any

import gpu_model

_GPUS = {"A100": "a100", "H100": "h100", "H200": "h200", "B200": "b200", "L4": "l4"}


def main() -> None:
  """Writes both."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("folder", type=Path)
  folder = parser.parse_args().folder
  steps, parts = [], []
  for line in (folder / "status").read_text(encoding="utf-8").splitlines():
    name, status, seconds = line.split()
    path = folder / f"{name}.json"
    result = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    steps.append({"name": name, "status": int(status), "seconds": int(seconds), "result": result})
    log = (folder / f"{name}.log").read_text(encoding="utf-8", errors="replace")
    parts.append(f"## {name}: {_outcome(int(status))}, {seconds} s\n\n{_end(log, int(status))}")
  predicted = _predicted(steps)
  summary = {"steps": steps, "predicted": predicted}
  (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
  page = ["# A day with a GPU", *_model(predicted), *parts]
  (folder / "page.md").write_text("\n\n".join(page) + "\n", encoding="utf-8")
  print(folder / "page.md")


def _outcome(status: int) -> str:
  return {0: "done", 124: "took too long"}.get(status, f"failed ({status})")


def _end(log: str, status: int) -> str:
  """Tables of a log, or the last lines of one that failed."""
  if status:
    return "```\n" + "\n".join(log.splitlines()[-30:]) + "\n```"
  shown = [line for line in log.splitlines() if "\r" not in line]
  return "\n".join(shown)


def _predicted(steps: list[dict[str, Any]]) -> dict[str, float]:
  """Shares of copy bandwidth by the model, if it has the card."""
  device = next((one["result"]["device"] for one in steps if one["result"]), "")
  gpu = next((name for key, name in _GPUS.items() if key in device), None)
  if gpu is None:
    return {}
  return {pass_: gpu_model.share(gpu, pass_, "range known") for pass_ in gpu_model.BYTES}


def _model(predicted: dict[str, float]) -> list[str]:
  if not predicted:
    return ["The model of docs/gpu.md does not have this card."]
  shares = ", ".join(f"{name} at most {value:.0%}" for name, value in predicted.items())
  return [f"The model of docs/gpu.md, share of copy bandwidth with a known range: {shares}."]


if __name__ == "__main__":
  main()
