"""The built-in demo: a checkpoint, and what trained it."""

from pathlib import Path

DEMO = Path(__file__).parent / "checkpoint"
DEMO_NAME = "fastgen-demo"
