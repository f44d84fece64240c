"""The server. A package, because a second top-level conftest would take the place of tests/conftest.py."""
