"""TODO edgetune/machine."""
