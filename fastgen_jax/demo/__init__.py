"""The built-in demo: a checkpoint, and what trained it."""
