"""The graphs of a bundle, from the forward export to the layered form."""
