"""Data sets and input pipelines: JPEG records on disk to uint8 NumPy batches, without TensorFlow.

Nothing is imported here: the operator and the models work where no data library is installed.
"""
