"""Eight fake CPU devices, quick compilation, and arrays of different rank do not mix silently."""

import gc
import importlib.util
import logging
import os
from pathlib import Path
from unittest import mock

from fixture_xla import QUICK

# What is compiled serves the other workers, processes that tests start, and the next run.
os.environ.setdefault(
  "JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "compiled")
)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
  os.environ.get("XLA_FLAGS", "") + f" {QUICK} --xla_force_host_platform_device_count=8"
)

import jax
import pytest
from fixture_bucket import local_bucket
from jax.experimental.compilation_cache import compilation_cache

jax.config.update("jax_numpy_rank_promotion", "raise")
# Tracing makes many objects that are not garbage: looking through them is a seventh of the time.
gc.set_threshold(100_000)


def pytest_collection_modifyitems(items):
  """Whole processes and notebooks first: at the end one of them would keep one core alone busy."""
  items.sort(key=lambda item: item.path.parent.name not in ("e2e", "documents"))


@pytest.fixture(autouse=True)
def logger():
  """lip_jax's, as it was before what a test calls sets it up for a terminal."""
  log, root = logging.getLogger("lip_jax"), logging.getLogger()
  level, propagate, handlers, root_level = log.level, log.propagate, [*log.handlers], root.level
  yield log
  log.propagate, log.handlers = propagate, handlers
  log.setLevel(level)
  root.setLevel(root_level)


@pytest.fixture
def messages(caplog):
  """What lip_jax has logged so far in this test; other libraries may log at any time."""
  return lambda: [
    record.getMessage() for record in caplog.records if record.name.startswith("lip_jax")
  ]


@pytest.fixture
def files_of():
  """What lies in a directory: content by path. For "a refused command changes nothing"."""
  return lambda directory: {
    path.relative_to(directory): path.read_bytes()
    for path in sorted(directory.rglob("*"))
    if path.is_file()
  }


@pytest.fixture(scope="module")
def compilation_cache_after():
  """JAX's compilation cache as it is, for the tests after those of a module that take another."""
  before = jax.config.jax_compilation_cache_dir
  yield
  jax.config.update("jax_compilation_cache_dir", before)
  compilation_cache.reset_cache()


@pytest.fixture
def x64():
  """float64 for the time of a test."""
  with jax.enable_x64(True):
    yield


@pytest.fixture(scope="session")
def bucket_service():
  """URL of the one bucket of this process, and the variables that lead its clients to it."""
  for module in ("gcsfs", "gcp_storage_emulator"):
    if importlib.util.find_spec(module) is None:  # gcsfs may be imported only after its variables
      pytest.skip(f"{module} is not installed")
  with local_bucket() as service:
    yield service


@pytest.fixture
def bucket(bucket_service):
  """gs:// URL of a bucket that works in this test, and in its subprocesses."""
  url, variables = bucket_service
  with mock.patch.dict(os.environ, variables):
    yield url
