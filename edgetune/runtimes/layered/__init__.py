"""The layered form: the graphs of `edgetune.preparation.graphs.layered`, run sublayer by sublayer.

One sublayer's weights and activations are in use at a time. Hidden states between the sublayers are kept for the
backward pass; inside of a sublayer the backward graph takes what the plan keeps and computes the rest again.
"""
