"""Evaluation: token-averaged loss, and accuracy over candidate answers.

A candidate's score is its mean log-likelihood per answer token; `generation` has answers
that are written. Every example is scored once, by one rank, in a batch that does not depend on the
number of ranks.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from addax_ds.data.examples import Example, data_digest, lengths_of
from addax_ds.data.loading import RankLoader
from addax_ds.data.train_rows import dummy_example, pad
from addax_ds.distributed.collectives import all_gather_object
from addax_ds.evaluation.likelihood import target_scores, target_tensors

Scores = NDArray[np.float64]
"""Shape ``(examples, width)``: what `ScoredSet.score` returned, in the order of the examples."""

_NOBODY = -1  # index of a row that only keeps a rank busy


class ScoredSet(Dataset[tuple[Any, ...]], ABC):
    """Examples that a model is scored on, and what their scores say.

    Attributes:
        examples: tokenised sequences; labels mark the tokens whose likelihood is the loss.
        width: numbers that `score` returns for an example.
    """

    width: int

    def __init__(self, examples: Sequence[Example]) -> None:
        self.examples = examples

    @cached_property
    def digest(self) -> str:
        """16 hex digits for the examples and what is right of them."""
        text = f"{data_digest(self.examples)} {self._right_answers()!r}"
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def _right_answers(self) -> Any:
        """Return what says which answers are right, beside the examples."""
        return None

    def __len__(self) -> int:
        """Return the number of examples to be scored."""
        return len(self.examples)

    @abstractmethod
    def collator(self, pad_token_id: int) -> "EvaluationCollator":
        """Return what makes a batch of items."""

    @abstractmethod
    def score(self, model: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """Score a batch; on several ranks all call it equally often.

        Returns:
            fp64 ``(rows, width)``.
        """

    @abstractmethod
    def metrics(self, scores: Scores) -> dict[str, float]:
        """Turn the scores of all examples into metrics, ``loss`` among them."""

    @abstractmethod
    def predictions(self, scores: Scores) -> Iterator[dict[str, Any]]:
        """Yield what a report on single rows says, to be written as JSON."""

    def batches(self, size: int) -> list[NDArray[np.int64]]:
        """Divide the indices of the examples into batches of like lengths, the longest first.

        So there is little padding, and too large a batch fails at once.
        """
        order = np.argsort(-lengths_of(self.examples), kind="stable")
        return [order[start : start + size] for start in range(0, len(order), size)]


@dataclass(frozen=True)
class Choice:
    """A row with candidate answers.

    Attributes:
        first: index of the row's first candidate among the examples; the others follow it.
        count: number of candidates.
        label: which of them, counted from 0, is right.
        also_right: which others are.
        candidates: their texts, for reports.
    """

    first: int
    count: int
    label: int
    also_right: tuple[int, ...] = ()
    candidates: tuple[str, ...] = ()


class EvaluationSet(ScoredSet):
    """Texts, or candidate answers, whose likelihood is measured.

    Args:
        examples: with ``choices``, each is one candidate of a row.
        choices: the rows, or nothing for plain text, which has a loss but no accuracy.
    """

    width = 2

    def __init__(self, examples: Sequence[Example], choices: Sequence[Choice] = ()) -> None:
        super().__init__(examples)
        assert not choices or choices[-1].first + choices[-1].count == len(examples)
        self.choices = choices

    def __getitem__(self, index: int) -> tuple[int, Example]:
        """Return an example with its index."""
        return index, self.examples[index]

    def _right_answers(self) -> Any:
        return [(each.first, each.count, each.label, each.also_right) for each in self.choices]

    def collator(self, pad_token_id: int) -> "EvaluationCollator":
        """Return what makes a batch of items."""
        return SharedRowCollator(pad_token_id)

    def score(self, model: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the log-likelihood of each example's target tokens, and their number."""
        return target_scores(model, batch)

    def metrics(self, scores: Scores) -> dict[str, float]:
        """Return the metrics.

        Returns:
            ``loss``, the mean negative log-likelihood per target token (of the right candidates),
            and ``accuracy`` if there are choices.
        """
        if not self.choices:
            return {"loss": mean_loss(scores)}
        right = [row["right"] for row in self.predictions(scores)]
        answers = scores[[choice.first + choice.label for choice in self.choices]]
        return {"loss": mean_loss(answers), "accuracy": float(np.mean(right))}

    def predictions(self, scores: Scores) -> Iterator[dict[str, Any]]:
        """Yield each row's candidate scores, the choice, and whether it is right.

        ``tokens`` are those of the prompt and the right answer, which alone has ``answer_tokens``.
        """
        means = scores[:, 0] / scores[:, 1]
        for choice in self.choices:
            own = means[choice.first : choice.first + choice.count]
            predicted = int(np.argmax(own))
            yield {
                "origin": self.examples[choice.first].origin,
                "tokens": self.examples[choice.first + choice.label].length,
                "answer_tokens": int(scores[choice.first + choice.label, 1]),
                "candidates": list(choice.candidates),
                "scores": own.tolist(),
                "predicted": predicted,
                "label": choice.label,
                "also_right": list(choice.also_right),
                "right": predicted in (choice.label, *choice.also_right),
            }


class EvaluationCollator:
    """Pads items of an `EvaluationSet` to one batch and keeps their indices."""

    def __init__(self, pad_token_id: int) -> None:
        self._pad_token_id = pad_token_id

    def __call__(self, items: list[Any]) -> dict[str, Any]:
        """Return the model's inputs, ``labels`` and ``index``, int64 of shape ``(rows,)``.

        Without items, the batch is a row of one token that belongs to no example.
        """
        indices, *parts = zip(*(items or [self._filler()]), strict=True)
        return {"index": torch.tensor(indices), **self._collate(*parts)}

    def _collate(self, examples: Sequence[Example]) -> dict[str, Any]:
        return pad(examples, self._pad_token_id)

    def _filler(self) -> tuple[Any, ...]:
        return _NOBODY, dummy_example(self._pad_token_id)


class SharedRowCollator(EvaluationCollator):
    """Merges candidates that differ only in their last token into one input row.

    A last token is never an input: what the model would say after it, nobody asks. So where all
    candidates of a prompt are one token long, a single row scores them.
    """

    def _collate(self, examples: Sequence[Example]) -> dict[str, Any]:
        """Return ``input_ids`` and the `target_tensors` of the examples."""
        rows: dict[bytes, int] = {}
        inputs: list[Example] = []
        own = []
        for example in examples:
            end = max(example.length - 1, 1)  # the filler has one token
            ids = example.input_ids[:end]
            row = rows.setdefault(ids.tobytes(), len(rows))
            if row == len(inputs):
                inputs.append(Example(ids, example.labels[:end], example.origin))
            own.append(row)
        return {
            "input_ids": pad(inputs, self._pad_token_id)["input_ids"],
            **target_tensors(pad(examples, self._pad_token_id)["labels"], torch.tensor(own)),
        }


class RankBatches(Sampler[list[int]]):
    """The batches of a rank: in each round every rank has the next one, or none, to keep step."""

    def __init__(self, batches: Sequence[NDArray[np.int64]], rank: int, world_size: int) -> None:
        rounds = -(-len(batches) // world_size)
        own = list(batches[rank::world_size])
        self._batches = own + [np.zeros(0, np.int64)] * (rounds - len(own))

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the batches."""
        return (batch.tolist() for batch in self._batches)

    def __len__(self) -> int:
        """Return the number of rounds."""
        return len(self._batches)


def evaluation_dataloader(
    dataset: ScoredSet, size: int, rank: int, world_size: int, pad_token_id: int, **options: Any
) -> DataLoader:
    """Return a loader of this rank's share; ``options`` are those of `DataLoader`.

    It must not go through ``accelerator.prepare``, which would share it out once more.
    """
    return RankLoader(
        dataset,
        batch_sampler=RankBatches(dataset.batches(size), rank, world_size),
        collate_fn=dataset.collator(pad_token_id),
        **options,
    )


class ScoreTable:
    """Collects what single batches, and then other ranks, have to say."""

    def __init__(self, dataset: ScoredSet) -> None:
        self._scores = np.zeros((len(dataset), dataset.width))
        self._times = np.zeros(len(dataset), np.int64)

    def add(self, indices: Tensor, scores: Tensor) -> None:
        """Enter the scores of a batch of this rank."""
        of_examples = indices != _NOBODY
        own = indices[of_examples].cpu().numpy()
        self._scores[own] = scores[of_examples].cpu().numpy()
        self._times[own] += 1

    def complete(self) -> Scores:
        """Return the scores of all examples, from all ranks; all of them call it."""
        own = np.flatnonzero(self._times)
        times = np.zeros_like(self._times)
        for indices, scores, number in all_gather_object(
            (own, self._scores[own], self._times[own])
        ):
            self._scores[indices] = scores
            times[indices] += number
        assert (times == 1).all(), "every example is scored once"
        return self._scores


def mean_loss(scores: Scores) -> float:
    """Return the mean negative log-likelihood per token from the columns of `target_scores`."""
    return float(-scores[:, 0].sum() / scores[:, 1].sum())
