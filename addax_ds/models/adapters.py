"""LoRA adapters of the command line, added to a model before a back end lays it out."""

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from addax_ds.checkpoint.adapters import has_adapters
from addax_ds.checkpoint.weight_files import WeightSlice
from addax_ds.checkpoint.weights import local_slices
from addax_ds.kernels.noise import parameter_id
from addax_ds.utils.errors import UserError
from addax_ds.utils.extras import naming_extras

logger = logging.getLogger(__name__)

ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class Lora:
    """Adapters that are to be trained in place of a model's weights.

    Attributes:
        r: rank of the adapters.
        alpha: their product is scaled by alpha / r.
        target_modules: names of linear layers, or ends of such names; ("all-linear",) for all but
            the head; None for those that PEFT knows for the architecture, or else all.
        seed: of A; B is zero.
    """

    r: int
    alpha: int
    target_modules: tuple[str, ...] | None = None
    seed: int = 0

    @property
    def settings(self) -> dict[str, int]:
        """What may not differ from a checkpoint's, by PEFT's names."""
        return {"r": self.r, "lora_alpha": self.alpha}

    def add_to(self, model: Any) -> Any:
        """Return a `peft.PeftModel` of a model whose parameters may be on the meta device.

        The adapters have the dtype of the weights; their values are undefined.

        Raises:
            UserError: PEFT is missing, or finds no such layers.
        """
        with naming_extras():
            import peft
        from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN

        targets: str | list[str] | None = list(self.target_modules or ())
        if targets == [ALL_LINEAR] or not (targets or model.config.model_type in KNOWN):
            targets = ALL_LINEAR
        dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        adapted = peft.get_peft_model(
            model,
            peft.LoraConfig(
                r=self.r,
                lora_alpha=self.alpha,
                target_modules=targets or None,
                task_type="CAUSAL_LM",
            ),
            autocast_adapter_dtype=False,
            low_cpu_mem_usage=any(p.is_meta for p in model.parameters()),
        )
        names = []
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                if ".lora_A." not in name and ".lora_B." not in name:
                    raise UserError(f"--lora_target_modules: {name} is not of a linear layer")
                parameter.data = parameter.data.to(dtype)
                names.append(name.split(".lora_")[0].rpartition(".")[2])
        logger.info(
            "Adapters: LoRA, r %d, alpha %d, of %s",
            self.r,
            self.alpha,
            ", ".join(sorted(set(names))),
        )
        return adapted

    @torch.no_grad()
    def fill(self, model: nn.Module) -> None:
        """Write the first values: A uniform as PEFT has it, B zero.

        They are a function of the seed and the weight's name, whatever back end holds it.
        """
        for wanted in local_slices(model):
            name = wanted.names[0]
            if ".lora_" not in name:
                continue
            full = torch.zeros(wanted.shape)
            if ".lora_A." in name:
                generator = torch.Generator().manual_seed(self.seed << 32 | parameter_id(name))
                bound = 1 / math.sqrt(wanted.shape[1])
                full.uniform_(-bound, bound, generator=generator)
            end = wanted.start + wanted.data.numel()
            wanted.data.view(-1).copy_(full.view(-1)[wanted.start : end])


def base_slices(model: Any) -> Iterator[WeightSlice]:
    """Yield this rank's part of what the files of a model hold, without its adapters."""
    base = model.get_base_model() if has_adapters(model) else model
    for wanted in local_slices(base):
        if ".lora_" not in wanted.names[0]:
            names = tuple(name.replace(".base_layer.", ".") for name in wanted.names)
            yield replace(wanted, names=names)
