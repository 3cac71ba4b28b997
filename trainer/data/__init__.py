"""Text to batches: sources and tokenizers, datasets addressed by sample id, and the order of samples."""
