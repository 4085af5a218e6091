"""Checkpoints: atomic folders, identity of a run, weights on disk."""
