"""Configurations given to a subcommand: a file, and values that are changed."""

import runpy
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict
from ml_collections.config_flags import config_flags

from lip_jax.errors import UsageError
from lip_jax.training import config as config_lib


def load(file: str, changes: Sequence[str] = ()) -> config_lib.Config:
  """Configuration of a file, with values changed as train.py does it.

  Args:
    file: path of a configuration file, and behind a colon its argument.
    changes: KEY=VALUE each, with dots between the keys of nested values.

  Raises:
    UsageError: the file cannot be read, or a key or value is wrong.
  """
  path, _, argument = file.partition(":")
  if not Path(path).is_file():
    raise UsageError(
      f"cannot read --config={file}: there is no configuration file {path!r}; see configs/"
    )
  try:
    values = runpy.run_path(path)["get_config"](*[argument] if argument else [])
  except Exception as error:  # a configuration file is code, which can raise anything
    raise UsageError(
      f"cannot read --config={file}: {type(error).__name__}: {_reason(error)}"
    ) from error
  for change in changes:
    key, equals, _ = change.partition("=")
    if not equals:
      raise UsageError(f"{change!r} is not of the form KEY=VALUE, such as dtype=bfloat16")
    check_key(values, key)
  arguments = ["lip-jax", *(f"--config.{change}" for change in changes)]
  holder = flags.FlagValues()
  config_flags.DEFINE_config_dict("config", values, flag_values=holder, sys_argv=arguments)
  try:
    holder(arguments)
  except (flags.Error, TypeError, ValueError) as error:
    raise UsageError(_reason(error)) from error
  return config_lib.from_dict(values.to_dict())


def _reason(error: Exception) -> str:
  """The last line of what an error says."""
  return (str(error).strip() or type(error).__name__).splitlines()[-1]


def check_key(values: ConfigDict, keys: str) -> None:
  """Raises UsageError for a key that the configuration does not have, with those it has.

  Args:
    values: the configuration.
    keys: with dots between those of nested values.
  """
  node, where = values, "config"
  for key in keys.split("."):
    if not isinstance(node, ConfigDict) or key not in node:
      valid = ", ".join(node) if isinstance(node, ConfigDict) else "none"
      raise UsageError(f"{where} has no key {key!r}; valid keys: {valid}")
    node, where = node[key], f"{where}.{key}"
