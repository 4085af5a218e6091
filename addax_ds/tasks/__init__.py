"""Tasks: rows of a data set as prompts with answers, and how answers are scored."""

from addax_ds.tasks.base import ChoiceRow, ChoiceTask, GenerationRow, GenerationTask, Task
from addax_ds.tasks.lookup import find_task
from addax_ds.tasks.sampling import Sizes, SourceRow
from addax_ds.tasks.sources import Hub, InstalledFolder, Local
from addax_ds.tasks.table import TASKS

__all__ = [
    "TASKS",
    "ChoiceRow",
    "ChoiceTask",
    "GenerationRow",
    "GenerationTask",
    "Hub",
    "InstalledFolder",
    "Local",
    "Sizes",
    "SourceRow",
    "Task",
    "find_task",
]
