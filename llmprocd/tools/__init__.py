"""The outside: what a model can do."""
