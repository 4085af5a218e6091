"""Checkpoints: folders that appear whole, identity of a run, weights on disk."""
