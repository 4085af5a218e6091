"""Addax inside DeepSpeed's engine: registration, and its ZeRO-3 optimizer."""
