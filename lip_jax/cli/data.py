"""`lip-jax data`: prepare, convert, check and measure data sets."""

import argparse
from typing import Any

from lip_jax.cli.arguments import DATA_DIR, add, add_command, positive, select
from lip_jax.cli.output import say


def add_commands(commands: Any) -> None:
  """Adds `data` to the subparsers `commands`."""
  text = "prepare, convert, check and measure data sets"
  data = commands.add_parser("data", help=text, description=f"{text}; docs/data.md is the guide")
  actions = data.add_subparsers(metavar="ACTION", required=True)
  directory, workers, writing = (argparse.ArgumentParser(add_help=False) for _ in range(3))
  add(directory, DATA_DIR)
  add(workers, {"--num-workers N": "threads (default: one for each core, at most 16)"})
  arguments = {
    "--shorter-side PIXELS": "scale larger images down to this",
    "--quality Q": "JPEG quality of images that are scaled (default: 95)",
    "--num-shards N": "files of the train split (default: as TFDS)",
  }
  add(writing, arguments)

  text = "make a data set in ArrayRecord format; the same command goes on if it is interrupted"
  prepare = actions.add_parser("prepare", help=text, description=text)
  kinds = prepare.add_subparsers(metavar="KIND", required=True)
  parents = [directory, writing, workers]
  text = "imagenet2012, from the two tar files"
  imagenet = add_command(kinds, "imagenet", _prepare_imagenet, text, parents=parents)
  tars = {"--train-tar FILE": "..._img_train.tar", "--val-tar FILE": "..._img_val.tar"}
  add(imagenet, tars, required=True)
  text = "a data set of one's own, from FOLDER/train/CLASS/IMAGE.jpg and FOLDER/validation/..."
  folder = add_command(kinds, "folder", _prepare_folder, text, parents=parents)
  made = {"--folder FOLDER": "the image folder", "--name NAME": "of the new data set"}
  add(folder, made, required=True)

  text = "copy a TFDS data set from TFRecord to ArrayRecord files, without TensorFlow"
  convert = add_command(actions, "convert", _convert_data, text, parents=[directory, workers])
  add(convert, {"dataset DATASET": "TFDS name, such as imagenet2012"})
  add(convert, {"--out-dir DIR": "where the new one goes"}, required=True)

  text = "read a whole data set and say what is wrong with it; exit status 1 if anything is"
  verify = add_command(actions, "verify", _verify_data, text, parents=[directory, workers])
  arguments = {
    "dataset DATASET": "TFDS name, folder:DIR, or coco:ANNOTATIONS.json@IMAGES",
    "--decode {sample,all,none}": "which images to decode as well (default: sample, one in 64)",
  }
  add(verify, arguments)
  verify.set_defaults(decode="sample")
  _add_bench(actions, directory)


def _add_bench(actions: Any, directory: argparse.ArgumentParser) -> None:
  text = "measure how fast this machine reads a data set, and how many cores a training needs"
  bench = add_command(actions, "bench", _bench_data, text, parents=[directory])
  source = {
    "--source DATASET": "TFDS name, folder:DIR, coco:ANNOTATIONS.json@IMAGES, or fake for images "
    "out of memory"
  }
  add(bench, source, required=True)
  add(bench, {"--split SPLIT": "(default: train)"})
  text = "in pixels (default: 224; of images with boxes their shorter side, 800)"
  add(bench, {"--image-size IMAGE_SIZE": text}, type=positive)
  arguments = {
    "--num-threads N": "(default: one for each core)",
    "--seconds SECONDS": "to measure for, in all (default: 10)",
    "--images-per-second RATE...": "of trainings that are to be fed (default: a few)",
  }
  add(bench, arguments)
  bench.set_defaults(split="train", seconds=10.0)


def _prepare_imagenet(args: argparse.Namespace) -> None:
  from lip_jax.data.prepare.imagenet import prepare_imagenet

  say(prepare_imagenet(args.train_tar, args.val_tar, args.data_dir, **_writing(args)))


def _prepare_folder(args: argparse.Namespace) -> None:
  from lip_jax.data.prepare.folder import prepare_folder

  say(prepare_folder(args.folder, args.name, args.data_dir, **_writing(args)))


def _writing(args: argparse.Namespace) -> dict[str, Any]:
  return select(args, "shorter_side", "quality", "num_shards", "num_workers")


def _convert_data(args: argparse.Namespace) -> None:
  from lip_jax.data.prepare.convert import convert_to_array_record

  workers = args.num_workers
  say(convert_to_array_record(args.dataset, args.data_dir, args.out_dir, num_workers=workers))


def _verify_data(args: argparse.Namespace) -> int:
  from lip_jax.data.prepare.verify import verify

  result = verify(args.dataset, args.data_dir, decode=args.decode, num_workers=args.num_workers)
  say(result)
  return 0 if result.ok else 1


def _bench_data(args: argparse.Namespace) -> None:
  from lip_jax.data import bench

  rates = {} if args.images_per_second is None else {"step_rates": args.images_per_second}
  given = select(args, "data_dir", "split", "image_size", "num_threads", "seconds")
  say(bench.bench(args.source, **given, **rates))
