"""From rows of JSONL to batches of token ids and labels."""
