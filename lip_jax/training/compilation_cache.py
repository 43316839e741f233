"""Compiled programs, kept in the workdir for restarts."""

import contextlib
import importlib
import logging
from collections.abc import Iterator

import jax
from etils import epath
from jax.experimental.compilation_cache import compilation_cache

from lip_jax.training.workdir import in_bucket

log = logging.getLogger("lip_jax")

_ZSTD, _ZLIB = b"\x28\xb5\x2f\xfd", b"\x78"  # how begins what is compressed by them


@contextlib.contextmanager
def kept_in(workdir: epath.Path) -> Iterator[None]:
  """Keeps what is compiled in WORKDIR/compilation_cache, unless JAX was given another place."""
  if jax.config.jax_compilation_cache_dir is not None:  # type: ignore[attr-defined, unused-ignore]
    yield
    return
  directory = workdir / "compilation_cache"
  # JAX writes from the first process, and in place; objects of a bucket are whole or not there.
  if jax.process_index() == 0 and not in_bucket(directory):
    _delete_cut_off(directory)
  jax.config.update("jax_compilation_cache_dir", str(directory))
  compilation_cache.reset_cache()
  try:
    yield
  finally:
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()


def _delete_cut_off(directory: epath.Path) -> None:
  """Deletes programs that a process was killed while writing: JAX would never replace them."""
  for path in directory.glob("*-cache"):
    try:
      if _is_cut_off(path.read_bytes()):
        log.warning("%s was cut off; what it held is compiled again", path)
        path.unlink()
    except OSError as error:  # which leaves it as slow as it is
      log.warning("%s: %s", path, error.strerror)


def _is_cut_off(content: bytes) -> bool:
  """Whether a program is known not to be whole; of other compressions than these nothing is."""
  # JAX takes what there is: zstd of Python 3.14 or of the package zstandard, or zlib.
  modules = ("compression.zstd", "zstandard") if content.startswith(_ZSTD) else ("zlib",)
  if content and not content.startswith((_ZSTD, _ZLIB)):
    return False
  for module in modules:
    try:
      importlib.import_module(module).decompress(content)
    except ImportError:
      continue
    except Exception:  # each has an error of its own
      return True
    return False
  return False
