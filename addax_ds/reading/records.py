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

from addax_ds.reading.chat import Conversation, learnt_turns
from addax_ds.reading.conventions import alpaca_messages, alpaca_prompt, sharegpt_messages
from addax_ds.reading.shapes import OPTIONAL, SHAPES, listed, require_shape, shape_of
from addax_ds.reading.sources import Rows
from addax_ds.utils.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


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
        may_split: Whether a text that is too long becomes several sequences, and loses nothing.
    """

    text: str
    targets: tuple[tuple[int, int], ...]
    origin: str
    add_special_tokens: bool = True
    append_eos: bool = True
    may_split: bool = False


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
    """Return the record `text` with loss on all of it, which may be split.

    Raises:
        UserError: The text is empty.
    """
    if not text:
        raise UserError(f"{origin}: the text is empty, so there is nothing to learn from it")
    return Record(text, ((0, len(text)),), origin, append_eos=append_eos, may_split=True)


def chat(
    messages: object,
    tokenizer: PreTrainedTokenizerBase,
    origin: str,
    *,
    column: str = "messages",
    before: Mapping[str, object] | None = None,
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
        column: What the messages are called.
        before: Messages that come before, of which none is learnt, by the name of their column.
        tools: JSON schemas of functions for the template: a list of dicts, or it as JSON.
        template_kwargs: A dict of further variables of the template.
        now: Date and time that the template reads, local and without a zone; None for the clock.

    Raises:
        UserError: There is no template or no turn to learn, a turn is empty or comes first, the
            template refuses the conversation, writes nothing of a message, its tool calls or the
            tools, or writes earlier turns differently once later ones follow (some templates drop
            earlier reasoning), so that no prefix is a prefix.
    """
    parts = {**(before or {}), column: messages}
    conversation = Conversation.of(parts, tools, template_kwargs, origin)
    text, targets = learnt_turns(conversation, tokenizer, now)
    return Record(text, targets, origin, add_special_tokens=False, append_eos=False)


class Records:
    """The records of rows that all have the shape of the first, made when they are read.

    Every row must have that shape (`addax_ds.reading.shapes`) and no other. A null counts as a
    missing column; other columns are ignored, and collected.

    - `prompt` and `completion`: strings, loss on the completion; or both lists of messages, loss on
      the assistant's turns in the completion.
    - `messages`: see `chat`.
    - `text`: loss on all of it.
    - `instruction`, `output` and maybe `input` (Alpaca): messages of a user and the assistant if
      the tokenizer has a chat template, else Stanford Alpaca's prompt and a completion.
    - `conversations` (ShareGPT): as `messages`.

    Beside messages there may be `tools` and `chat_template_kwargs`.

    An instance can be pickled, and read in another process.

    Args:
        rows: the rows.
        tokenizer: Its chat template renders messages; not used for the other shapes.
        append_eos: As in `Record`, for rows without messages. A chat template ends its turns
            itself.
        now: As in `chat`.

    Attributes:
        is_chat: whether a chat template writes the texts.
        notes: sentences on how the rows are read, for the log.
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
        self.notes: list[str] = []
        self.unused: set[str] = set()
        self._tokenizer = tokenizer
        self._append_eos = append_eos
        self._now = now
        if not len(rows):
            raise UserError(f"{rows.name}: there are no rows")
        ((origin, row),) = rows.read(0, 1)
        self._shape = shape_of(row, origin)
        is_alpaca = self._shape == "instruction + output"
        if self._shape == "prompt + completion":
            self.is_chat = isinstance(row["prompt"], list)
        elif is_alpaca:
            self.is_chat = bool(tokenizer.chat_template)
        else:
            self.is_chat = self._shape != "text"
        self._known = {*SHAPES[self._shape]}
        if self.is_chat or is_alpaca:
            self._known.update(OPTIONAL[self._shape])
        if is_alpaca:
            how = (
                "the user's message, in the tokenizer's chat template"
                if self.is_chat
                else "written into Stanford Alpaca's prompt, as the tokenizer has no chat template"
            )
            self.notes.append(f"{rows.name}: instruction and input are {how}")

    def __len__(self) -> int:
        """Return the number of records, one a row."""
        return len(self.rows)

    def read(self, start: int, stop: int) -> list[Record]:
        """Return the records of the rows from ``start`` to before ``stop``.

        Raises:
            UserError: a row cannot be used; the message names its origin.
        """
        records = []
        for origin, row in self.rows.read(start, stop):
            require_shape(row, self._shape, origin, self.rows.name)
            self.unused.update(row.keys() - self._known)
            record = self._chat(row, origin) if self.is_chat else self._text(row, origin)
            _require_text(record)
            records.append(record)
        return records

    def _chat(self, row: Mapping[str, Any], origin: str) -> Record:
        column, before = SHAPES[self._shape][-1], None
        messages = row[column]
        if column == "completion":
            before = {"prompt": row["prompt"]}
        elif column == "conversations":
            messages = sharegpt_messages(messages, origin)
        elif column == "output":
            messages = alpaca_messages(*_alpaca(row, origin))
        return chat(
            messages,
            self._tokenizer,
            origin,
            column=column,
            before=before,
            tools=row.get("tools"),
            template_kwargs=row.get("chat_template_kwargs"),
            now=self._now,
        )

    def _text(self, row: Mapping[str, Any], origin: str) -> Record:
        if self._shape == "text":
            return plain_text(_string(row, "text", origin), origin, self._append_eos)
        if self._shape == "prompt + completion":
            prompt, completion = (_string(row, column, origin) for column in SHAPES[self._shape])
        else:
            instruction, further, completion = _alpaca(row, origin)
            prompt = alpaca_prompt(instruction, further)
        return prompt_completion(prompt, completion, origin, self._append_eos)


def log_unused(source: str, columns: Iterable[str]) -> None:
    """Say once which columns of a source are not used."""
    if columns:
        logger.info("%s: columns that are not used: %s", source, listed(columns))


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
    for note in records.notes:
        logger.info("%s", note)
    log_unused(rows.name, records.unused)
    return found


def _alpaca(row: Mapping[str, Any], origin: str) -> tuple[str, str, str]:
    """Return instruction, input and output; without input an empty one."""
    instruction, output = (_string(row, column, origin) for column in ("instruction", "output"))
    if not output:
        raise UserError(f"{origin}: the output is empty, so there is nothing to learn from it")
    return instruction, "" if row.get("input") is None else _string(row, "input", origin), output


def _string(row: Mapping[str, Any], column: str, origin: str) -> str:
    value = row[column]
    if not isinstance(value, str):
        raise UserError(f"{origin}: {column} must be a string, got a {type(value).__name__}")
    return value


def _require_text(record: Record) -> None:
    """Raise for half a surrogate pair, which JSON can spell: tokenizers die on it."""
    try:
        record.text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = ascii(record.text[error.start])
        raise UserError(f"{record.origin}: the text holds half a surrogate pair ({half})") from None
