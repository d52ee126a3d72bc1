"""TODO edgetune/planning."""
