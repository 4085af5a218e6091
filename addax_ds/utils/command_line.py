"""Shared handling of command lines."""

import argparse
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import field
from typing import Any, NoReturn

from addax_ds.utils.errors import UserError
from addax_ds.utils.signals import INTERRUPTED

logger = logging.getLogger(__name__)


def flag(default: Any, text: str, **more: Any) -> Any:
    """Declare a field of a dataclass of arguments, with what ``--help`` says of it."""
    return field(default=default, metadata={"help": text, **more})


class Parser(argparse.ArgumentParser):
    """`argparse.ArgumentParser` that raises `UserError` for a mistake, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Raise it."""
        raise UserError(f"{message[:1].upper()}{message[1:]}. See --help.")


@contextmanager
def mistakes_end_the_program() -> Iterator[None]:
    """End the program for a `UserError`: its message on standard error, and exit status 1.

    Ctrl-C ends it with a sentence, too, and with status 130.
    """
    try:
        yield
    except KeyboardInterrupt:
        logger.warning("Interrupted.")
        raise SystemExit(INTERRUPTED) from None
    except UserError as error:
        print(f"\naddax_ds: error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(1) from error
