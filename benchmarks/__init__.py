"""Measurements, run by hand; each writes its configuration and versions beside its numbers."""
