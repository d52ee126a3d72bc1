"""TODO edgetune/text."""
