"""Pure functions of arrays: poolings, normalization, and their kernels."""
