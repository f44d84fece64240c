"""Scores of single answers, as the published evaluations define them; no model and no file here."""
