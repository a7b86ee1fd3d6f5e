"""The outside: models."""
