"""An output folder belongs to one run: a lock while it runs, an id in its checkpoints.

Two runs at once would remove each other's unfinished folders. A run in the folder of an earlier one
would replace or delete its checkpoints, and a later resume could not tell whose is the newest.

The id is made when a run starts afresh and stays when it resumes.
"""

import logging
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout
from transformers import TrainingArguments

from addax_ds.checkpoint import atomic, folders
from addax_ds.checkpoint.state import STATE_NAME
from addax_ds.distributed.collectives import all_gather_object, raise_on_all_ranks
from addax_ds.utils.errors import UserError

logger = logging.getLogger(__name__)

LOCK = "_addax_ds.lock"  # Trainer leaves names with such a beginning out of its uploads
WAIT_SECONDS = 10.0
"""How long a lock is waited for: a rank that was killed a moment ago may still have it."""


@contextmanager
def held(args: TrainingArguments) -> Iterator[None]:
    """Keep other runs out of ``output_dir`` while the body runs; every rank has to enter.

    The folder is made if need be, and removed again if it is left empty. One process of each file
    system that is written to holds the lock, which the kernel releases if it dies. The body may
    enter again. On a file system without locks there is a warning. What a run that died while it
    wrote has left in the folder is removed.

    Raises:
        UserError: on all ranks: another run works in the folder, or it cannot be written.
    """
    assert args.output_dir is not None
    folder = Path(args.output_dir)
    # A lock that is the file's existence would take the file that is touched here for another's.
    lock = FileLock(folder / LOCK, is_singleton=True, fallback_to_soft=False)
    made, locked = False, False
    try:
        with raise_on_all_ranks():
            if args.should_save:
                with atomic.writing(folder):
                    made = not folder.exists()
                    folder.mkdir(parents=True, exist_ok=True)
                    Path(lock.lock_file).touch()
                locked = _acquire(lock, args)
                if not locked:
                    Path(lock.lock_file).unlink(missing_ok=True)
                if lock.lock_counter <= 1:  # not entered again
                    with atomic.writing(folder):
                        atomic.remove_unfinished(folder)
        yield
    finally:
        if locked:
            if lock.lock_counter == 1:
                Path(lock.lock_file).unlink(missing_ok=True)  # who waits for it looks again
            lock.release()
        if made:
            with suppress(OSError):
                folder.rmdir()


def _acquire(lock: FileLock, args: TrainingArguments) -> bool:
    """Take a lock, or warn that there are none; return whether it was taken."""
    try:
        lock.acquire(timeout=WAIT_SECONDS)
    except Timeout as error:
        nodes = (
            "If nodes share this file system, leave out --save_on_each_node; otherwise wait"
            if args.save_on_each_node
            else "Wait"
        )
        raise UserError(
            f"--output_dir {args.output_dir}: another run is at work there. {nodes} until it has "
            "ended, or give this one its own --output_dir"
        ) from error
    except (NotImplementedError, OSError) as error:
        logger.warning(
            "%s cannot be locked (%s): nothing keeps a second run out of the folder, so start "
            "none there before this one has ended",
            lock.lock_file,
            error,
        )
        return False
    return True


def claim(args: TrainingArguments, resumed: Path | None, own: str | None = None) -> str:
    """Return the id of a run whose ``output_dir`` has no other's checkpoints.

    Every rank has to call it, with the folder held; all get the same.

    Args:
        args: say where checkpoints are, and whether this rank sees them.
        resumed: the checkpoint that the run goes on from, or None. If it has no id, the run gets
            a new one.
        own: id of a run that starts afresh once more in the same process.

    Raises:
        UserError: on all ranks, with the names of another run's checkpoints.
    """
    if resumed is not None:
        own = folders.read_run_id(resumed)
    own = all_gather_object(own or uuid.uuid4().hex)[0]
    with raise_on_all_ranks():
        if args.should_save:
            _refuse_others(Path(args.output_dir or "."), own, resumed)
    return own


def _refuse_others(output_dir: Path, own: str, resumed: Path | None) -> None:
    found = [folders.path_of(output_dir, step) for step in folders.steps(output_dir)]
    ids = {folder.name: folders.read_run_id(folder) for folder in found}
    # Beside the one that a run resumes from, one without an id may be its own, damaged.
    accepted = (own,) if resumed is None else (own, None)
    others = [name for name, run_id in ids.items() if run_id not in accepted]
    if others:
        # Of many, those that a resume would take first.
        names = ", ".join(others[:3]) + (f" and {len(others) - 3} more" if others[3:] else "")
        # Without it no run can go on from it: of a baseline, or written with --save_only_model.
        resumable = (output_dir / others[0] / STATE_NAME).is_file()
        if resumed is not None:
            remedy = "or move them away"
        elif resumable:
            remedy = "go on from them with --resume_from_checkpoint True, or remove them"
        else:
            remedy = "or remove them"
        raise UserError(
            f"--output_dir {output_dir}: it holds {names} of another run, which this one would "
            f"replace or delete. Give this one its own --output_dir, {remedy}"
        )
