"""Benchmarks and experiments. Not part of the wheel; nothing in the product imports it."""
