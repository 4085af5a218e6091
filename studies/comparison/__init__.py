"""Methods against each other on real data: what `launch/compare.py` runs and reports."""
