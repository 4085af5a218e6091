"""Rows of a data set as text with the spans that carry loss.

A `Record` is what every source of training text is reduced to, before any tokenizer is involved:
JSON Lines files come through `read_jsonl`; a task builds its records with `prompt_completion`.
"""

from __future__ import annotations

import json
import logging
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from addax_ds.data.chat import Conversation, learnt_turns
from addax_ds.utils.errors import UserError
from addax_ds.utils.files import parse_json
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

_UTF8_BOM = b"\xef\xbb\xbf"
_LONGEST_LINE = 64 << 20  # bytes: one object without line ends, or no text at all, fills the memory
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


def read_jsonl(
    path: str | os.PathLike[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    append_eos: bool = True,
    now: datetime | None = None,
) -> list[Record]:
    """Read a JSON Lines file (UTF-8, one object of at most 64 MiB a line, blank lines skipped).

    The first row decides which of `SHAPES` the file has: `prompt` and `completion` (strings, loss
    on the completion), `messages` (see `chat`) or `text` (loss on all of it). Every row must have
    that shape and no other. Beside `messages` there may be `tools` and `chat_template_kwargs`. A
    null counts as a missing column; other columns are ignored, which is logged once.

    Args:
        path: The file.
        tokenizer: Its chat template renders `messages`; not used for the other shapes.
        append_eos: As in `Record`, for `prompt` + `completion` and `text`. A chat template ends
            its turns itself.
        now: As in `chat`.

    Returns:
        One record a row, in the file's order; `origin` is "path:line".

    Raises:
        UserError: The file or a row cannot be used; the message names the file and the line.
    """
    path = Path(path)
    records = records_of(json_rows(path), path, tokenizer, append_eos=append_eos, now=now)
    if not records:
        raise UserError(f"{path}: the file holds no rows; expected one JSON object a line")
    return records


def records_of(
    rows: Iterable[tuple[str, Mapping[str, Any]]],
    source: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    append_eos: bool = True,
    now: datetime | None = None,
) -> list[Record]:
    """Return the records of rows that all have the shape of the first; see `read_jsonl`.

    Args:
        rows: origin and columns of each.
        source: what to call all of them in messages.
        tokenizer: see `read_jsonl`.
        append_eos: see `read_jsonl`.
        now: as in `chat`.

    Raises:
        UserError: a row cannot be used; the message names its origin.
    """
    records: list[Record] = []
    shape: str | None = None
    unused: set[str] = set()
    for origin, row in rows:
        if shape is None:
            shape = _shape_of(row, origin)
        _require_shape(row, shape, origin, source)
        unused.update(row.keys() - {*SHAPES[shape], *_OPTIONAL.get(shape, ())})
        records.append(_record(row, shape, tokenizer, origin, append_eos, now))
    if unused:
        logger.info("%s: columns that are not used: %s", source, _listed(unused))
    return records


def json_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (origin, row) for every line of a JSON Lines file that is not blank.

    Raises:
        UserError: the file or a line cannot be read; the message names both.
    """
    number = 0
    try:
        with _open(path) as file:
            # Bytes, because text mode would report a decoding error without its line.
            for number, line in enumerate(iter(partial(file.readline, _LONGEST_LINE + 1), b""), 1):
                row = line.removeprefix(_UTF8_BOM) if number == 1 else line
                if row.strip():
                    origin = f"{path}:{number}"
                    yield origin, _parse(row, origin)
    except OSError as error:
        place = f"{path}:{number + 1}"
        raise UserError(f"{place}: the file cannot be read: {error.strerror}") from error


def _open(path: Path) -> BinaryIO:
    """Open a regular file; opening a pipe would wait for a writer."""
    try:
        mode = path.stat().st_mode
        if stat.S_ISREG(mode):
            return path.open("rb")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{shown(str(path))}: cannot be opened: {error.strerror}") from error
    except ValueError as error:  # a null byte or half a surrogate pair
        raise UserError(f"{shown(str(path))}: is no name of a file: {error}") from error
    kind = "a directory" if stat.S_ISDIR(mode) else "not a regular file"
    raise UserError(f"{path}: is {kind}; expected a JSON Lines file")


def _parse(line: bytes, origin: str) -> dict[str, Any]:
    """Return the JSON object of one line."""
    if len(line) > _LONGEST_LINE:
        raise UserError(
            f"{origin}: the line is longer than {_LONGEST_LINE >> 20} MiB; expected one object a "
            "line"
        )

    try:
        row = parse_json(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{origin}: not UTF-8 (byte {error.start + 1} of the line)") from None
    except json.JSONDecodeError as error:
        raise UserError(
            f"{origin}: not valid JSON (column {error.colno}: {error.msg}); expected one object a "
            "line"
        ) from None
    except ValueError as error:
        raise UserError(f"{origin}: not valid JSON ({error}); expected one object a line") from None
    if not isinstance(row, dict):
        raise UserError(f"{origin}: expected a JSON object, got a {type(row).__name__}")
    return row


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


def _require_shape(row: Mapping[str, Any], shape: str, origin: str, source: str | Path) -> None:
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
