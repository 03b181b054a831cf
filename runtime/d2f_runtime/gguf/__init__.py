"""GGUF files, llama.cpp's format for models: what one holds, read within bounds. Knows no model."""
