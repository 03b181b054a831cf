"""Triton kernels of the fast step, each beside the plain torch function that it must equal."""
