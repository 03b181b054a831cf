"""The embedded model, made from nothing: its problems, its tokenizer, its training, its score."""
