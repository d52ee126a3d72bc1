"""TODO edgetune/runtimes/ort_training."""
