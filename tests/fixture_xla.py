"""Flags of XLA for the tests, most of whose time is compiling: a quarter of it this way."""

import jaxlib.version

QUICK = (
  "--xla_backend_optimization_level=0"
  " --xla_llvm_disable_expensive_passes=true"
  " --xla_cpu_parallel_codegen_split_count=1"  # the other cores run other tests
  # Later ones have no other emitters, and end the process at a flag that they do not know.
  + (" --xla_cpu_use_fusion_emitters=false" if jaxlib.version.__version_info__ < (0, 11) else "")
)
