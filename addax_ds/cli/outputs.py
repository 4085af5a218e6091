"""Outputs at the end of a run, each of which costs no other if it fails."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import TrainingArguments

from addax_ds.distributed.collectives import raise_on_all_ranks
from addax_ds.utils.errors import UserError
from addax_ds.utils.messages import raise_problems

logger = logging.getLogger(__name__)


class Outputs:
    """Tries one output after the other, and says at the end which of them there are not."""

    def __init__(self) -> None:
        self._problems: dict[str, str] = {}

    @contextmanager
    def one(self, name: str) -> Iterator[None]:
        """Note an error of the body on any rank, and go on; every rank has to enter.

        The body must not run collectives that a rank with an error would leave out. Safe are those
        of ``save_complete_model`` and ``push_to_hub``: they agree on each error by
        `raise_on_all_ranks` before the next collective.

        Args:
            name: of the output, for messages. A second try counts alone.
        """
        self._problems.pop(name, None)
        try:
            with raise_on_all_ranks():
                yield
        except Exception as error:
            expected = isinstance(error, UserError | OSError)
            # At once, too: what follows may end the run.
            logger.warning("%s: %s", name, error, exc_info=None if expected else error)
            self._problems[name] = f"{error}"

    def require_all(self) -> None:
        """Check that there is everything.

        Raises:
            UserError: on all ranks; names what is missing, and why.
        """
        problems = [f"{name}: {problem}" for name, problem in self._problems.items()]
        raise_problems("The run has ended, and this is missing:", problems)


def output_folder(args: TrainingArguments) -> Path:
    """Return where a run writes."""
    assert args.output_dir is not None
    return Path(args.output_dir)
