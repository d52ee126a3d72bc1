"""TODO edgetune/prepare/graphs."""
