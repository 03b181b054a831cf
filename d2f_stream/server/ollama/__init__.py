"""Ollama's API over the server's streams: chat, generate, and what its clients ask first."""
