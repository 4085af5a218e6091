"""Folders of checkpoints: where they are, whose they are, and which of them go."""

import io
import re
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from addax_ds.checkpoint import atomic
from addax_ds.distributed.nodes import ranks_of_node

RUN_ID_NAME = "addax_run_id"


def atomic_folder(folder: Path, args: TrainingArguments) -> AbstractContextManager[Path]:
    """Give where to write what is to be ``folder``, which appears when all of it is on the disk.

    Every rank has to call and enter; see `atomic.atomic_folder`. Several nodes need a file system
    that they share, or ``save_on_each_node`` if each has its own. On disks of their own
    without that flag the first node alone has the folder, and it has to be copied to the others
    before a run can go on from it.

    Raises:
        UserError: on all ranks, if one of them cannot write.
    """
    return atomic.atomic_folder(folder, writers(args))


def steps(output_dir: Path) -> list[int]:
    """Return the steps of the checkpoints in a folder, the newest first."""
    found = (
        re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name)
        for path in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if path.is_dir()
    )
    return sorted((int(match[1]) for match in found if match), reverse=True)


def path_of(output_dir: Path, step: int) -> Path:
    """Return where Trainer keeps the checkpoint of a step."""
    return output_dir / f"{PREFIX_CHECKPOINT_DIR}-{step}"


def step_of(folder: Path) -> int:
    """Return the step of a checkpoint from its path."""
    return int(folder.name.rpartition("-")[2])


def read_run_id(folder: Path) -> str | None:
    """Return the id of the run that wrote a checkpoint; None if it has none."""
    try:
        found = (folder / RUN_ID_NAME).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return found if re.fullmatch("[0-9a-f]{32}", found) else None


def write_run_id(folder: Path, run_id: str) -> None:
    """Write the id of a run into a checkpoint."""
    (folder / RUN_ID_NAME).write_text(f"{run_id}\n", encoding="utf-8")


def rotate(
    output_dir: Path,
    step: int,
    limit: int | None,
    best: str | None,
    run_id: str | None = None,
) -> None:
    """Remove the oldest checkpoints of a run beyond ``save_total_limit``; one rank calls it.

    Those of later steps count as the oldest: the run went on from before them.

    Args:
        output_dir: where they are.
        step: of the checkpoint that was just written, which stays.
        limit: how many to keep; all if it is None or 0.
        best: path of the best one, which stays.
        run_id: of the run, as in its checkpoints; those of others stay.
    """
    if not limit or limit < 0:
        return
    own = (s for s in steps(output_dir) if read_run_id(path_of(output_dir, s)) == run_id)
    by_age = sorted(own, key=lambda other: (other <= step, other))
    kept = {path_of(output_dir, step), Path(best) if best else None} - {None}
    removable = [p for s in by_age if (p := path_of(output_dir, s)) not in kept]
    for path in removable[: max(0, len(by_age) - max(limit, len(kept)))]:
        with atomic.writing(path):
            atomic.discard(path)


def writers(args: TrainingArguments) -> list[int]:
    """Ranks that share a file system with this rank, or with rank 0 if nodes do not all save."""
    return ranks_of_node(args, None if args.save_on_each_node else 0)


def torch_save(content: Any, path: Path) -> None:
    """Save by way of memory: torch itself does not say why a file cannot be written."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    path.write_bytes(buffer.getbuffer())
