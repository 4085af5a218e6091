"""Which columns a row has, and what it is by them.

Shapes have the names that TRL gives them; the columns of a data set get those names by
``--columns``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from addax_ds.utils.errors import UserError
from addax_ds.utils.messages import did_you_mean, shown

if TYPE_CHECKING:
    from addax_ds.reading.sources import Rows

SHAPES: dict[str, tuple[str, ...]] = {
    "prompt + completion": ("prompt", "completion"),
    "messages": ("messages",),
    "text": ("text",),
    "instruction + output": ("instruction", "output"),
    "conversations": ("conversations",),
}
"""The shapes of a row: name -> columns that a row of this shape has."""

_OF_CHATS = ("tools", "chat_template_kwargs")
OPTIONAL: dict[str, tuple[str, ...]] = {
    "prompt + completion": _OF_CHATS,
    "messages": _OF_CHATS,
    "instruction + output": ("input",),
    "conversations": _OF_CHATS,
}
"""Columns that a row of a shape may also have."""

_TARGETS = {column for columns in (*SHAPES.values(), *OPTIONAL.values()) for column in columns}


def shape_of(row: Mapping[str, Any], origin: str) -> str:
    """Return the shape of a source's first row.

    Raises:
        UserError: It has none.
    """
    shapes = _shapes_in(row)
    if not shapes:
        found = listed(f"{key} (null)" if row[key] is None else key for key in row)
        raise UserError(
            f"{origin}: found columns [{found}], which fit none of the known shapes: "
            f"{' | '.join(SHAPES)}; --columns prompt=... completion=... names those that are meant"
        )
    return shapes[0]


def require_shape(row: Mapping[str, Any], shape: str, origin: str, source: str) -> None:
    """Raise a `UserError` unless the row has the source's shape and no other."""
    missing = [column for column in SHAPES[shape] if row.get(column) is None]
    if missing:
        raise UserError(
            f"{origin}: no {' and no '.join(missing)} (or null), but by its first row {source} "
            f"holds rows of the shape '{shape}'; found columns [{listed(row)}]"
        )
    shapes = _shapes_in(row)
    if len(shapes) > 1:
        column = SHAPES[shape][-1]
        raise UserError(
            f"{origin}: the columns fit several shapes ({' | '.join(shapes)}); keep one, or choose "
            f"one by its column, as --columns {column}={column} does"
        )


def _shapes_in(row: Mapping[str, Any]) -> list[str]:
    return [
        shape
        for shape, columns in SHAPES.items()
        if all(row.get(column) is not None for column in columns)
    ]


def listed(columns: Iterable[str]) -> str:
    """Return names of columns for a message: sorted, printable, and not too many."""
    names = sorted(columns)
    more = [f"and {len(names) - 20} more"] if len(names) > 20 else []
    return ", ".join([shown(name) for name in names[:20]] + more)


# ---- columns of other names ----------------------------------------------------------------------


def parse_columns(words: Sequence[str]) -> dict[str, str]:
    """Return the column of a data set by the name that it gets, of ``name=column`` words.

    Raises:
        UserError: a word has another form or a name that is not known, or they choose no shape.
    """
    columns: dict[str, str] = {}
    for word in words:
        name, equals, column = word.partition("=")
        if not (equals and column):
            raise UserError(f"{shown(word)}: expected name=column, as prompt=question")
        if name not in _TARGETS:
            raise UserError(
                f"{shown(word)}: {shown(name)!r} is no name that a column can get."
                f"{did_you_mean(name, _TARGETS)} Known are {', '.join(sorted(_TARGETS))}"
            )
        if name in columns:
            raise UserError(f"{shown(word)}: {name} is given twice")
        columns[name] = column
    chosen = _chosen(columns)
    if len(chosen) > 1:
        raise UserError(f"the names are those of several shapes ({' | '.join(chosen)}); keep one")
    return columns


def _chosen(columns: Mapping[str, str]) -> list[str]:
    """Return the shapes that given names belong to."""
    return [shape for shape, required in SHAPES.items() if columns.keys() & set(required)]


class Renamed:
    """Rows (`addax_ds.reading.sources.Rows`) whose columns get other names.

    A shape that is chosen by one of its names is the only one: columns of the others are left out.

    Args:
        rows: the rows.
        columns: column by the name that it gets; of `parse_columns`.
    """

    def __init__(self, rows: Rows, columns: Mapping[str, str]) -> None:
        self.name = rows.name
        self._rows = rows
        self._columns = dict(columns)
        chosen = _chosen(columns)
        others = {name for shape in SHAPES if shape not in chosen for name in SHAPES[shape]}
        kept = {name for shape in chosen for name in (*SHAPES[shape], *OPTIONAL.get(shape, ()))}
        self._left_out = (others - kept if chosen else set()) | set(columns.values())
        self._required = {name for shape in chosen for name in SHAPES[shape]} & columns.keys()

    @property
    def identity(self) -> str:
        """Those of the rows, and of the columns."""
        return f"{self._rows.identity}\n{sorted(self._columns.items())}"

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._rows)

    def read(self, start: int, stop: int) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield (origin, columns) as the rows do.

        Raises:
            UserError: a row lacks a column that its shape needs.
        """
        for origin, row in self._rows.read(start, stop):
            for name in self._required:
                column = self._columns[name]
                if column not in row:
                    raise UserError(
                        f"{origin}: no column {shown(column)!r}, which --columns names as the "
                        f"{name}; found columns [{listed(row)}].{did_you_mean(column, row)}"
                    )
            kept = {name: value for name, value in row.items() if name not in self._left_out}
            yield origin, kept | {name: row.get(column) for name, column in self._columns.items()}
