"""Scores of a model on published tasks, through lm-evaluation-harness."""
