"""What needs the packages that only a host has: builders, and the versions of tools."""
