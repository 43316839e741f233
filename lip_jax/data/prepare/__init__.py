"""Making data sets: TFDS in ArrayRecord format, without TensorFlow."""
