"""The checkpoint that a run resumes from: the given one, or the newest intact one.

All ranks come to the same decision, and share the work of reading the files.
"""

import logging
from dataclasses import dataclass
from pathlib import Path

from transformers import TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from addax_ds.checkpoint import atomic, folders
from addax_ds.checkpoint.identity import Run, check_same_run
from addax_ds.checkpoint.state import read_run
from addax_ds.distributed.collectives import all_gather_object, raise_on_all_ranks
from addax_ds.distributed.nodes import ranks_of_node
from addax_ds.utils.errors import UserError

logger = logging.getLogger(__name__)

_FLAG = "--resume_from_checkpoint"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose checksums hold.

    Attributes:
        folder: where it is.
        written: the run that wrote it.
    """

    folder: Path
    written: Run

    def check(self, run: Run) -> None:
        """Check that a run can go on from it, as far as the run is known.

        Raises:
            UserError: says why it cannot, and with which flags it could.
        """
        try:
            check_same_run(self.written, run)
        except UserError as error:
            raise UserError(f"{_FLAG} {self.folder}: {error}") from error


def find(wanted: str | bool | None, args: TrainingArguments) -> Checkpoint | None:
    """Resolve ``resume_from_checkpoint``; every rank has to call it, and all get the same.

    Args:
        wanted: a path, True for the newest intact one in ``output_dir``, which warns of those that
            are not, or False or None.
        args: say where checkpoints are, and which rank this is.

    Raises:
        UserError: on all ranks: there is none, the one that is named is damaged (the message names
            the newest intact one beside it), or no run could go on from it.
    """
    output_dir = Path(args.output_dir or ".")
    words = all_gather_object(str(wanted))
    if len(set(words)) > 1:
        raise UserError(f"{_FLAG}: the ranks were given different values: {', '.join(words)}")
    if wanted is None or words[0].lower() == "false":
        return None
    if words[0].lower() == "true":
        folder = _newest_intact(output_dir, args)
    else:
        folder = Path(words[0])
        try:
            require_intact(folder, args)
        except UserError as error:
            raise UserError(f"{_FLAG} {error}") from error
    with raise_on_all_ranks():
        try:
            return Checkpoint(folder, read_run(folder))
        except UserError as error:
            raise UserError(f"{_FLAG} {error}") from error


def _newest_intact(output_dir: Path, args: TrainingArguments) -> Path:
    reasons = []
    for folder in _newest_first(output_dir):
        damage = _damage(folder, args)
        if damage is None:
            return folder
        reasons.append(damage)
        logger.warning("%s: skipping a checkpoint that is damaged. %s", _FLAG, damage)
    what = "intact checkpoint" if reasons else "checkpoint"
    raise UserError("\n- ".join([f"{_FLAG}: there is no {what} in {output_dir}", *reasons]))


def require_intact(folder: Path, args: TrainingArguments) -> None:
    """Check that a checkpoint is as it was written; every rank has to call it.

    Raises:
        UserError: on all ranks; it names the file, and the newest intact checkpoint beside it.
    """
    damage = _damage(folder, args)
    if damage is None:
        return
    others = (other for other in _newest_first(folder.parent) if other.name != folder.name)
    intact = next((other for other in others if _damage(other, args) is None), None)
    beside = "" if intact is None else f". The newest intact checkpoint beside it: {intact}"
    raise UserError(f"{damage}{beside}")


def _newest_first(output_dir: Path) -> list[Path]:
    """Return the checkpoints that any rank sees."""
    seen = {step for found in all_gather_object(folders.steps(output_dir)) for step in found}
    return [folders.path_of(output_dir, step) for step in sorted(seen, reverse=True)]


def _damage(folder: Path, args: TrainingArguments) -> str | None:
    """Return what is wrong with a checkpoint; every rank has to call it, and all get the same.

    Each node reads all of it, as it would to load it, and its ranks share that out.
    """
    node = ranks_of_node(args)
    found, weights = None, {}
    with raise_on_all_ranks():
        try:
            _check_is_checkpoint(folder)
            atomic.verify(folder, node.index(args.process_index), len(node))
            seal = atomic.read_seal(folder)
            weights = {name: e.sha256 for name, e in seal.items() if name.endswith(".safetensors")}
        except atomic.DamagedError as error:
            found = f"{error}"
    by_rank = all_gather_object((found, weights))
    problems = [(rank, problem) for rank, (problem, _) in enumerate(by_rank) if problem]
    if problems:
        rank, problem = problems[0]
        return problem if len(problems) == len(by_rank) else f"{problem} (says rank {rank})"
    for rank, (_, others) in enumerate(by_rank):
        if others != by_rank[0][1]:
            return f"{folder}: ranks 0 and {rank} see checkpoints with different weights"
    return None


def _check_is_checkpoint(folder: Path) -> None:
    if not folder.is_dir():
        raise atomic.DamagedError(f"{folder}: there is no such folder")
    if not any((folder / name).is_file() for name in (atomic.SEAL, TRAINER_STATE_NAME)):
        raise atomic.DamagedError(f"{folder}: there is no checkpoint in this folder")
