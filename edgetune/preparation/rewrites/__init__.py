"""Rewrites of a graph, each with what it takes and what it leaves."""
