"""Streams whole blocks of text from block-diffusion language models."""

__version__ = "0.1.0"
