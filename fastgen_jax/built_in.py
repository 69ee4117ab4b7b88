"""The built-in demo model: where its checkpoint lies and what it is called."""

from pathlib import Path

DEMO = Path(__file__).parent / "demo" / "checkpoint"
DEMO_NAME = "fastgen-demo"
