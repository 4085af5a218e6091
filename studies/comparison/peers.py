"""Optimizers of other packages on the whole model of one rank, in place of a method of this one.

    deepspeed --num_gpus 1 studies/comparison/peers.py --peer badam --learning_rate 1e-4 ...

The other flags are those of ``launch/train.py``, but for ``--method`` and ``--deepspeed``, which
have no effect. Data, order of rows, loss and evaluation are those of ``--method ip-sgd``.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

sys.path.insert(0, str(Path(__file__).parents[2]))

from addax_ds.cli import train
from addax_ds.training.baseline import BaselineTrainer
from addax_ds.utils.command_line import mistakes_end_the_program
from addax_ds.utils.errors import UserError

BADAM_STEPS = 5
"""Steps that BAdam trains a block; its default, 50, is more than a training here has."""

Maker = Callable[[nn.Module, float], Optimizer]


def _eight_bit() -> Maker:
    """Return AdamW with states of 8 bits on bf16 weights, to which updates are rounded."""
    from bitsandbytes.optim import AdamW8bit

    return lambda model, rate: AdamW8bit(model.parameters(), lr=rate, weight_decay=0.0)


def _badam() -> Maker:
    """Return AdamW on one layer at a time, with fp32 copies of its weights, from last to first."""
    from badam import BlockOptimizer

    def make(model: nn.Module, rate: float) -> Optimizer:
        adamw = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
        named = list(model.named_parameters())
        return BlockOptimizer(adamw, named, switch_block_every=BADAM_STEPS, verbose=0)

    return make


PEERS: dict[str, Callable[[], Maker]] = {"adamw-8bit": _eight_bit, "badam": _badam}
"""What imports a peer's package, and returns what makes its optimizer of a model and a rate."""


class PeerTrainer(BaselineTrainer):
    """Trainer with an optimizer of a model that is whole on its only rank.

    Attributes:
        make: makes the optimizer.
    """

    methods = ("ip-sgd",)
    make: Maker

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """Make the optimizer; Trainer's loop takes its steps."""
        if self.optimizer is None:
            assert self.model is not None
            self.optimizer = self.make(self.model, self.args.learning_rate)
        return self.optimizer

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        """Add the gradient of a micro-batch to the step's mean."""
        self.accelerator.backward(loss / self.settings.gradient_accumulation_steps)


def main(argv: Sequence[str] | None = None) -> None:
    """Train by the peer that ``--peer`` names."""
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    parser.add_argument("--peer", choices=PEERS, required=True)
    for name in ("--method", "--deepspeed"):
        parser.add_argument(name)
    known, rest = parser.parse_known_args(argv)
    with mistakes_end_the_program():
        try:
            make = PEERS[known.peer]()
        except ImportError as error:
            raise UserError(f"--peer {known.peer}: {error}: pip install -e '.[peers]'") from error
    trainer = type(PeerTrainer.__name__, (PeerTrainer,), {"make": staticmethod(make)})
    train.main([*rest, "--method", "ip-sgd", "--sharding", "none"], trainer)


if __name__ == "__main__":
    main()
