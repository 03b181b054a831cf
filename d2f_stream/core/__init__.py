"""The values and the session that every part of the project shares: errors, parameters, events."""
