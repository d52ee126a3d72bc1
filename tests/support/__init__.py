"""What tests of several rooms share: builders, oracles, workers and the machine's means; one concept a module."""
