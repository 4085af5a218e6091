"""Models: finding, building and loading them."""
