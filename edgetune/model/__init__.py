"""What Phi-3 and LoRA are, in numbers: sizes, rotary tables, slots, blocks, pieces. Nothing here reads a file."""
