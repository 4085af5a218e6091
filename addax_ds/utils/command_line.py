"""What the commands of this package do alike with their arguments."""

import argparse
from typing import NoReturn

from addax_ds.utils.errors import UserError


class Parser(argparse.ArgumentParser):
    """`argparse.ArgumentParser` that raises `UserError` for a mistake, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Raise it."""
        raise UserError(f"{message[:1].upper()}{message[1:]}. See --help.")
