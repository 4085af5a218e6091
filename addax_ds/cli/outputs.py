"""Outputs at the end of a run, each of which costs no other if it fails."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from addax_ds.distributed.collectives import raise_on_all_ranks
from addax_ds.utils.errors import UserError
from addax_ds.utils.messages import raise_problems

logger = logging.getLogger(__name__)


class Outputs:
    """Tries one output after the other, and says at the end which of them there are not."""

    def __init__(self) -> None:
        self._problems: list[str] = []

    @contextmanager
    def one(self, name: str) -> Iterator[None]:
        """Note an error of the body on any rank, and go on; every rank has to enter.

        The body must not run collectives that a rank with an error would leave out.

        Args:
            name: of the output, for messages.
        """
        try:
            with raise_on_all_ranks():
                yield
        except Exception as error:
            expected = isinstance(error, UserError | OSError)
            # At once, too: what follows may end the run.
            logger.warning("%s: %s", name, error, exc_info=None if expected else error)
            self._problems.append(f"{name}: {error}")

    def require_all(self) -> None:
        """Check that there is everything.

        Raises:
            UserError: on all ranks; names what is missing, and why.
        """
        raise_problems("The run has ended, and this is missing:", self._problems)
