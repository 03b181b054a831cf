"""OpenAI's chat, completion and model API over the server's streams."""
