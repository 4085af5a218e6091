"""Tasks: a source of rows, and functions that turn a row into a prompt with answers.

A task is one frozen object of plain functions over a row's columns; `addax_ds.tasks.table` holds
all that come with the package. Nothing here knows of tokenizers or models.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from addax_ds.tasks.sampling import Drawn, Sizes, SourceRow, draw
from addax_ds.tasks.sources import Local, Source
from addax_ds.utils.errors import UserError

Columns = Mapping[str, Any]

_TRIED_ROWS = 8


@dataclass(frozen=True)
class ChoiceRow:
    """A prompt and the answers to choose from.

    Attributes:
        prompt: text before the answer.
        candidates: texts that are appended to the prompt as they are, space or newline included.
        label: index of the right one, which a model learns to write.
        origin: where the row comes from, for messages and predictions.
        also_right: indices of further candidates that count as right.
    """

    prompt: str
    candidates: tuple[str, ...]
    label: int
    origin: str
    also_right: tuple[int, ...] = ()

    @property
    def answer(self) -> str:
        """Text that a model learns to write after ``prompt``."""
        return self.candidates[self.label]


@dataclass(frozen=True)
class GenerationRow:
    """A prompt and the answers that count as right; a model learns to write the first, one line.

    Attributes:
        prompt: text before the answer.
        answers: the right answers, bare.
        origin: where the row comes from, for messages and predictions.
    """

    prompt: str
    answers: tuple[str, ...]
    origin: str

    @property
    def answer(self) -> str:
        """Text that a model learns to write after ``prompt``, line break included."""
        return f" {self.answers[0]}\n"


Row = ChoiceRow | GenerationRow


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """Base of all tasks; see `ChoiceTask` and `GenerationTask`.

    Attributes:
        name: what ``--task`` calls it.
        title: what a report calls it.
        source: returns the splits, either ``train`` and ``validation`` or one alone.
        columns: the columns that are read, and the type of their values.
        prompt: text before the answer. Whitespace in front is removed.
        metric: the one by which checkpoints are compared.
        sizes: rows that are drawn for training, dev and test.
        aliases: other names of columns, as another edition of the same data has them.
    """

    name: str
    title: str
    source: Source
    columns: Mapping[str, type]
    prompt: Callable[[Columns], str]
    metric: str
    sizes: Sizes = field(default_factory=Sizes)
    aliases: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, expected in self.columns.items():
            try:
                isinstance(None, expected)
            except TypeError as error:
                raise UserError(
                    f"task {self.name}: column {name} has the type {expected}, of which nothing is "
                    "an instance: give a class (list in place of list[str]), or several (int | str)"
                ) from error

    def with_local_data(self, path: str | Path) -> "Task":
        """Return the same task on a folder or a JSON Lines file; see `Local`."""
        return replace(self, title=f"{self.title} ({path})", source=Local(Path(path)))

    def rows(self, sizes: Sizes | None = None, seed: int = 0) -> Drawn[Row]:
        """Draw the rows of a run, and read them.

        Args:
            sizes: instead of the task's own.
            seed: which rows are drawn; see `draw`.

        Raises:
            UserError: the source cannot be read, a row lacks a column, has a value of another type,
                or names no right answer.
        """
        drawn = draw(self._splits(), sizes or self.sizes, seed, self.title)
        return Drawn(
            description=drawn.description,
            notes=drawn.notes,
            train=list(map(self._read, drawn.train)),
            dev=list(map(self._read, drawn.dev)),
            test=list(map(self._read, drawn.test)),
        )

    def _splits(self) -> Mapping[str, Sequence[SourceRow]]:
        try:
            splits: Any = self.source()
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"task {self.name}: its source cannot be read: {error!r}") from error
        if isinstance(splits, Mapping):
            kinds = {name: _unlike_rows(rows) for name, rows in splits.items()}
            found = [f"{name}: {kind}" for name, kind in kinds.items() if kind is not None]
        else:
            found = [type(splits).__name__]
        if found:
            raise UserError(
                f"task {self.name}: its source must return splits by name, each a sequence of "
                f"SourceRow, and has returned {', '.join(found)}"
            )
        return splits

    def _read(self, row: SourceRow) -> Row:
        columns = {self.aliases.get(name, name): value for name, value in row.columns.items()}
        where = f"task {self.name}, {row.origin}"
        for name, expected in self.columns.items():
            if name not in columns:
                raise UserError(
                    f"{where}: there is no column {name}; found {', '.join(sorted(columns))}"
                )
            value = columns[name]
            if not isinstance(value, expected) or (expected is int and isinstance(value, bool)):
                raise UserError(
                    f"{where}: column {name} must be of type "
                    f"{getattr(expected, '__name__', expected)}, and is "
                    f"{type(value).__name__}"
                )
        try:
            read = self._row(self.prompt(columns).lstrip(), columns, row.origin)
            texts = read.candidates if isinstance(read, ChoiceRow) else read.answers
            # JSON can spell half a surrogate pair, which is no text: tokenizers die on it.
            "".join((read.prompt, *texts)).encode()
            return read
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, UserError):
                raise UserError(f"task {self.name}, {error}") from error
            raise UserError(f"{where}: the row cannot be put in words: {error!r}") from error

    @abstractmethod
    def _row(self, prompt: str, columns: Columns, origin: str) -> Row:
        """Add the answers."""


def _unlike_rows(rows: Any) -> str | None:
    """Return what something is instead of a sequence of rows; None if it is one."""
    if not isinstance(rows, Sequence):
        return type(rows).__name__
    if rows and not isinstance(rows[0], SourceRow):
        return f"a sequence of {type(rows[0]).__name__}"
    return None


def _strings(what: str, found: Any, origin: str) -> tuple[str, ...]:
    """Check that a task's function has returned a sequence of strings, and not one string."""
    # Not a set, whose order would be another one on each rank.
    is_list = isinstance(found, Sequence) and not isinstance(found, str)
    if not is_list or not found or not all(isinstance(text, str) for text in found):
        unusable = "; rows without an answer cannot be used" if what == "answers" else ""
        raise UserError(
            f"{origin}: the {what} {found!r} are not a list of one or more strings{unusable}"
        )
    return tuple(found)


def label_column(columns: Columns) -> Sequence[int]:
    """Return what the column ``label`` says, as most tasks have it."""
    return (columns["label"],)


@dataclass(frozen=True, kw_only=True)
class ChoiceTask(Task):
    """A task whose answer is one of a few candidates, chosen by likelihood.

    Attributes:
        candidates: texts that follow the prompt as they are. One that follows a word begins with a
            space, since most tokenizers join the two. Spaces at the end are removed.
        labels: indices of the candidates that count as right; the first is learnt.
    """

    candidates: Callable[[Columns], Sequence[str]]
    labels: Callable[[Columns], Sequence[int]] = label_column
    metric: str = "accuracy"

    def _row(self, prompt: str, columns: Columns, origin: str) -> ChoiceRow:
        found = _strings("candidates", self.candidates(columns), origin)
        candidates = tuple(candidate.rstrip(" ") for candidate in found)
        labels = tuple(self.labels(columns))
        for label in labels or (None,):
            if label is None or not 0 <= label < len(candidates):
                raise UserError(
                    f"{origin}: label {label} names none of the {len(candidates)} candidates "
                    f"{list(candidates)}; unlabelled rows cannot be used"
                )
        return ChoiceRow(prompt, candidates, labels[0], origin, labels[1:])


@dataclass(frozen=True, kw_only=True)
class GenerationTask(Task):
    """A task whose answer the model writes: one line, decoded greedily.

    Attributes:
        answers: the right answers; the first is learnt.
        score: metrics of one answer, each between 0 and 1, from its text and the right ones.
        max_new_tokens: longest answer in tokens.
    """

    answers: Callable[[Columns], Sequence[str]]
    score: Callable[[str, Sequence[str]], Mapping[str, float]]
    max_new_tokens: int = 50
    metric: str = "f1"

    def check_score(self, rows: Sequence[GenerationRow]) -> None:
        """Try ``score`` on the first rows, with their first right answer and with none.

        Raises:
            UserError: it fails, which would end a run after its training, or lacks ``metric``.
        """
        for row in rows[:_TRIED_ROWS]:
            for answer in (row.answers[0], ""):
                where = f"task {self.name}, {row.origin}: score({answer!r}, {list(row.answers)})"
                try:
                    metrics = self.score(answer, row.answers)
                    found = {name: float(value) for name, value in metrics.items()}
                except Exception as error:
                    raise UserError(f"{where} fails: {error!r}") from error
                if self.metric not in found:
                    raise UserError(
                        f"{where} has no {self.metric}, by which checkpoints are compared; found "
                        f"{', '.join(found) or 'nothing'}"
                    )

    def _row(self, prompt: str, columns: Columns, origin: str) -> GenerationRow:
        return GenerationRow(prompt, _strings("answers", self.answers(columns), origin), origin)
