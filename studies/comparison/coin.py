"""Addax with the sign of g0 drawn by a coin: a control that keeps its noise alone.

    deepspeed --num_gpus 1 studies/comparison/coin.py --deepspeed ds_configs/zero3.json ...

The flags are those of ``launch/train.py --method addax``. The update along z has the length that
Addax's would have. Which way it points is by chance: z and -z are equally likely, so what a step
knows of where its zeroth-order rows' loss falls is the sign.
"""

import random
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2]))

from typing_extensions import override

from addax_ds.cli import train
from addax_ds.optim.estimator import Estimate, TwoSidedDifference
from addax_ds.training.trainer import AddaxTrainer
from addax_ds.utils.errors import UserError


class CoinToss(TwoSidedDifference):
    """Two-sided differences of which only the size is heeded.

    Args:
        directions: their number.
        seed: of the coin, the same on all ranks.
    """

    def __init__(self, directions: int, seed: int) -> None:
        super().__init__(directions)
        self._coin = random.Random(seed)

    @override
    def estimate(self, losses: Sequence[float], zo_eps: float) -> Estimate:
        found = super().estimate(losses, zo_eps)
        tossed = tuple(self._coin.choice((-1, 1)) * abs(c) for c in found.coefficients)
        return replace(found, coefficients=tossed)


class CoinTrainer(AddaxTrainer):
    """Trainer that tosses a coin at each step."""

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Train from the start.

        Raises:
            UserError: for ``resume_from_checkpoint``; a checkpoint has no state of a coin.
        """
        if resume_from_checkpoint:
            raise UserError("coin.py does not resume a run: give another --output_dir")
        return super().train(None, *args, **kwargs)

    def start_afresh(self, model: nn.Module) -> None:
        """Put the coin in place of the estimator."""
        super().start_afresh(model)
        self.addax.estimator = CoinToss(self.addax.zo_directions, self.args.seed)


def main(argv: Sequence[str] | None = None) -> None:
    """Train."""
    train.main(argv, CoinTrainer)


if __name__ == "__main__":
    main()
