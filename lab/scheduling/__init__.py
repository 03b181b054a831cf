"""Simulations of the scheduler: real decoders and the real scheduler, steps timed by a curve."""
