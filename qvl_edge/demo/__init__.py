"""The small model that ships, its scenes, and what `qvl-edge demo` and the tests do with them."""

from pathlib import Path

SMALL_MODEL = Path(__file__).with_name("checkpoint")
