"""Engines whose model is elsewhere: over a websocket, or behind an MQTT broker."""
