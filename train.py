"""Trains a network: `lip-jax train`, for hosts that have this checkout. See --help."""

import sys

from lip_jax import cli

if __name__ == "__main__":
  sys.exit(cli.main(["train", *sys.argv[1:]]))
