"""Between text and token ids: tokenizer, its files, and the detokenizer of a stream."""
