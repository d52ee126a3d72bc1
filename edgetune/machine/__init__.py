"""What this machine has left, memory, processors and disks, and where things are kept on it."""
