"""The frozen projections of a trunk as FPGA cores: hls4ml writes them in HLS C++, and g++ compiles their C simulation.

The simulation computes the very bits of the circuit, one multiplication after the other. It is an emulation: no FPGA
is needed, nothing is synthesised, and its speed says nothing of a board's.
"""
