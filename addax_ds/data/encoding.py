"""Tokens of a record, and which of them carry loss."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, groupby, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from addax_ds.data.examples import NO_LOSS, Example
from addax_ds.reading.records import Record
from addax_ds.utils.errors import UserError

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# Of a tokenizer call: enough for its threads, and little enough for memory, of which it takes some
# 100 bytes a token.
_CHUNK_RECORDS = 1000
_CHUNK_CHARACTERS = 4 << 20


class TooLongError(UserError):
    """A row does not fit, and nothing of it may be cut off."""


@dataclass(frozen=True)
class Cuts:
    """What `encode` has made of rows that are too long; sums are those of all rows.

    Attributes:
        rows_cut: rows that have lost tokens.
        most_tokens_cut: tokens that one of them has lost, at most.
        rows_split: rows that have become several sequences.
    """

    rows_cut: int = 0
    most_tokens_cut: int = 0
    rows_split: int = 0

    def __add__(self, other: Cuts) -> Cuts:
        return Cuts(
            self.rows_cut + other.rows_cut,
            max(self.most_tokens_cut, other.most_tokens_cut),
            self.rows_split + other.rows_split,
        )

    def log(self, source: str, max_length: int | None) -> None:
        """Say what has happened to the rows of a source, if anything has."""
        if self.rows_cut:
            logger.info(
                "%s: %d rows are longer than %s tokens and have lost up to %d of them on the left",
                source,
                self.rows_cut,
                max_length,
                self.most_tokens_cut,
            )
        if self.rows_split:
            logger.info(
                "%s: %d rows of text are longer than %s tokens and are split into sequences",
                source,
                self.rows_split,
                max_length,
            )


@dataclass(frozen=True)
class _Tokens:
    """Tokens of one text, with their offsets.

    Attributes:
        ids: int32, shape [n].
        offsets: int32, shape [n, 2]: characters covered by a token.
        added: bool, shape [n]: special tokens that the tokenizer put there itself.
    """

    ids: NDArray[np.int32]
    offsets: NDArray[np.int32]
    added: NDArray[np.bool_]


def encode(
    records: Sequence[Record],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None,
    model_positions: int | None,
    vocabulary_size: int | None = None,
) -> tuple[list[Example], Cuts]:
    """Tokenise records and label the tokens that overlap a target span.

    Each text is tokenised once, as a whole, so that its tokens are those the model meets at
    inference; a token that straddles the border of a span is a target. The appended EOS is a target
    if the last span reaches the end of the text.

    Args:
        records: What to encode.
        tokenizer: A fast one: only these report which characters a token covers.
        max_length: Longer sequences lose tokens on the left, never BOS and never a target. A text
            that may be split becomes several examples instead (`_split`).
        model_positions: The longest sequence that the model can take; None if it has no limit.
        vocabulary_size: Tokens that the model has embeddings for; None if it is not known.

    Returns:
        The examples, in order of the records, and what was cut and split.

    Raises:
        UserError: The tokenizer is slow, or lacks the EOS that a record wants; `max_length` exceeds
            `model_positions`; or a record has no token to learn, is too long, or is nothing that
            tokenizer and model can take.
    """
    _check_limits(max_length, model_positions)
    if not tokenizer.is_fast:
        raise UserError(
            f"{type(tokenizer).__name__} does not say which characters a token covers; use the "
            "model's fast tokenizer (a folder with tokenizer.json)"
        )
    examples: list[Example] = []
    cuts = Cuts()
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id  # each look at them takes 2 µs
    for record, tokens in zip(records, _tokenise(records, tokenizer), strict=True):
        example = _label(record, tokens, eos)
        _check_ids(example, tokenizer, vocabulary_size)
        head = _head(tokens, bos)
        if record.may_split and max_length is not None and example.length > max_length:
            examples += _split(example, head, max_length)
            cuts += Cuts(rows_split=1)
            continue
        fitted = _fit(example, head, max_length, model_positions)
        examples.append(fitted)
        if fitted is not example:
            cuts += Cuts(rows_cut=1, most_tokens_cut=example.length - fitted.length)
    return examples, cuts


def learnt_ends(examples: Iterable[Example]) -> set[int]:
    """Return the tokens that the learnt parts of the examples end in."""
    ends: set[int] = set()
    for example in examples:
        learnt = example.labels != NO_LOSS
        ends.update(example.input_ids[learnt & ~np.append(learnt[1:], False)].tolist())
    return ends


def _check_limits(max_length: int | None, model_positions: int | None) -> None:
    if max_length is None:
        return
    if max_length < 2:
        raise UserError(f"--max_length {max_length} leaves nothing to predict; give at least 2")
    if model_positions is not None and max_length > model_positions:
        raise UserError(
            f"--max_length {max_length} is more than the model's {model_positions} positions; "
            f"give at most {model_positions}"
        )


def _check_ids(
    example: Example, tokenizer: PreTrainedTokenizerBase, vocabulary_size: int | None
) -> None:
    """Raise if the model has no embedding for a token, which would end the run at its step."""
    largest = int(example.input_ids.max())
    if vocabulary_size is not None and largest >= vocabulary_size:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise UserError(
            f"{example.origin}: the tokenizer makes token {largest} ({token!r}), and the model has "
            f"embeddings for {vocabulary_size}: the tokenizer is another model's, or got tokens "
            "that the model did not (resize_token_embeddings)"
        )


def padding_token(tokenizer: PreTrainedTokenizerBase | None, vocabulary_size: int | None) -> int:
    """Return a token to pad with: the tokenizer's own, or any: no token attends to it.

    A tokenizer's own has to have an embedding: Trainer writes it into the model's configuration,
    and ``from_pretrained`` would not load what is saved then.

    Args:
        tokenizer: of the model, if there is one.
        vocabulary_size: see `encode`.

    Raises:
        UserError: the model has no embedding for the tokenizer's.
    """
    if tokenizer is None:
        return 0
    pad, eos, embeddings = tokenizer.pad_token_id, tokenizer.eos_token_id, vocabulary_size
    if pad is None:
        return 0 if eos is None or eos >= (embeddings or math.inf) else eos
    if embeddings is not None and pad >= embeddings:
        raise UserError(
            f"the tokenizer pads with token {pad} ({tokenizer.pad_token!r}), and the model has "
            f"embeddings for {embeddings}: name another as pad_token in tokenizer_config.json, as "
            "the eos_token, or give the model one more (resize_token_embeddings)"
        )
    return pad


def _tokenise(records: Sequence[Record], tokenizer: PreTrainedTokenizerBase) -> Iterator[_Tokens]:
    """Yield the tokens of every record, in order."""
    for add_special_tokens, group in groupby(records, key=lambda record: record.add_special_tokens):
        for rows in chunks(group):
            batch = _call(tokenizer, rows, add_special_tokens)
            for tokens in _unpacked(batch.encodings or []):
                yield _without_doubles(tokens, tokenizer)


def chunks(records: Iterable[Record]) -> Iterator[list[Record]]:
    """Yield records, in order, as many at a time as are tokenised at once."""
    chunk: list[Record] = []
    characters = 0
    for record in records:
        characters += len(record.text)
        if chunk and (len(chunk) == _CHUNK_RECORDS or characters > _CHUNK_CHARACTERS):
            yield chunk
            chunk, characters = [], len(record.text)
        chunk.append(record)
    if chunk:
        yield chunk


def _unpacked(texts: Sequence[Any]) -> Iterator[_Tokens]:
    """Yield the tokens of what a tokenizer has made of some texts, `tokenizers.Encoding`.

    These are made Python's one at a time, and arrays together: a list of all offsets would take
    more memory and time than the tokens.
    """
    chained = chain.from_iterable
    ends = np.cumsum([len(text) for text in texts]).tolist()
    total = ends[-1] if ends else 0
    ids = np.fromiter(chained(text.ids for text in texts), np.int32, total)
    pairs = chained(text.offsets for text in texts)
    offsets = np.fromiter(chained(pairs), np.int32, 2 * total).reshape(-1, 2)
    masks = (bytes(text.special_tokens_mask) for text in texts)
    added = np.frombuffer(b"".join(masks), np.bool_)
    for start, end in pairwise([0, *ends]):
        yield _Tokens(ids[start:end], offsets[start:end], added[start:end])


def _without_doubles(tokens: _Tokens, tokenizer: PreTrainedTokenizerBase) -> _Tokens:
    """Drop a BOS or an EOS that stands both in the text and, from the tokenizer, beside it.

    Of two BOS that of the tokenizer stays, as part of the head; of two EOS that of the text, which
    may be learnt.
    """
    ids, added = tokens.ids, tokens.added
    if added.all() or not added.any():
        return tokens
    first, behind = int(added.argmin()), len(ids) - int(added[::-1].argmin())
    dropped = []
    if first > 0 and ids[first] == ids[first - 1] == tokenizer.bos_token_id:
        dropped.append(first)
    if behind < len(ids) and ids[behind - 1] == ids[behind] == tokenizer.eos_token_id:
        dropped.append(behind)
    if not dropped:
        return tokens
    keep = np.ones(len(ids), np.bool_)
    keep[dropped] = False
    return _Tokens(ids[keep], tokens.offsets[keep], added[keep])


def _call(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Record], add_special_tokens: bool
) -> BatchEncoding:
    """Tokenise some rows at once; if that fails, one by one to tell which it is."""
    try:
        return tokenizer(
            [record.text for record in rows],
            add_special_tokens=add_special_tokens,
            padding=False,
            truncation=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # `_fit` judges the length
        )
    except Exception as error:  # what the tokenizers library raises has no narrower type
        if len(rows) == 1:
            raise UserError(f"{rows[0].origin}: the tokenizer fails: {error}") from error
        for record in rows:
            _call(tokenizer, [record], add_special_tokens)
        raise


def _label(record: Record, tokens: _Tokens, eos: int | None) -> Example:
    """Return the whole record as an example, EOS included."""
    learnt = _overlaps(tokens, record.targets)
    empty = not learnt.any()
    ids = tokens.ids
    if record.append_eos:
        if eos is None:
            raise UserError(
                f"{record.origin}: the sequence is to end in EOS, but the tokenizer has no EOS "
                "token; name one as eos_token in tokenizer_config.json"
            )
        if not len(ids) or ids[-1] != eos:
            ids = np.concatenate((ids, np.array([eos], np.int32)))
            learnt = np.concatenate((learnt, np.zeros(1, np.bool_)))
        learnt[-1] |= record.targets[-1][1] == len(record.text)
    example = Example(ids, np.where(learnt, ids, np.int32(NO_LOSS)), record.origin)
    if empty or not example.target_count:
        raise UserError(
            f"{record.origin}: no token carries loss: the tokenizer makes nothing of the part to "
            "learn, or it is the sequence's first token, which nothing predicts"
        )
    return example


def _overlaps(tokens: _Tokens, spans: Sequence[tuple[int, int]]) -> NDArray[np.bool_]:
    """Return which tokens overlap a span; added special tokens, at (0, 0), never do."""
    start, end = tokens.offsets[:, 0], tokens.offsets[:, 1]
    # Byte-level BPE with trimmed offsets reports a run of spaces as empty, at the run's end; give
    # it the characters since the previous token, or indentation would never be learnt.
    empty = start == end
    if end[empty].any():  # others than the special ones
        previous_end = np.concatenate([np.zeros(1, np.int32), np.maximum.accumulate(end)])[:-1]
        start = np.where(empty, np.minimum(start, previous_end), start)
    learnt = np.zeros(len(tokens.ids), np.bool_)
    for span_start, span_end in spans:
        learnt |= (end > span_start) & (start < span_end)
    return learnt & (end > start)


def _head(tokens: _Tokens, bos: int | None) -> int:
    """Return how many tokens in front truncation must keep: BOS and what else was added there."""
    added = len(tokens.added) if tokens.added.all() else int(np.argmin(tokens.added))
    written_by_template = bool(len(tokens.ids)) and tokens.ids[0] == bos
    return max(added, int(written_by_template))


def _fit(
    example: Example, head: int, max_length: int | None, model_positions: int | None
) -> Example:
    """Cut the example to `max_length` between its first `head` tokens and its first target."""
    length, limit = example.length, max_length if max_length is not None else model_positions
    if limit is None or length <= limit:
        return example
    if max_length is None:
        raise TooLongError(
            f"{example.origin}: {length} tokens, more than the model's {limit} positions; "
            f"shorten the row, or pass --max_length {limit}: then a text is split, and other rows "
            "lose tokens without loss on the left"
        )
    first_target = int(np.argmax(example.labels != NO_LOSS))
    # Without a head, one token must stay in front of the first target to predict it from.
    last_cut = first_target if head else max(first_target - 1, 0)
    cut = length - (limit - head)
    if cut > last_cut:
        raise TooLongError(
            f"{example.origin}: the part from the first token with loss to the end needs "
            f"{head + length - last_cut} tokens, more than --max_length {limit}; shorten it, or "
            "raise --max_length"
        )
    keep = np.r_[0:head, cut:length]
    return Example(example.input_ids[keep], example.labels[keep], example.origin)


def _split(example: Example, head: int, max_length: int) -> list[Example]:
    """Divide a text into sequences of `max_length` tokens; the last one has what is left.

    Each begins with the text's first `head` tokens. Without a head it begins with the last token of
    the one before. So every token but the text's first is predicted once.
    """
    ids, labels = example.input_ids, example.labels
    step = max_length - max(head, 1)
    if step < 1:
        raise TooLongError(
            f"{example.origin}: the tokenizer's first {head} tokens leave no room for the text "
            f"with --max_length {max_length}; raise it"
        )
    # Without a head the text's first token is one: nothing predicts it.
    starts = list(range(max(head, 1), len(ids), step))
    if head and step > 1 and len(ids) - starts[-1] == 1:
        starts[-1] -= 1  # EOS alone would be learnt as the end of nothing
    pieces = []
    for start, stop in zip(starts, [*starts[1:], len(ids)], strict=True):
        kept = np.r_[0:head, start:stop] if head else np.r_[start - 1 : stop]
        pieces.append(Example(ids[kept], labels[kept], example.origin))
    return [piece for piece in pieces if piece.target_count]


def encode_prompts(
    prompts: Sequence[Record],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    vocabulary_size: int | None = None,
) -> list[Example]:
    """Tokenise texts that a model is to go on from: no token carries loss, none is added behind.

    Args:
        prompts: What to encode; targets are not looked at.
        tokenizer: A fast one.
        max_length: Longer sequences lose tokens on the left, never BOS.
        vocabulary_size: See `encode`.

    Returns:
        One example a record, in order.

    Raises:
        UserError: A prompt has no tokens, or one that the model does not know.
    """
    examples = []
    for record, tokens in zip(prompts, _tokenise(prompts, tokenizer), strict=True):
        head = _head(tokens, tokenizer.bos_token_id)
        behind = 0 if tokens.added.all() else int(np.argmin(tokens.added[::-1]))
        text = tokens.ids[head : len(tokens.ids) - behind]
        ids = np.concatenate((tokens.ids[:head], text[-(max_length - head) :]))
        if not len(ids):
            raise UserError(f"{record.origin}: the tokenizer makes nothing of the prompt")
        example = Example(ids, np.full(len(ids), NO_LOSS, np.int32), record.origin)
        _check_ids(example, tokenizer, vocabulary_size)
        examples.append(example)
    return examples
