"""Backends behind one protocol. Each heavy library is imported by the backend that needs it."""
