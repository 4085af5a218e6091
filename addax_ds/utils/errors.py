"""Errors meant for the person who started the run."""


class UserError(ValueError):
    """Bad input whose message alone says what was wrong, where, and how to mend it.

    Entry points print the message without a traceback and exit with a non-zero status.
    """
