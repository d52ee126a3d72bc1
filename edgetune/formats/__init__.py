"""What lies on a disk: bundles, adapters, models and their parts, read and written."""
