"""Rows of files, in whatever shape they have, as records to be learnt from."""
