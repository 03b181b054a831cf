"""Ablations: students and decoders that differ in one thing, and what that did."""
