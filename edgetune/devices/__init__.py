"""TODO edgetune/devices."""
