"""Measurements and tools that need a clone of the repository: each a command, `python -m benchmarks.NAME --help`."""

import qvl_edge  # noqa: F401  # its environment, before a benchmark imports torch
