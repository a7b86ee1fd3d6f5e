"""llmprocctl: the command line of llmprocd."""
