"""TODO edgetune/host."""
