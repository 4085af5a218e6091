"""The optimizer and the arithmetic of a step."""
