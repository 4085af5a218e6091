"""Collectives, nodes and the start of the ranks."""
