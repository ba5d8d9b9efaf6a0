"""Text to packed batches: sources -> split -> tokenizer -> cache -> packing, order -> loader."""
