"""Pure functions of arrays: poolings, normalization, boxes, RoIs, and their kernels."""
