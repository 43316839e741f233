"""Around a training: the doctor, ahead-of-time compilation, the paper's tables."""
