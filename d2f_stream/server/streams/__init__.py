"""The streams of a server: their logs, their limits, and the connections that read them."""
