"""Addax with the sign of g0 drawn by a coin: a control that keeps its noise alone.

    deepspeed --num_gpus 1 studies/comparison/coin.py --deepspeed ds_configs/zero3.json ...

The flags are those of ``launch/train.py --method addax``. The update along z has the length that
Addax's would have. Since z and -z are equally likely, what a step knows of the loss of its
zeroth-order rows is the sign, and that is lost.
"""

import random
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2]))

from addax_ds.cli import train
from addax_ds.optim.estimator import Estimate, TwoSidedDifference
from addax_ds.training.trainer import AddaxTrainer


class CoinToss(TwoSidedDifference):
    """A two-sided difference of which only the size is heeded.

    Args:
        seed: of the coin, the same on all ranks.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._coin = random.Random(seed)

    def estimate(self, losses: Sequence[float], zo_eps: float) -> Estimate:  # noqa: D102
        found = super().estimate(losses, zo_eps)
        (coefficient,) = found.coefficients
        return replace(found, coefficients=(self._coin.choice((-1, 1)) * abs(coefficient),))


class CoinTrainer(AddaxTrainer):
    """Trainer that tosses a coin at each step; a resumed run has not its coin."""

    def start_afresh(self, model: nn.Module) -> None:
        """Put the coin in place of the estimator."""
        super().start_afresh(model)
        self.addax.estimator = CoinToss(self.args.seed)


def main(argv: Sequence[str] | None = None) -> None:
    """Train."""
    train.main(argv, CoinTrainer)


if __name__ == "__main__":
    main()
