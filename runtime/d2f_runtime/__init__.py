"""The single-device runtime of d2f_stream: decoder, engine, backends, models."""
