"""PyTorch on hosts with one GPU or many, or none: the same step over the bundle's own weights."""
