"""Transformer configuration, layers and checkpoints; the embedded model."""
