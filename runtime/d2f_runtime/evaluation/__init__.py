"""Scores of a model: many answers side by side, and published tasks by lm-evaluation-harness."""
