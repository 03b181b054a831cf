"""Draft adapters of autoregressive models: the text they learn from, and their training."""
