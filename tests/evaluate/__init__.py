"""The evaluations. A package, so that its tests share miniature.py."""
