"""TODO edgetune/model."""
