"""`lip-jax export` and `lip-jax push`: networks in a form to share."""

import argparse
from typing import Any

from lip_jax.cli.arguments import positive
from lip_jax.cli.output import progress


def add_commands(commands: Any) -> None:
  """Adds `export` and `push` to the subparsers `commands`."""
  text = "write a network as a folder, StableHLO or ONNX; each is checked against the network"
  export = commands.add_parser(
    "export",
    help=text,
    description=text
    + ". Files take uint8 RGB images [N, S, S, 3] and normalize them themselves, if the network "
    "says how; N is free.",
  )
  export.add_argument(
    "path", metavar="PATH", help="training run, checkpoint, exported folder, or hf://ORG/NAME"
  )
  export.add_argument("out", metavar="OUT", help="file or folder to write")
  export.add_argument(
    "--format",
    choices=("folder", "stablehlo", "onnx"),
    help="(default: by OUT's end, .stablehlo or .onnx, else folder: safetensors and config.json)",
  )
  export.add_argument(
    "--dtype",
    choices=("float32", "bfloat16", "float16"),
    default="float32",
    help="of the computation; in a folder, of the kernels (default: float32)",
  )
  export.add_argument(
    "--image-size", type=positive, metavar="S", help="in pixels (default: the network's own)"
  )
  export.add_argument(
    "--evaluation",
    metavar="FILE",
    help="for a folder: what lip-jax evaluate PATH --json printed, for the model card",
  )
  export.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
  export.set_defaults(run=_export)

  text = "upload an exported folder to the Hugging Face hub, with a model card"
  push = commands.add_parser("push", help=text, description=text)
  push.add_argument("folder", metavar="FOLDER", help="what lip-jax export wrote")
  push.add_argument("name", metavar="ORG/NAME", help="of the repository; made if it is not there")
  push.add_argument("--private", action="store_true", help="make a new repository private")
  push.add_argument("--licence", default="apache-2.0", metavar="ID", help="(default: apache-2.0)")
  push.add_argument(
    "--dry-run",
    action="store_true",
    help="print the card and what would be uploaded; nothing is sent",
  )
  push.set_defaults(run=_push)


def _export(args: argparse.Namespace) -> None:
  from lip_jax.export import saving

  progress(f"exporting {args.path} and checking what is written")
  try:
    report = saving.write(
      args.path,
      args.out,
      form=args.format,
      dtype=args.dtype,
      image_size=args.image_size,
      evaluation=args.evaluation,
      overwrite=args.overwrite,
    )
  finally:
    progress("")
  print(report)


def _push(args: argparse.Namespace) -> None:
  from lip_jax.export import hub

  if args.dry_run:
    upload = hub.preview(args.folder, args.name, licence=args.licence)
    print(upload.card)
    for file, size in upload.sizes.items():
      print(f"would upload {file}: {size:,} bytes")
    print(f"to {upload.url}")
    return
  progress(f"uploading {args.folder}")
  try:
    url = hub.push(args.folder, args.name, licence=args.licence, private=args.private)
  finally:
    progress("")
  print(f"{url}\nload it with: lip_jax.load('hf://{args.name}')")
