"""Configurations given to a command: a file, and values that are changed."""

import argparse
import dataclasses
import difflib
import runpy
import types
import typing
from collections.abc import Mapping, Sequence
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
  where, *rest = "config", *key.split(".")
  for name in rest[:-1]:
    cls = _field(cls, name, where)
    values = values.setdefault(name, {})
    where = f"{where}.{name}"
    if not isinstance(values, dict):
      raise UsageError(f"{where} must hold settings, and is {values!r} in the file")
  if not all(rest):
    raise UsageError(f"{change!r} lacks a key: write KEY=VALUE, such as dtype=bfloat16")
  kind = _field(cls, rest[-1], where)
  if dataclasses.is_dataclass(kind) or typing.get_origin(kind) is Mapping:
    raise UsageError(f"{where}.{rest[-1]} holds settings; set one of them, {rest[-1]}.NAME=VALUE")
  values[rest[-1]] = _parse(text, kind)


def _field(cls: Any, name: str, where: str) -> Any:
  """Type of a field of a configuration's class; any in settings that a constructor checks."""
  if typing.get_origin(cls) is Mapping:
    return Any
  fields = dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ()
  kinds = {field.name: field.type for field in fields}
  if name not in kinds:
    near = difflib.get_close_matches(name, kinds, 1)
    raise UsageError(
      f"{where} has no key {name!r}; valid keys: {', '.join(kinds) or 'none'}"
      + (f"; did you mean {near[0]}?" if near else "")
    )
  return kinds[name]


def _parse(text: str, kind: Any) -> Any:
  """A value as the field's type has it, or the text where it is none; `from_dict` says so."""
  kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
  if text == "None" and (types.NoneType in kinds or kind is Any):
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
