"""Compiled programs, kept in the workdir for restarts."""

import contextlib
import logging
from collections.abc import Iterator

import jax
from etils import epath
from jax._src import compilation_cache as entries  # how they are compressed has no public name
from jax.experimental.compilation_cache import compilation_cache

from lip_jax.training import workdir as workdir_lib

log = logging.getLogger("lip_jax")


@contextlib.contextmanager
def kept_in(workdir: epath.Path) -> Iterator[None]:
  """Keeps what is compiled in WORKDIR/compilation_cache, unless JAX was given another place."""
  if jax.config.jax_compilation_cache_dir is not None:  # type: ignore[attr-defined, unused-ignore]
    yield
    return
  directory = workdir / "compilation_cache"
  # JAX writes from the first process, and in place; objects of a bucket are whole or not there.
  if jax.process_index() == 0 and not workdir_lib.in_bucket(directory):
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
  magic = entries.compress_executable(b"")[:2]
  for path in directory.glob("*-cache"):
    try:
      content = path.read_bytes()
      # Another Python's programs may be compressed in another way.
      whole = content[:2] not in (b"", magic) or _can_be_read(content)
      if not whole:
        log.warning("%s was cut off; what it held is compiled again", path)
        path.unlink()
    except OSError as error:  # which leaves it as slow as it is
      log.warning("%s: %s", path, error.strerror)


def _can_be_read(content: bytes) -> bool:
  try:
    entries.decompress_executable(content)
  except Exception:  # whatever the compression at hand raises
    return False
  return True
