"""Networks in and out: loading, folders, StableHLO, ONNX, PyTorch files, the hub."""
