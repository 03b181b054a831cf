"""Distillation of a bidirectional diffusion model into a block-causal D2F student."""
