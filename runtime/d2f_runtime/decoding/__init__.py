"""The decoder: which positions a step computes, and which proposals it accepts. Pure."""
