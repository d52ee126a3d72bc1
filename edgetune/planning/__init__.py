"""What fits into this machine or a device, and how long it takes."""
