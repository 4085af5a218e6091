"""Common parts of the benchmarks: models of a shape, live tensors, circumstances."""

import gc
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, OPTConfig

from addax_ds.planner.shapes import OPT_FAMILY
from studies.jobs import environment
from studies.provenance import collect_provenance as collect_provenance
from studies.scaling.point import SMALL_SHAPES

SHAPES: dict[str, dict[str, Any]] = {
    **SMALL_SHAPES,
    **{name: OPT_FAMILY[name] for name in ("opt-125m", "opt-350m", "opt-1.3b")},
}
"""Arguments of `OPTConfig`."""


def one_thread_each() -> dict[str, str]:
    """Return the environment for ranks on a CPU, one thread each."""
    return {**environment(), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


def random_model(shape: str, device: torch.device) -> nn.Module:
    """OPT of a shape with random bf16 weights, the same on all ranks, in training mode.

    Without dropout, so that contenders see the same losses.
    """
    torch.manual_seed(0)
    config = OPTConfig(**SHAPES[shape], dropout=0.0)
    with device:
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).train()


def parameter_count(shape: str) -> int:
    """Number of parameters of a shape, a tied one counted once."""
    model = random_model(shape, torch.device("meta"))
    return sum(parameter.numel() for parameter in model.parameters())


def live_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages behind tensors."""
    storages = {}
    for tensor in tensors:
        if tensor.is_meta:
            continue
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def all_live_tensors() -> list[Tensor]:
    """Every tensor that Python can reach."""
    gc.collect()
    # isinstance would ask lazy proxies for their class, and some warn that they are deprecated.
    return [o for o in gc.get_objects() if issubclass(type(o), Tensor)]
