"""Benchmarks whose results are recorded under bench/: python -m lab.bench COMMAND."""
