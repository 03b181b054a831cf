"""Benchmarks, experiments, and what makes the embedded model; not part of the wheel.

Nothing in the product imports it.
"""
