"""Memory of a training step, planned without weights, hub or GPU."""
