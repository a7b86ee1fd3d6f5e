"""The outside: the disk."""
