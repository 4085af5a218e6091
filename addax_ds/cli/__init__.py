"""Programs: training and planning."""

from addax_ds.utils.extras import naming_extras

with naming_extras():  # before a module of this folder fails at its own imports
    import transformers  # noqa: F401
