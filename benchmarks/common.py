"""What the benchmarks share: models of a shape, live tensors, collectives, circumstances."""

import gc
import os
import platform
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import deepspeed
import torch
import transformers
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, OPTConfig

import addax_ds


def _opt(hidden_size: int, num_hidden_layers: int, **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": hidden_size,
        "num_hidden_layers": num_hidden_layers,
        "ffn_dim": 4 * hidden_size,
        "num_attention_heads": hidden_size // 64,
        "word_embed_proj_dim": hidden_size,
        **more,
    }


SHAPES: dict[str, dict[str, Any]] = {
    "tiny": _opt(128, 3, ffn_dim=256, vocab_size=1003, max_position_embeddings=66),
    "opt-11m": _opt(192, 2),
    "opt-34m": _opt(384, 8),
    "opt-125m": _opt(768, 12),
    "opt-350m": _opt(1024, 24, word_embed_proj_dim=512, do_layer_norm_before=False),
}
"""Arguments of `OPTConfig`. The last two are published ones; the smaller ones keep their vocabulary
of 50272 and their 2048 positions, except "tiny"."""


def random_model(shape: str) -> nn.Module:
    """OPT of a shape with random bf16 weights, the same on all ranks, in training mode.

    Without dropout, so that contenders see the same losses.
    """
    torch.manual_seed(0)
    config = OPTConfig(**SHAPES[shape], dropout=0.0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).train()


def parameter_count(shape: str) -> int:
    """Number of parameters of a shape, a tied one counted once."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in random_model(shape).parameters())


def live_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages behind tensors."""
    storages = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def all_live_tensors() -> list[Tensor]:
    """Every tensor that Python can reach."""
    gc.collect()
    # isinstance would ask lazy proxies for their class, and some warn that they are deprecated.
    return [o for o in gc.get_objects() if issubclass(type(o), Tensor)]


class CollectiveCounter(TorchDispatchMode):
    """Collects ``(operation, bytes of its largest tensor)`` of every collective.

    The largest tensor is the gathered one, the one to be reduce-scattered, or the reduced one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function.namespace == "c10d":
            sizes = [t.numel() * t.element_size() for t in _tensors(args)]
            self.calls.append((function._schema.name.removeprefix("c10d::"), max(sizes, default=0)))
        return function(*args, **(kwargs or {}))


def _tensors(arguments: Any) -> list[Tensor]:
    if isinstance(arguments, Tensor):
        return [arguments]
    if isinstance(arguments, list | tuple):
        return [tensor for argument in arguments for tensor in _tensors(argument)]
    return []


def circumstances() -> dict[str, Any]:
    """What the numbers depend on besides the configuration: code, versions and machine."""
    git = ["git", "-C", str(Path(__file__).parent)]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
    changes = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True)
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "versions": {
            "addax_ds": addax_ds.__version__,
            "torch": torch.__version__,
            "deepspeed": deepspeed.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "commit": commit.stdout.strip() or None,
        "uncommitted_changes": bool(changes.stdout.strip()),
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()
