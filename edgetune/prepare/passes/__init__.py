"""TODO edgetune/prepare/passes."""
