"""Serves one engine to many clients: websocket, OpenAI-style HTTP, MQTT, a chat page.

`streams.py` and `gateway.py` know neither sockets nor HTTP and need no extra; what speaks to the
outside each has its own file.
"""
