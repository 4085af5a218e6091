"""Sharding back ends: where the weights live and how a pass gets to see them."""
