"""Checkpoints of a run: written atomically, verified, pruned."""
