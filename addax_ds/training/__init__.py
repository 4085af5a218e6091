"""Trainer with Addax's step."""
