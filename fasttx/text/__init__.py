"""Raw text to `PackedBatch`: datasets, splits, labels, tokenizer, packing."""
