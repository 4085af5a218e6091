"""SGD and AdamW under ZeRO-3: what Addax is compared with, on the same batches and evaluations."""

import math
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from transformers import Trainer

from addax_ds.optim.methods import BASELINES
from addax_ds.optim.report import NonFiniteSteps
from addax_ds.training.likelihood import LikelihoodMixin
from addax_ds.training.steps import StepMixin


class BaselineTrainer(LikelihoodMixin, StepMixin, Trainer):
    """Trainer with torch's SGD or AdamW in DeepSpeed's ZeRO-3 optimizer.

    `AddaxConfig` has put it into the JSON. The weights have a master copy in fp32, SGD has no
    momentum, AdamW torch's defaults; clipping and the sum over micro-batches are the engine's.
    Checkpoints hold the weights alone, so a run cannot go on from one. Nothing keeps a loss that is
    NaN or infinite from the weights, but after `MAX_NON_FINITE_STEPS` of them training ends.
    """

    methods = BASELINES

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._non_finite = NonFiniteSteps()

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """Forward and backward of each micro-batch, and the engine's step after the last."""
        model.train()
        self._losses.clear()
        micro_batches = self.loss_closures(model, inputs, "first_order")
        for number, loss in enumerate(micro_batches, start=1):
            self.backward(loss(), is_last=number == len(micro_batches))
        mean = sum(loss for _, _, loss in self._losses) / len(self._losses)
        assert isinstance(mean, Tensor)
        if self.args.world_size > 1:
            dist.all_reduce(mean)
        mean /= self.args.world_size
        step = self.state.global_step
        self._non_finite.count(step, [] if math.isfinite(mean) else [f"first-order loss {mean}"])
        return mean

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        """Add the gradient of a micro-batch to the step's mean; take the step after the last."""
        engine: Any = self.model_wrapped
        engine.set_gradient_accumulation_boundary(is_last)
        engine.backward(loss)
        engine.step()
