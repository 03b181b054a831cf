"""Benchmarks of exported models."""
