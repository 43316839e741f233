"""Eight fake CPU devices, quick compilation, and arrays of different rank do not mix silently."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
  os.environ.get("XLA_FLAGS", "")
  + " --xla_force_host_platform_device_count=8"
  # Most of the tests' time is compiling: a quarter of it this way. tests/e2e runs the usual way.
  + " --xla_backend_optimization_level=0"
  + " --xla_llvm_disable_expensive_passes=true"
  + " --xla_cpu_use_fusion_emitters=false"
)

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def x64():
  """float64 for the time of a test."""
  with jax.enable_x64(True):
    yield
