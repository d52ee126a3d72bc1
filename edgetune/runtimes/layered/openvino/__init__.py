"""The graphs of the layered form on OpenVINO."""
