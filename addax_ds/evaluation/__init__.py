"""Scoring of data sets: likelihoods and written answers."""
