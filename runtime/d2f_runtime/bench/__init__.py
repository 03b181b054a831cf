"""Benchmarks whose results are recorded under bench/: python -m d2f_runtime.bench COMMAND."""
