"""What every training has: loop, step, optimizer, checkpoints, metrics; it knows no task."""
