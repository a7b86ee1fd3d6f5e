"""llmprocd runs language-model conversations as Unix processes."""

__version__ = "0.1.0"
