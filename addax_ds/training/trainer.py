"""`AddaxTrainer`: `transformers.Trainer` with an Addax step and the likelihood as its loss."""

from functools import partial
from typing import Any

from torch import nn
from transformers import Trainer

from addax_ds.data.partition import partition
from addax_ds.data.train_rows import EncodedRows
from addax_ds.training.length_threshold import AutoThreshold
from addax_ds.training.likelihood import LikelihoodMixin
from addax_ds.training.mixin import AddaxMixin
from addax_ds.training.rehearsal import longest_batch, rehearse_threshold


class AddaxTrainer(LikelihoodMixin, AddaxMixin, Trainer):
    """Trainer of a causal language model whose step is Addax's; see `AddaxMixin`.

    Losses are sums over the global batch divided by its global number of target tokens
    (`LikelihoodMixin`).

    Args:
        model: a causal language model; what it returns has ``logits``.
        args: Trainer's arguments and Addax's own.
        planned: how ``--length_threshold auto`` was planned, whose L_T the settings have. A run
            that does not go on from a checkpoint rehearses it, and lowers it if it does not fit.
        **kwargs: those of Trainer; see `LikelihoodMixin` for the data.

    Raises:
        UserError: for arguments that do not fit together, before anything is trained.
    """

    def __init__(
        self,
        model: Any,
        args: Any = None,
        *,
        planned: AutoThreshold | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, args, **kwargs)
        self._planned = planned

    def start_afresh(self, model: nn.Module) -> None:
        """Lower a planned L_T until the longest batches fit into memory."""
        if self._planned is not None:
            rehearse = partial(self._rehearse, model)
            wait = self.args.ddp_timeout
            threshold = rehearse_threshold(self._planned, rehearse, self.args.device, wait)
            self.repartition(threshold)

    def _rehearse(self, model: nn.Module, threshold: int) -> None:
        """Run a step over the longest sequences that there are with an L_T."""
        assert self._steps is not None
        rows = self._steps.rows
        assert isinstance(rows, EncodedRows)
        streams = partition(rows.lengths, "addax", threshold)
        batches = (
            (streams.zeroth_order, self.settings.per_device_zo_batch_size),
            (streams.first_order, self.args.per_device_train_batch_size),
        )
        longest = (longest_batch(rows.examples, *batch, self._pad_token_id) for batch in batches)
        zeroth, first = (
            partial(self.micro_batch_loss, model, self.prepare_micro_batch(batch), 1)
            for batch in longest
        )
        model.train()
        summed = self.settings.gradient_accumulation_steps > 1
        self.addax.rehearse(zeroth, [first, first] if summed else first)
