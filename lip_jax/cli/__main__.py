"""`python -m lip_jax.cli`."""

import sys

from lip_jax import cli

sys.exit(cli.main())
