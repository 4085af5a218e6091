"""Evaluation: token-averaged loss, and accuracy over candidate answers.

A candidate's score is its mean log-likelihood per answer token. Examples are scored one by one and
gathered by index, so the result does not depend on the number of ranks or the batch size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from addax_ds.data.batches import pad
from addax_ds.data.encoding import NO_LOSS, Example


@dataclass(frozen=True)
class Choice:
    """A row with candidate answers.

    Attributes:
        first: index of the row's first candidate among the examples; the others follow it.
        count: number of candidates.
        label: which of them, counted from 0, is right.
    """

    first: int
    count: int
    label: int


class EvaluationSet(Dataset[tuple[int, Example]]):
    """Examples to be scored; with ``choices``, each example is one candidate of a row.

    Args:
        examples: tokenised sequences; labels mark the tokens whose likelihood counts.
        choices: the rows, or nothing for plain text, which has a loss but no accuracy.
    """

    def __init__(self, examples: Sequence[Example], choices: Sequence[Choice] = ()) -> None:
        assert not choices or choices[-1].first + choices[-1].count == len(examples)
        self.examples = examples
        self.choices = choices
        # Batches of like lengths have little padding; the longest come first, so that too large a
        # batch fails at once.
        self._order = np.argsort([-example.length for example in examples], kind="stable")

    def __len__(self) -> int:
        """Return the number of examples to be scored."""
        return len(self.examples)

    def __getitem__(self, position: int) -> tuple[int, Example]:
        """Return the example at a position of the order of length, with its index."""
        index = int(self._order[position])
        return index, self.examples[index]

    def metrics(self, indices: np.ndarray, scores: np.ndarray) -> dict[str, float]:
        """Turn the scores of all examples into metrics.

        Args:
            indices: int64 ``(n,)``: which example each score belongs to.
            scores: fp64 ``(n, 2)``: log-likelihood of an example's target tokens, and their number.

        Returns:
            ``loss``, the mean negative log-likelihood per target token (of the right candidates),
            and ``accuracy`` if there are choices.
        """
        table = np.full((len(self.examples), 2), np.nan)
        table[indices] = scores
        assert not np.isnan(table[:, 1]).any(), "an example was not scored"
        if not self.choices:
            return {"loss": _loss(table)}
        means = table[:, 0] / table[:, 1]
        predicted = [int(np.argmax(means[c.first : c.first + c.count])) for c in self.choices]
        right = [guess == c.label for guess, c in zip(predicted, self.choices, strict=True)]
        answers = table[[c.first + c.label for c in self.choices]]
        return {"loss": _loss(answers), "accuracy": float(np.mean(right))}


class EvaluationCollator:
    """Pads examples of an `EvaluationSet` to one batch and keeps their indices."""

    def __init__(self, pad_token_id: int) -> None:
        self._pad_token_id = pad_token_id

    def __call__(self, rows: list[tuple[int, Example]]) -> dict[str, Any]:
        """Return the model's inputs, ``labels`` and ``index``, int64 of shape ``(rows,)``."""
        indices, examples = zip(*rows, strict=True)
        return {"index": torch.tensor(indices), **pad(examples, self._pad_token_id)}


def token_scores(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-likelihood of each row's target tokens, and their number.

    Args:
        logits: ``(rows, length, vocabulary)``, any floating type.
        labels: int64 ``(rows, length)``, not shifted; ``NO_LOSS`` where there is no target.

    Returns:
        fp64 ``(rows, 2)``. The softmax is taken in fp32, over the target positions alone.
    """
    targets = labels[:, 1:]
    mask = targets != NO_LOSS
    losses = F.cross_entropy(logits[:, :-1][mask].float(), targets[mask], reduction="none")
    row = mask.nonzero()[:, 0]
    sums = torch.zeros(len(labels), dtype=torch.float64, device=logits.device)
    sums.index_add_(0, row, -losses.double())
    return torch.stack((sums, mask.sum(dim=1).double()), dim=1)


def _loss(table: np.ndarray) -> float:
    return float(-table[:, 0].sum() / table[:, 1].sum())
