"""Lookup of the task that ``--task`` names."""

import os
import runpy
import sys
from pathlib import Path

from addax_ds.tasks.base import Task
from addax_ds.tasks.table import TASKS
from addax_ds.utils.errors import UserError
from addax_ds.utils.messages import did_you_mean


def find_task(name: str, data: str | None = None) -> Task:
    """Find a task of the table, or the one that a user's file defines.

    Args:
        name: a task's name, or ``file.py:NAME``; the file is run, and may import those beside it.
        data: a folder or file to read instead of the task's own source; see `Local`.

    Raises:
        UserError: there is no such task, file or name, or the file cannot be run.
    """
    file, colon, variable = name.rpartition(":")
    task = _from_file(Path(file), variable) if colon else TASKS.get(name)
    if task is None:
        raise UserError(
            f"--task {name}: no such task.{did_you_mean(name, TASKS)} There are "
            f"{', '.join(TASKS)}, and file.py:NAME for one of your own"
        )
    if data is None:
        return task
    if not os.path.exists(data):
        raise UserError(f"--task_data {data}: there is no such file or folder")
    return task.with_local_data(data)


def _from_file(file: Path, variable: str) -> Task:
    if not os.path.isfile(file):
        raise UserError(f"--task {file}:{variable}: there is no file {file}")
    # It may import what lies beside it, as a script may; but nothing that is installed is hidden.
    if (folder := str(file.resolve().parent)) not in sys.path:
        sys.path.append(folder)
    try:
        found = runpy.run_path(str(file))
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"--task {file}:{variable}: {file} cannot be run: {error!r}") from error
    task = found.get(variable)
    if not isinstance(task, Task):
        tasks = [name for name, value in found.items() if isinstance(value, Task)]
        raise UserError(
            f"--task {file}:{variable}: it is not a Task; {file} has {', '.join(tasks) or 'none'}"
        )
    return task
