"""The whole step on an accelerator: graphs of static shape, compiled once, the optimizer in fp32 on the CPU."""
