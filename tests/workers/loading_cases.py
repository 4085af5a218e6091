"""Loads models on every back end, and compares them with what Transformers loads whole.

The models lie in ``FOLDER/models``.
"""

import gc
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM
from transformers.integrations import HfDeepSpeedConfig

from addax_ds.checkpoint import weights
from addax_ds.config.arguments import ModelArguments
from addax_ds.models.source import ModelSource
from addax_ds.sharding.layout import Layout
from tests.workers.trainer_cases import warnings, with_adapters

LAYOUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "none": ("none", {}),
    "fsdp2": ("fsdp2", {}),
    "zero3": ("zero3", {}),
    "zero3-offload": ("zero3", {"offload_param": {"device": "cpu"}}),
}
"""What `ModelSource.load` calls them, and the block of DeepSpeed's JSON."""

RUN_ON = {1: ["none", "zero3"], 2: ["fsdp2", "zero3", "zero3-offload"]}
"""Layouts by number of ranks."""

STEPS = (("llama", False), ("llama", True), ("opt", True))
"""Models of which ZeRO-3 takes a step, and whether they have adapters."""

LARGE, LARGE_BIN, LARGE_EXPERTS, FILE_SIZE = "large", "large-bin", "large-experts", "400KB"
TOKENS = torch.arange(24).view(2, 12)
DTYPES = {"opt": torch.float16, "llama": torch.bfloat16, "qwen3": torch.float32}
CHUNK_BYTES = 4096


def dtype_of(name: str) -> torch.dtype:
    return DTYPES.get(name, torch.bfloat16)


def load(folder: Path, layout: str, dtype: torch.dtype) -> nn.Module:
    source = ModelSource.find(ModelArguments(model_name_or_path=str(folder)))
    with transformers_knows(layout, dtype):
        return source.load(dtype, Layout(LAYOUTS[layout][0]))


def ds_config(layout: str, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": dtype == torch.float16},
        "optimizer": {"type": "Addax", "params": {"lr": 1e-2, "alpha": 0.5, "seed": 1}},
        "zero_optimization": {"stage": 3, "reduce_bucket_size": 150_000, **LAYOUTS[layout][1]},
    }


@contextmanager
def transformers_knows(layout: str, dtype: torch.dtype) -> Iterator[None]:
    """Let Transformers see the DeepSpeed configuration, as it does while a recipe runs."""
    config = HfDeepSpeedConfig(ds_config(layout, dtype)) if layout.startswith("zero3") else None
    yield
    del config


def compare(folder: Path, layout: str) -> dict[str, Any]:
    """Load with and without addax_ds; say where the two models differ."""
    dtype = dtype_of(folder.name)
    with warnings() as lines:
        model = load(folder, layout, dtype)
    wanted = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    expected = dict(wanted.named_parameters(remove_duplicate=False)) | dict(wanted.named_buffers())
    tensors = dict(whole(model)) | dict(model.named_buffers())
    assert tensors.keys() == expected.keys()
    return {
        "different": [
            name
            for name, tensor in tensors.items()
            if tensor.dtype != expected[name].dtype or not torch.equal(tensor, expected[name])
        ],
        "parameters": [len(list(m.parameters())) for m in (model, wanted)],
        "held": sum(p.data.nbytes for p in weights.local_slices(model)),
        "generation": model.generation_config.to_dict() == wanted.generation_config.to_dict(),
        "config": model.config.to_dict() == wanted.config.to_dict(),
        "training": model.training,
        "warnings": lines,
    }


def whole(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter unsharded, by the back end's own means, tied ones by each name."""
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if hasattr(parameter, "ds_id"):
            with deepspeed.zero.GatheredParameters([parameter]):
                yield name, parameter.detach().clone()
        else:
            yield name, getattr(parameter, "full_tensor", parameter.detach)()


# ---- steps -------------------------------------------------------------------------------------


def step(model: nn.Module, layout: str, dtype: torch.dtype) -> dict[str, Any]:
    """Take one step under DeepSpeed."""
    config = ds_config(layout, dtype)
    partitioned = [p for p in model.parameters() if hasattr(p, "ds_id")]  # adapters are not yet
    places = [p.ds_tensor.data_ptr() for p in partitioned]
    engine, optimizer, _, _ = deepspeed.initialize(model=model, config=config)
    stay = places == [p.ds_tensor.data_ptr() for p in partitioned]
    # Where DeepSpeed would hold one copy of all shards.
    stay &= all(group.is_meta for group in optimizer.fp16_partitioned_groups_flat)
    engine.eval()
    with torch.no_grad():
        logits = engine(TOKENS).logits

    def loss() -> Tensor:
        return engine(TOKENS, labels=TOKENS).loss.float()

    optimizer.measure(loss, None)
    engine.backward(loss())
    engine.step()
    after = dict(whole(model))
    buffers = dict(model.named_buffers())
    engine.destroy()
    return {"logits": logits, "after": after, "buffers": buffers, "stay": stay and bool(places)}


def same_steps(folder: Path, layout: str, adapters: bool) -> dict[str, bool]:
    """Compare the steps of a model loaded here and of one that Transformers partitions."""
    dtype = torch.bfloat16
    found = []
    for own in (True, False):
        if own:
            model = load(folder, layout, dtype)
        else:
            with transformers_knows(layout, dtype):
                model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        if adapters:
            model = with_adapters(model)
        before = dict(whole(model))
        found.append(step(model, layout, dtype))
    ours, theirs = found
    return {
        "logits": torch.equal(ours["logits"], theirs["logits"]),
        "stay": ours["stay"] and theirs["stay"],
        "moved": not all(torch.equal(t, before[n]) for n, t in ours["after"].items()),
        **{
            part: ours[part].keys() == theirs[part].keys()
            and all(torch.equal(t, theirs[part][n]) for n, t in ours[part].items())
            for part in ("after", "buffers")
        },
    }


# ---- memory ------------------------------------------------------------------------------------


class LiveTensors(TorchDispatchMode):
    """Follows the bytes of all storages that operators return while it is entered.

    Attributes:
        peak: most bytes alive at once, without what lies in mapped files.
    """

    def __init__(self) -> None:
        super().__init__()
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            # A DTensor says the size of the whole; its part is a tensor by itself.
            if isinstance(tensor, Tensor) and not isinstance(tensor, DTensor):
                storage = tensor.untyped_storage()
                if not tensor.is_meta and storage._cdata not in self._alive:
                    self._add(storage)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        size = 0 if lies_in_a_file(storage) else storage.nbytes()
        self._alive = {k: e for k, e in self._alive.items() if not e[0].expired()}
        self._alive[storage._cdata] = (StorageWeakRef(storage), size)
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))


def lies_in_a_file(storage: torch.UntypedStorage) -> bool:
    """Whether it is part of a mapped file; of a part, torch itself does not say so."""
    if storage.resizable() or not storage.nbytes():  # torch has allocated it
        return False
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(address, 16) for address in line.split(maxsplit=1)[0].split("-"))
        if start <= storage.data_ptr() < end:
            return line.endswith((".bin", ".safetensors"))
    return False


def memory(folder: Path, target: Path | None, layout: str) -> dict[str, int]:
    """Measure a load, and a save unless ``target`` is None, in live bytes of tensors."""
    gc.collect()
    with LiveTensors() as loading:
        model = load(folder, layout, torch.bfloat16)
    gc.collect()
    with LiveTensors() as saving:
        if target is not None:
            weights.save_weights(model, target, max_file_size=FILE_SIZE)
    held = sum(part.data.nbytes for part in weights.local_slices(model))
    return {"held": held, "loading": loading.peak, "saving": saving.peak}


def set_up() -> None:
    logging.getLogger("transformers").setLevel(logging.ERROR)
    deepspeed.init_distributed()
    weights.CHUNK_BYTES = CHUNK_BYTES


def run_case(case: tuple[Any, ...], folder: Path) -> dict[str, Any]:
    """Run ``(layout, model)``, or ``("step", model, with adapters)``."""
    layout, name = case[:2]
    path = folder / "models" / name
    if layout == "step":
        offloaded = case == ("step", "llama", True)
        return same_steps(path, "zero3-offload" if offloaded else "zero3", adapters=case[2])
    if name in (LARGE, LARGE_EXPERTS):
        ending = name.removeprefix(LARGE)
        return memory(path, folder / f"saved{ending}-{dist.get_world_size()}-{layout}", layout)
    return memory(path, None, layout) if name == LARGE_BIN else compare(path, layout)
