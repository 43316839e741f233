"""What a run keeps of its compiled programs."""

import jax
import jax.numpy as jnp
import pytest
from etils import epath
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from lip_jax.training import compilation_cache


@pytest.fixture
def compile_in(tmp_path, compilation_cache_after):
  """Compiles a program with the cache of a workdir; returns the files there."""
  jax.config.update("jax_compilation_cache_dir", None)
  reset_cache()

  def run():
    jax.clear_caches()
    with compilation_cache.kept_in(epath.Path(tmp_path)):
      jax.jit(lambda x: jnp.sin(x) + 1)(jnp.arange(3.0)).block_until_ready()
    assert jax.config.jax_compilation_cache_dir is None
    return sorted((tmp_path / "compilation_cache").glob("*-cache"))

  return run


def test_programs_that_were_cut_off_are_compiled_and_kept_again(compile_in, caplog):
  files = compile_in()
  assert files
  times = [file.stat().st_mtime_ns for file in files]
  other = files[0].with_name("other-cache")
  other.write_bytes(b"of another compression")
  assert compile_in() == sorted([*files, other])
  assert [file.stat().st_mtime_ns for file in files] == times
  other.unlink()
  files[0].write_bytes(files[0].read_bytes()[:-10])
  files[-1].write_bytes(b"")
  assert compile_in() == files
  assert f"{files[0]} was cut off" in caplog.text
  assert f"{files[-1]} was cut off" in caplog.text
  caplog.clear()
  assert compile_in() == files
  assert "cut off" not in caplog.text
