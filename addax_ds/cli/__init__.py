"""Programs: training and planning."""

from addax_ds.utils.command_line import mistakes_end_the_program
from addax_ds.utils.extras import naming_extras

# Before a module of this folder fails at its own imports, where no program could say it.
with mistakes_end_the_program(), naming_extras():
    import transformers  # noqa: F401
