"""SGD and AdamW under ZeRO-3: what Addax is compared with, on the same batches and evaluations."""

from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from addax_ds.agreement import all_ranks_or_none
from addax_ds.errors import UserError
from addax_ds.step_trainer import StepTrainer
from addax_ds.weight_files import WeightFiles
from addax_ds.weights import local_slices


class BaselineTrainer(StepTrainer):
    """Trainer with torch's SGD or AdamW in DeepSpeed's ZeRO-3 optimizer.

    `configure` has put it into the JSON. The weights have a master copy in fp32, SGD has no
    momentum, AdamW torch's defaults; clipping and the sum over micro-batches are the engine's.
    Checkpoints hold the weights alone, so a run cannot go on from one.
    """

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """Forward and backward of each micro-batch, and the engine's step after the last."""
        model.train()
        engine: Any = self.model_wrapped
        self._losses.clear()
        micro_batches = self._micro_batches(model, inputs, "first_order")
        for number, loss in enumerate(micro_batches, start=1):
            engine.set_gradient_accumulation_boundary(number == len(micro_batches))
            engine.backward(loss())
            engine.step()
        mean = sum(loss for _, _, loss in self._losses) / len(self._losses)
        assert isinstance(mean, Tensor)
        if self.args.world_size > 1:
            dist.all_reduce(mean)
        return mean / self.args.world_size

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Train from the start.

        Raises:
            UserError: for ``resume_from_checkpoint``.
        """
        if resume_from_checkpoint:
            raise UserError(
                f"--method {self.settings.method} cannot resume: its checkpoints hold the weights "
                "without the optimizer's state"
            )
        return super().train(None, *args, **kwargs)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Nothing: checkpoints are for choosing the best one, not for going on."""

    def _load_weights(self, folder: Path) -> None:
        """Fill the 16-bit shards, for evaluation and saving; the master copy stays behind."""
        assert self.model is not None
        with all_ranks_or_none():
            WeightFiles(folder).fill(local_slices(self.model))
        engine: Any = self.model_wrapped
        engine.optimizer.parameter_offload.partition_all_parameters()  # gathered before
