"""Reads and writes weights on several back ends, one after the other.

``python -m tests.workers.weights_cases FOLDER SOURCE LAYOUT ...``: the models of the first layout
are filled from ``FOLDER/SOURCE``, those of each other layout from what the one before it wrote.
"""

import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import nn
from transformers import AutoModelForCausalLM

from addax_ds import load_weights
from addax_ds.checkpoint.weights import local_slices, save_weights
from addax_ds.optim.addax import unwrap
from tests.support.families import FAMILIES
from tests.support.layouts import LAYOUTS
from tests.support.models import tiny_opt
from tests.support.reference import Hyperparameters
from tests.support.tiny import tiny_model
from tests.workers.teardown import shut_down

MAX_FILE_SIZE = "50KB"
TOKENS = torch.arange(24).view(2, 12)


def tied_bf16() -> nn.Module:
    """Tied embeddings, frozen parameters, and buffers that are saved, one of them a scalar."""
    model = tiny_opt(frozen=True, dtype=torch.bfloat16)
    model.register_buffer("count", torch.tensor(5))
    model.register_buffer("mask", torch.tensor([True, False, True]))
    return model


def untied() -> nn.Module:
    """Parameters that leave ranks without an element, and a buffer of numbers."""
    model = tiny_model("llama")
    model.odd = nn.ParameterList([nn.Parameter(torch.rand(n)) for n in (1, 3, 5)])
    model.register_buffer("table", torch.rand(3, 5))
    return model


def experts() -> nn.Module:
    """Experts that are one tensor in the model and many in its files."""
    torch.manual_seed(7)
    return AutoModelForCausalLM.from_config(FAMILIES["mixtral"])


MODELS = {"tied-bf16": tied_bf16, "untied": untied, "experts": experts}


def other_values(model: nn.Module) -> nn.Module:
    """Change all that is saved, so that nothing is right by chance."""
    for tensor in model.state_dict().values():
        tensor.copy_(tensor == 0)
    return model


def pass_on(name: str, layout: str, source: Path, target: Path) -> dict[str, Any]:
    """Fill a model of other values from one folder and write it to another."""
    model = MODELS[name]()
    run = LAYOUTS[layout].run(other_values(model), Hyperparameters())
    run.model.eval()
    for _ in range(2):
        run.model(TOKENS)  # leaves the root, or ZeRO-3's small parameters, gathered
    with torch.no_grad():
        load_weights(unwrap(run.optimizer).sharding, source / name)
        logits = run.model(TOKENS).logits
    save_weights(model, target / name, max_file_size=MAX_FILE_SIZE)
    with torch.no_grad():
        again = run.model(TOKENS).logits
    gradients = [n for n, p in model.named_parameters() if p.grad is not None]
    held = sum(s.data.numel() for s in local_slices(model))
    run.close()
    return {"logits": logits, "again": again, "gradients": gradients, "held": held}


def main() -> None:
    folder, source, layouts = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    torch.set_num_threads(1)
    deepspeed.init_distributed()
    for layout in layouts:
        target = folder / layout
        for name in MODELS:
            found = pass_on(name, layout, source, target)
            torch.save(found, folder / f"{layout}-{name}-rank{dist.get_rank()}.pt")
        source = target
    shut_down()


if __name__ == "__main__":
    main()
