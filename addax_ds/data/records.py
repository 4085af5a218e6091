"""Rows of a data set as text with the spans that carry loss.

A `Record` is what every source of training text is reduced to, before any tokenizer is involved:
`Records` makes them of the rows of a source; a task builds its own with `prompt_completion`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from addax_ds.data.chat import Conversation, learnt_turns
from addax_ds.data.sources import Rows
from addax_ds.utils.errors import UserError
from addax_ds.utils.messages import shown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

SHAPES: dict[str, tuple[str, ...]] = {
    "prompt + completion": ("prompt", "completion"),
    "messages": ("messages",),
    "text": ("text",),
}
"""The row shapes of a JSON Lines file: name -> columns that a row of this shape has."""

_OPTIONAL = {"messages": ("tools", "chat_template_kwargs")}


@dataclass(frozen=True)
class Record:
    """One row of text and the parts of it that are learnt.

    Attributes:
        text: Everything that is tokenised.
        targets: Ascending character spans `(start, end)` of `text` whose tokens carry loss.
        origin: Where the row comes from, for messages: "train.jsonl:17".
        add_special_tokens: Whether the tokenizer adds its own BOS and the like. False for chat,
            whose template has written them.
        append_eos: Whether the sequence ends in an EOS token, which is learnt if the last target
            reaches the end of the text.
    """

    text: str
    targets: tuple[tuple[int, int], ...]
    origin: str
    add_special_tokens: bool = True
    append_eos: bool = True

    @property
    def is_chat(self) -> bool:
        """Whether a chat template has written the text."""
        return not self.add_special_tokens


def prompt_completion(prompt: str, completion: str, origin: str, append_eos: bool = True) -> Record:
    """Return the record `prompt + completion` (joined as they are) with loss on the completion.

    Raises:
        UserError: The completion is empty. An empty prompt is allowed.
    """
    if not completion:
        raise UserError(f"{origin}: the completion is empty, so there is nothing to learn from it")
    text = prompt + completion
    return Record(text, ((len(prompt), len(text)),), origin, append_eos=append_eos)


def plain_text(text: str, origin: str, append_eos: bool = True) -> Record:
    """Return the record `text` with loss on all of it.

    Raises:
        UserError: The text is empty.
    """
    if not text:
        raise UserError(f"{origin}: the text is empty, so there is nothing to learn from it")
    return Record(text, ((0, len(text)),), origin, append_eos=append_eos)


def chat(
    messages: object,
    tokenizer: PreTrainedTokenizerBase,
    origin: str,
    *,
    tools: object = None,
    template_kwargs: object = None,
    now: datetime | None = None,
) -> Record:
    """Return a conversation in the tokenizer's chat template, with loss on the assistant's turns.

    What is learnt of a turn is exactly what the model has to produce at inference, end-of-turn mark
    included. Special tokens are the template's business: none are added.

    Args:
        messages: A list of dicts with a "role" and a "content" string. An assistant's turn with
            "tool_calls" needs no content; one of "weight" 0 is not learnt. Further keys reach the
            template.
        tokenizer: Has a chat template.
        origin: Where the row comes from.
        tools: JSON schemas of functions for the template: a list of dicts, or it as JSON.
        template_kwargs: A dict of further variables of the template.
        now: Date and time that the template reads, local and without a zone; None for the clock.

    Raises:
        UserError: There is no template or no turn to learn, a turn is empty or comes first, the
            template refuses the conversation, writes nothing of a message, its tool calls or the
            tools, or writes earlier turns differently once later ones follow (some templates drop
            earlier reasoning), so that no prefix is a prefix.
    """
    conversation = Conversation.of(messages, tools, template_kwargs, origin)
    text, targets = learnt_turns(conversation, tokenizer, now)
    return Record(text, targets, origin, add_special_tokens=False, append_eos=False)


class Records:
    """The records of rows that all have the shape of the first, made when they are read.

    The first row decides which of `SHAPES` the rows have: `prompt` and `completion` (strings, loss
    on the completion), `messages` (see `chat`) or `text` (loss on all of it). Every row must have
    that shape and no other. Beside `messages` there may be `tools` and `chat_template_kwargs`. A
    null counts as a missing column; other columns are ignored, and collected.

    An instance can be pickled, and read in another process.

    Args:
        rows: the rows.
        tokenizer: Its chat template renders `messages`; not used for the other shapes.
        append_eos: As in `Record`, for `prompt` + `completion` and `text`. A chat template ends
            its turns itself.
        now: As in `chat`.

    Attributes:
        unused: columns that `read` has met and not used.

    Raises:
        UserError: There are no rows, or the first one has no known shape.
    """

    def __init__(
        self,
        rows: Rows,
        tokenizer: PreTrainedTokenizerBase,
        *,
        append_eos: bool = True,
        now: datetime | None = None,
    ) -> None:
        self.rows = rows
        self.unused: set[str] = set()
        self._tokenizer = tokenizer
        self._append_eos = append_eos
        self._now = now
        if not len(rows):
            raise UserError(f"{rows.name}: the file holds no rows; expected one JSON object a line")
        ((origin, row),) = rows.read(0, 1)
        self._shape = _shape_of(row, origin)

    def __len__(self) -> int:
        """Return the number of records, one a row."""
        return len(self.rows)

    @property
    def is_chat(self) -> bool:
        """Whether a chat template writes the texts."""
        return self._shape == "messages"

    def read(self, start: int, stop: int) -> list[Record]:
        """Return the records of the rows from ``start`` to before ``stop``.

        Raises:
            UserError: a row cannot be used; the message names its origin.
        """
        records = []
        known = {*SHAPES[self._shape], *_OPTIONAL.get(self._shape, ())}
        for origin, row in self.rows.read(start, stop):
            _require_shape(row, self._shape, origin, self.rows.name)
            self.unused.update(row.keys() - known)
            records.append(
                _record(row, self._shape, self._tokenizer, origin, self._append_eos, self._now)
            )
        return records


def log_unused(source: str, columns: Iterable[str]) -> None:
    """Say once which columns of a source are not used."""
    if columns:
        logger.info("%s: columns that are not used: %s", source, _listed(columns))


def read_records(
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    *,
    append_eos: bool = True,
    now: datetime | None = None,
) -> list[Record]:
    """Return all `Records`, in order, and say which columns are not used."""
    records = Records(rows, tokenizer, append_eos=append_eos, now=now)
    found = records.read(0, len(records))
    log_unused(rows.name, records.unused)
    return found


def _listed(columns: Iterable[str]) -> str:
    """Return names of columns for a message: sorted, printable, and not too many."""
    names = sorted(columns)
    more = [f"and {len(names) - 20} more"] if len(names) > 20 else []
    return ", ".join([shown(name) for name in names[:20]] + more)


def _shapes_in(row: Mapping[str, Any]) -> list[str]:
    return [
        shape
        for shape, columns in SHAPES.items()
        if all(row.get(column) is not None for column in columns)
    ]


def _shape_of(row: Mapping[str, Any], origin: str) -> str:
    """Return the shape of a file's first row."""
    shapes = _shapes_in(row)
    if not shapes:
        found = _listed(f"{key} (null)" if row[key] is None else key for key in row)
        raise UserError(
            f"{origin}: found columns [{found}], which fit none of the known shapes: "
            f"{' | '.join(SHAPES)}"
        )
    return shapes[0]


def _require_shape(row: Mapping[str, Any], shape: str, origin: str, source: str) -> None:
    """Raise unless the row has the file's shape and no other."""
    missing = [column for column in SHAPES[shape] if row.get(column) is None]
    if missing:
        raise UserError(
            f"{origin}: no {' and no '.join(missing)} (or null), but by its first row {source} "
            f"holds rows of the shape '{shape}'; found columns [{_listed(row)}]"
        )
    shapes = _shapes_in(row)
    if len(shapes) > 1:
        raise UserError(
            f"{origin}: the columns fit several shapes ({' | '.join(shapes)}); keep one"
        )


def _record(
    row: Mapping[str, Any],
    shape: str,
    tokenizer: PreTrainedTokenizerBase,
    origin: str,
    append_eos: bool,
    now: datetime | None,
) -> Record:
    if shape == "messages":
        more = {"tools": row.get("tools"), "template_kwargs": row.get("chat_template_kwargs")}
        record = chat(row[shape], tokenizer, origin, **more, now=now)
    elif shape == "text":
        record = plain_text(_string(row["text"], "text", origin), origin, append_eos)
    else:
        prompt = _string(row["prompt"], "prompt", origin)
        completion = _string(row["completion"], "completion", origin)
        record = prompt_completion(prompt, completion, origin, append_eos)
    # JSON can spell half a surrogate pair ("\ud800"), which is no text: tokenizers die on it.
    try:
        record.text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = ascii(record.text[error.start])
        raise UserError(f"{origin}: the text holds half a surrogate pair ({half})") from None
    return record


def _string(value: object, name: str, origin: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{origin}: {name} must be a string, got a {type(value).__name__}")
    return value
