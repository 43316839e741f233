"""`lip-jax export` and `lip-jax push`: networks in a form to share."""

import argparse
from typing import Any

from lip_jax.cli.arguments import add, add_command, select
from lip_jax.cli.output import say, working


def add_commands(commands: Any) -> None:
  """Adds `export` and `push` to the subparsers `commands`."""
  text = "write a network as a folder, StableHLO or ONNX; each is checked against the network"
  more = (
    ". Files take uint8 RGB images [N, S, S, 3] and normalize them themselves, if the network says "
    "how; N is free."
  )
  export = add_command(commands, "export", _export, text, more)
  arguments = {
    "path PATH": "training run, checkpoint, exported folder, or hf://ORG/NAME",
    "out OUT": "file or folder to write",
    "--format {folder,stablehlo,onnx}": "(default: by OUT's end, .stablehlo or .onnx, else "
    "folder: safetensors and config.json)",
    "--dtype {float32,bfloat16,float16}": "of the computation; in a folder, of the kernels "
    "(default: float32)",
    "--image-size S": "in pixels (default: the network's own)",
    "--evaluation FILE": "for a folder: what lip-jax evaluate PATH --json printed, for the model "
    "card",
    "--overwrite": "replace OUT if it exists",
  }
  add(export, arguments)
  export.set_defaults(dtype="float32")

  text = "upload an exported folder to the Hugging Face hub, with a model card"
  push = add_command(commands, "push", _push, text)
  arguments = {
    "folder FOLDER": "what lip-jax export wrote",
    "name ORG/NAME": "of the repository; made if it is not there",
    "--private": "make a new repository private",
    "--licence ID": "(default: apache-2.0)",
    "--dry-run": "print the card and what would be uploaded; nothing is sent",
  }
  add(push, arguments)
  push.set_defaults(licence="apache-2.0")


def _export(args: argparse.Namespace) -> None:
  from lip_jax.export import saving

  given = select(args, "dtype", "image_size", "evaluation", "overwrite")
  with working(f"exporting {args.path} and checking what is written"):
    report = saving.write(args.path, args.out, form=args.format, **given)
  say(report)


def _push(args: argparse.Namespace) -> None:
  from lip_jax.export import hub

  if args.dry_run:
    upload = hub.preview(args.folder, args.name, licence=args.licence)
    say(upload.card)
    for file, size in upload.sizes.items():
      say(f"would upload {file}: {size:,} bytes")
    say(f"to {upload.url}")
    return
  with working(f"uploading {args.folder}"):
    url = hub.push(args.folder, args.name, licence=args.licence, private=args.private)
  say(f"{url}\nload it with: lip_jax.load('hf://{args.name}')")
