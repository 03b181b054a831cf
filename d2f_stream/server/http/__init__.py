"""HTTP on the server: who may call, how much, and how responses are sent."""
