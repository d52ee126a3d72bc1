"""TODO edgetune/formats."""
