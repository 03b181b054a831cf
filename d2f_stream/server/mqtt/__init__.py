"""The worker's side of MQTT: requests from a broker, streams to it."""
