"""`lip-jax data`: prepare, convert, check and measure data sets."""

import argparse
from typing import Any

from lip_jax.cli.arguments import positive


def add_commands(commands: Any) -> None:
  """Adds `data` to the subparsers `commands`."""
  text = "prepare, convert, check and measure data sets"
  data = commands.add_parser("data", help=text, description=f"{text}; docs/data.md is the guide")
  actions = data.add_subparsers(metavar="ACTION", required=True)
  directory = argparse.ArgumentParser(add_help=False)
  directory.add_argument(
    "--data-dir",
    metavar="DIR",
    help="directory of the data sets (default: $TFDS_DATA_DIR or ~/tensorflow_datasets)",
  )
  workers = argparse.ArgumentParser(add_help=False)
  workers.add_argument(
    "--num-workers",
    type=positive,
    metavar="N",
    help="threads (default: one for each core, at most 16)",
  )
  writing = argparse.ArgumentParser(add_help=False)
  writing.add_argument(
    "--shorter-side", type=positive, metavar="PIXELS", help="scale larger images down to this"
  )
  writing.add_argument(
    "--quality", type=int, metavar="Q", help="JPEG quality of images that are scaled (default: 95)"
  )
  writing.add_argument(
    "--num-shards", type=positive, metavar="N", help="files of the train split (default: as TFDS)"
  )

  text = "make a data set in ArrayRecord format; the same command goes on if it is interrupted"
  prepare = actions.add_parser("prepare", help=text, description=text)
  kinds = prepare.add_subparsers(metavar="KIND", required=True)
  text = "imagenet2012, from the two tar files"
  imagenet = kinds.add_parser(
    "imagenet", help=text, description=text, parents=[directory, writing, workers]
  )
  imagenet.add_argument("--train-tar", required=True, metavar="FILE", help="..._img_train.tar")
  imagenet.add_argument("--val-tar", required=True, metavar="FILE", help="..._img_val.tar")
  imagenet.set_defaults(run=_prepare_imagenet)
  text = "a data set of one's own, from FOLDER/train/CLASS/IMAGE.jpg and FOLDER/validation/..."
  folder = kinds.add_parser(
    "folder", help=text, description=text, parents=[directory, writing, workers]
  )
  folder.add_argument("--folder", required=True, metavar="FOLDER", help="the image folder")
  folder.add_argument("--name", required=True, help="of the new data set")
  folder.set_defaults(run=_prepare_folder)

  text = "copy a TFDS data set from TFRecord to ArrayRecord files, without TensorFlow"
  convert = actions.add_parser("convert", help=text, description=text, parents=[directory, workers])
  convert.add_argument("dataset", metavar="DATASET", help="TFDS name, such as imagenet2012")
  convert.add_argument("--out-dir", required=True, metavar="DIR", help="where the new one goes")
  convert.set_defaults(run=_convert_data)

  text = "read a whole data set and say what is wrong with it; exit status 1 if anything is"
  verify = actions.add_parser("verify", help=text, description=text, parents=[directory, workers])
  verify.add_argument("dataset", metavar="DATASET", help="TFDS name, or folder:DIR")
  verify.add_argument(
    "--decode",
    choices=("sample", "all", "none"),
    default="sample",
    help="which images to decode as well (default: sample, one in 64)",
  )
  verify.set_defaults(run=_verify_data)

  text = "measure how fast this machine reads a data set, and how many cores a training needs"
  bench = actions.add_parser("bench", help=text, description=text, parents=[directory])
  bench.add_argument(
    "--source",
    required=True,
    metavar="DATASET",
    help="TFDS name, folder:DIR, or fake for images out of memory",
  )
  bench.add_argument("--split", default="train", help="(default: train)")
  bench.add_argument("--image-size", type=positive, default=224, help="in pixels (default: 224)")
  bench.add_argument(
    "--num-threads", type=positive, metavar="N", help="(default: one for each core)"
  )
  bench.add_argument(
    "--seconds", type=float, default=10.0, help="to measure for, in all (default: 10)"
  )
  bench.add_argument(
    "--images-per-second",
    type=float,
    nargs="+",
    metavar="RATE",
    help="of trainings that are to be fed (default: a few)",
  )
  bench.set_defaults(run=_bench_data)


def _prepare_imagenet(args: argparse.Namespace) -> None:
  from lip_jax.data.prepare.imagenet import prepare_imagenet

  print(prepare_imagenet(args.train_tar, args.val_tar, args.data_dir, **_writing(args)))


def _prepare_folder(args: argparse.Namespace) -> None:
  from lip_jax.data.prepare.folder import prepare_folder

  print(prepare_folder(args.folder, args.name, args.data_dir, **_writing(args)))


def _writing(args: argparse.Namespace) -> dict[str, Any]:
  names = ("shorter_side", "quality", "num_shards", "num_workers")
  return {name: getattr(args, name) for name in names}


def _convert_data(args: argparse.Namespace) -> None:
  from lip_jax.data.prepare.convert import convert_to_array_record

  workers = args.num_workers
  print(convert_to_array_record(args.dataset, args.data_dir, args.out_dir, num_workers=workers))


def _verify_data(args: argparse.Namespace) -> int:
  from lip_jax.data.prepare.verify import verify

  result = verify(args.dataset, args.data_dir, decode=args.decode, num_workers=args.num_workers)
  print(result)
  return 0 if result.ok else 1


def _bench_data(args: argparse.Namespace) -> None:
  from lip_jax.data import bench

  rates = {} if args.images_per_second is None else {"step_rates": args.images_per_second}
  print(
    bench.bench(
      args.source,
      data_dir=args.data_dir,
      split=args.split,
      image_size=args.image_size,
      num_threads=args.num_threads,
      seconds=args.seconds,
      **rates,
    )
  )
