"""Small things that every other package may use."""
