"""The benchmark: edgetune and PyTorch + PEFT in one sitting; `make bench`, described in docs/benchmarks.md."""
