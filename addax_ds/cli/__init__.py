"""Programs: training and planning."""
