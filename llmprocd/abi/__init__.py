"""What the daemon and its clients agree on: msgspec and the standard library, nothing else."""
