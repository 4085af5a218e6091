"""Studies: they run trainings as processes and report on them. They need a checkout."""
