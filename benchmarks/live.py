"""Runs real steps of each back end and method, and records every storage that they allocate.

The peak is the largest sum of bytes of live tensors at any moment of the step, the weights
included; the categories are those of that moment. Memory that is not a tensor's (libraries, what
kernels and gloo allocate for themselves, the allocator's unused blocks) is in the resident set
size alone.

Offloaded shards are in the same memory as all else on a CPU. What a GPU's rank would have in host
memory (the shards, sums over micro-batches) is counted as "host" and apart, with a peak of its own,
and copies from there to the device, which on a CPU are the same tensor, are made.
"""

import contextlib
import functools
import resource
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import deepspeed
import torch
from accelerate.utils import send_to_device
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from torch import Tensor
from torch.distributed.fsdp._fully_shard import _fsdp_param, _fsdp_param_group
from transformers import AutoModelForCausalLM, OPTConfig
from transformers.integrations import HfDeepSpeedConfig

from addax_ds import Addax, attach
from addax_ds.data.examples import NO_LOSS
from addax_ds.evaluation.likelihood import target_scores, target_tensors
from addax_ds.integrations.stage3 import Stage3
from addax_ds.optim import step
from addax_ds.optim.gradients import GradientSums
from addax_ds.optim.methods import ZEROTH_ORDER, Method
from addax_ds.planner.shapes import OPT_FAMILY
from addax_ds.planner.tape import Tape
from addax_ds.planner.trace import category_of
from addax_ds.sharding.fsdp2 import options_for, shard_model
from addax_ds.sharding.zero3 import Zero3Sharding
from addax_ds.utils.dtypes import DTYPES
from benchmarks.common import SHAPES, all_live_tensors

MODELS = {**SHAPES, **OPT_FAMILY}
WARM_UP_STEPS = 2  # DeepSpeed has recorded the order of modules after one
ALPHAS: dict[Method, float] = {"addax": 1e-3, "mezo": 1.0, "ip-sgd": 0.0}
OPTIMIZERS: dict[Method, dict[str, Any]] = {
    **{m: {"type": "Addax", "params": {"lr": 1e-6, "alpha": a}} for m, a in ALPHAS.items()},
    "sgd": {"type": "SGD", "params": {"lr": 1e-6}},
    "adamw": {"type": "AdamW", "params": {"lr": 1e-6, "torch_adam": True}},
}


# ---- one step of each back end -------------------------------------------------------------------


def batch_of(rows: int, length: int, targets: int) -> dict[str, Tensor]:
    """Return rows with targets at other positions in each row."""
    ids = torch.randint(4, 1000, (rows, length))
    labels = torch.full((rows, length), NO_LOSS)
    for row in range(rows):
        chosen = 1 + torch.arange(row * targets, (row + 1) * targets) % (length - 1)
        labels[row, chosen] = ids[row, chosen]
    return {"input_ids": ids, "labels": labels}


def closure(
    model: Any, batch: dict[str, Tensor], device: torch.device | None = None
) -> Callable[[], Tensor]:
    """Return what computes the loss of a batch, as `StepMixin` does."""
    prepared = send_to_device({**batch, **target_tensors(batch["labels"])}, device)

    def loss() -> Tensor:
        scores = target_scores(model, prepared)
        return -scores[:, 0].sum() / batch["labels"].numel()

    return loss


def random_model(case: dict[str, Any]) -> Any:
    """Build the model with random weights; under ZeRO-3 each is partitioned as it is made."""
    torch.manual_seed(0)
    config = OPTConfig(**MODELS[case["model"]])
    model: Any = AutoModelForCausalLM.from_config(
        config, dtype=DTYPES[case["dtype"]], attn_implementation=case["attention"]
    )
    model.config.use_cache = False
    if case["checkpointing"]:
        model.activation_checkpointing_enable()
    return model.train()


def zero3_step(case: dict[str, Any]) -> tuple[Any, Callable[[], None], Any]:
    """Return the model, what runs a step, and the optimizer of ZeRO-3."""
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": case["dtype"] == "bf16"},
        "optimizer": OPTIMIZERS[case["method"]],
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": 3, **case["zero_optimization"]},
    }
    transformers_config = HfDeepSpeedConfig(config)  # from_config looks for it
    model = random_model(case)
    del transformers_config
    engine, optimizer, _, _ = deepspeed.initialize(model=model, config=config)
    zeroth, first = _closures(engine, case)

    def step() -> None:
        loss = optimizer.measure(zeroth, first) if case["method"] in ALPHAS else first[0]()
        if loss is not None:
            engine.backward(loss)
        engine.step()

    return engine, step, optimizer


def torch_step(case: dict[str, Any]) -> tuple[Any, Callable[[], None], Any]:
    """Return the model, what runs a step, and the optimizer of FSDP2 or an unsharded model."""
    model = random_model(case)
    if case["sharding"] == "fsdp2":
        layout = case["replicas"], case["cpu_offload"]
        shard_model(model, **options_for(torch.device("cpu"), *layout))
    optimizer = Addax(model.parameters(), lr=1e-6, alpha=ALPHAS[case["method"]])
    attach(optimizer, model)
    zeroth, first = _closures(model, case)

    def step() -> None:
        loss = optimizer.measure(zeroth, first)
        if loss is not None:
            loss.backward()
        optimizer.step()

    return model, step, optimizer


def _closures(model: Any, case: dict[str, Any]) -> tuple[list[Callable], list[Callable]]:
    """Return one for each micro-batch of both parts of a step; none for a part it has not."""
    method = case["method"]

    def micro_batches(stream: str, has_it: bool) -> list[Callable]:
        count = case["accumulation"] if has_it else 0
        return [closure(model, batch_of(*case[stream])) for _ in range(count)]

    return micro_batches("zeroth", method in ZEROTH_ORDER), micro_batches("first", method != "mezo")


# ---- what is alive -------------------------------------------------------------------------------


def standing(tape: Tape, model: Any, optimizer: Any, home: str) -> None:
    """Note all tensors that are alive between steps; shards are of the category ``home``."""
    for parameter in model.parameters():
        stored = getattr(parameter, "ds_tensor", parameter)
        tape.note(stored, home)
        if hasattr(parameter, "ds_tensor") and parameter.numel():
            tape.note(parameter.data, "gathered")  # DeepSpeed's own optimizer keeps small ones
    for bucket in getattr(optimizer, "ipg_buckets", {}).values():
        if bucket.buffer is not None:
            tape.note(bucket.buffer, "buckets")
    for group in getattr(optimizer, "fp32_partitioned_groups_flat", []):
        tape.note(group, "optimizer")
        for state in optimizer.optimizer.state[group].values():
            tape.note(state, "optimizer")
    if getattr(optimizer, "grad_partitions_flat_buffer", None) is not None:
        tape.note(optimizer.grad_partitions_flat_buffer, "optimizer")
    for tensor in all_live_tensors():
        if tensor.device.type == "cpu":
            tape.note(tensor, "other")


@contextlib.contextmanager
def watched(tape: Tape, offloaded: bool) -> Iterator[None]:
    """Tag what the back ends allocate."""
    tagged = [
        (PartitionedParameterCoordinator, "fetch_sub_module", "gathered"),
        (Zero3Sharding, "_gather_persistent", "gathered"),
        (_fsdp_param_group.FSDPParamGroup, "unshard", "gathered"),
        (_fsdp_param_group.FSDPParamGroup, "wait_for_unshard", "gathered"),
        (GradientSums, "add", "host" if offloaded else "gradients"),
        (DeepSpeedZeroOptimizer_Stage3, f"{_STAGE3}__reduce_and_partition_ipg_grads", "buckets"),
        (Stage3, "step", "optimizer"),
        (step, "perturb", "gathered"),
        (DeepSpeedZeroOptimizer_Stage3, "step", "optimizer"),
    ]
    with contextlib.ExitStack() as stack:
        if offloaded:
            for owner, name, _ in tagged[:4]:
                wrapped = _copying_from_host(tape, getattr(owner, name))
                stack.enter_context(mock.patch.object(owner, name, wrapped))
        for owner, name, tag in tagged:
            wrapped = _tagged(tape, tag, getattr(owner, name))
            stack.enter_context(mock.patch.object(owner, name, wrapped))
        reduce_one = DeepSpeedZeroOptimizer_Stage3.reduce_independent_p_g_buckets_and_remove_grads

        def note_gradient(zero: Any, parameter: Any) -> None:
            _relabel(tape, [parameter.grad])
            reduce_one(zero, parameter)

        stack.enter_context(
            mock.patch.object(DeepSpeedZeroOptimizer_Stage3, reduce_one.__name__, note_gradient)
        )
        reduce_all = _fsdp_param_group.foreach_reduce

        def note_gradients(parameters: Any, gradients: Any, *args: Any) -> Any:
            _relabel(tape, gradients)
            with tape.tagged("buckets"):
                return reduce_all(parameters, gradients, *args)

        stack.enter_context(mock.patch.object(_fsdp_param_group, "foreach_reduce", note_gradients))
        for name in ("alloc_storage", "free_storage"):
            resize = functools.partial(_resize, tape, getattr(_fsdp_param, name))
            stack.enter_context(mock.patch.object(_fsdp_param, name, resize))
            if hasattr(_fsdp_param_group, name):  # one rank alone
                stack.enter_context(mock.patch.object(_fsdp_param_group, name, resize))
        yield


_STAGE3 = f"_{DeepSpeedZeroOptimizer_Stage3.__name__}"


def _tagged(tape: Tape, tag: str, function: Callable) -> Callable:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        with tape.tagged(tag):
            return function(*args, **kwargs)

    return wrapper


def _copying_from_host(tape: Tape, gather: Callable) -> Callable:
    """Make a gather copy what is in host memory to its device, though that is no other place."""
    move = Tensor.to

    def copied(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        moved = move(tensor, *args, **kwargs)
        is_same = moved.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
        number = tape.note(tensor) if tape.enabled and is_same else None
        in_host_memory = number is not None and tape.categories[number] == "host"
        return moved.clone() if in_host_memory else moved

    @functools.wraps(gather)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        with mock.patch.object(Tensor, "to", copied):
            return gather(*args, **kwargs)

    return wrapper


def _resize(tape: Tape, resize: Callable, tensor: Tensor) -> None:
    resize(tensor)
    if tape.enabled:
        tape.categories[tape.resized(tensor)] = "gathered"


def _relabel(tape: Tape, gradients: list[Any]) -> None:
    for gradient in gradients:
        number = tape.note(gradient)
        assert number is not None
        if tape.categories[number] == "activations":
            tape.categories[number] = "gradients"


def peak(tape: Tape) -> dict[str, int]:
    """Return the largest sum of live bytes, and the bytes of each category at that moment.

    "host" is not in the sum, and is the largest sum of its own.
    """
    sizes: dict[int, int] = {}
    now: dict[str, int] = dict.fromkeys(sorted(set(tape.categories)), 0)
    best: dict[str, int] = {"total": 0}
    total = host = 0
    for kind, number, *rest in tape.events:
        size = rest[0] if kind == "alloc" else -sizes.pop(number, 0)
        if kind == "alloc":
            sizes[number] = size
        now[tape.categories[number]] += size
        if tape.categories[number] == "host":
            host = max(host, now["host"])
            continue
        total += size
        if total > best["total"]:
            best = {"total": total, **now}
    return {**best, "host": host}


def measure(case: dict[str, Any]) -> dict[str, int]:
    """Run a case on this rank, and return its peaks in bytes, resident set size included."""
    vocabulary = {"vocabulary": 0}

    def label(tensor: Tensor, tag: str | None) -> str:
        found = category_of(tensor, vocabulary["vocabulary"])
        return found if tag is None else tag

    tape = Tape(label)
    tape.enabled = False
    before = [tensor for tensor in all_live_tensors() if tensor.device.type == "cpu"]
    for tensor in before:
        tape.ignore(tensor)
    offloaded = case["cpu_offload"] or bool(case["zero_optimization"].get("offload_param"))
    with watched(tape, offloaded):
        make = zero3_step if case["sharding"] == "zero3" else torch_step
        model, step, optimizer = make(case)
        vocabulary["vocabulary"] = MODELS[case["model"]].get("vocab_size", 50272)
        for _ in range(WARM_UP_STEPS):
            step()
        standing(tape, model, optimizer, "host" if offloaded else "weights")
        tape.enabled = True
        with tape:
            step()
        tape.enabled = False
    if case["sharding"] == "zero3":
        model.destroy()
    result = peak(tape)
    result["resident"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return result
