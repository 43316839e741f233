"""Configurations given to a command: a file, and values that are changed."""

import argparse
import dataclasses
import runpy
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from lip_jax.cli.arguments import add, add_command, literal
from lip_jax.errors import UsageError
from lip_jax.training import config as config_lib


def load(file: str, changes: Sequence[str] = ()) -> config_lib.Config:
  """Configuration of a file, with values changed.

  Args:
    file: path of a configuration file, and behind a colon the argument of its `get_config`.
    changes: KEY=VALUE each, with dots between the keys of nested values. What can be None can be
      set to None.

  Raises:
    UsageError: the file cannot be read, or a key or value is wrong.
  """
  values = _read(file)
  for change in changes:
    _change(values, config_lib.config_class(values), change)
  return config_lib.from_dict(values)


def _read(file: str) -> dict[str, Any]:
  path, _, argument = file.partition(":")
  if not Path(path).is_file():
    raise UsageError(
      f"cannot read --config={file}: there is no configuration file {path!r}; see configs/"
    )
  try:
    values = runpy.run_path(path)["get_config"](*[argument] if argument else [])
    if dataclasses.is_dataclass(values) and not isinstance(values, type):
      values = dataclasses.asdict(values)
    return ConfigDict(values).to_dict()
  except UsageError as error:
    raise UsageError(f"cannot read --config={file}: {error}") from None
  except Exception as error:  # a configuration file is code, which can raise anything
    reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
    raise UsageError(f"cannot read --config={file}: {type(error).__name__}: {reason}") from error


def _change(values: dict[str, Any], cls: Any, change: str) -> None:
  """Sets one value of a configuration of class `cls`."""
  key, equals, text = change.partition("=")
  if not equals:
    raise UsageError(f"{change!r} is not of the form KEY=VALUE, such as dtype=bfloat16")
  *sections, name = key.split(".")
  if not (name and all(sections)):
    raise UsageError(f"{change!r} lacks a key: write KEY=VALUE, such as dtype=bfloat16")
  for section in sections:
    values, cls = values.setdefault(section, {}), _kind(cls, section)
    if not isinstance(values, dict):
      raise UsageError(f"{change!r}: {section} must hold settings, and is {values!r} in the file")
  values[name] = _parse(text, _kind(cls, name))


def _kind(cls: Any, name: str) -> Any:
  """Type of a field; any where there is none, which `from_dict` says, or a constructor checks."""
  fields = dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ()
  return next((field.type for field in fields if field.name == name), Any)


def _parse(text: str, kind: Any) -> Any:
  """A value as the field's type has it, or the text where it is none; `from_dict` says so."""
  union = typing.get_origin(kind) in (types.UnionType, typing.Union)
  kinds = typing.get_args(kind) if union else (kind,)
  if text == "None":  # no text field has that value: one that cannot be None says so
    return None
  if (bool in kinds or kind is Any) and text.lower() in ("true", "false"):
    return text.lower() == "true"
  if str in kinds:
    return text
  return literal(text)


def add_config_command(commands: Any) -> None:
  """Adds `config` to the subparsers `commands`."""
  text = "print the whole configuration of a file: its values and the defaults of all others"
  parser = add_command(commands, "config", _print, text)
  add(parser, {"file FILE": "such as configs/imagenet.py:lip_resnet50"})
  add_changes(parser)
  add(parser, {"--json": "as a run's config.json has it"})


def add_changes(parser: argparse.ArgumentParser) -> None:
  """Adds the option that changes values of a configuration."""
  text = (
    "a value of the configuration, such as dtype=bfloat16 or model.pool=average; may be repeated; "
    "--config.KEY=VALUE is the same"
  )
  add(parser, {"--set KEY=VALUE": text}, action="append", default=[])


def _print(args: argparse.Namespace) -> None:
  config = load(args.file, args.set)
  if args.json:
    print(config_lib.to_json(config))
    return
  for key, value in config_lib.flatten(dataclasses.asdict(config)).items():
    print(f"{key} = {value!r}")
