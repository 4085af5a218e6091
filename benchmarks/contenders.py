"""One training step each of Addax and of what it is held against, on the same model and data.

A step of Addax sees a long batch by two forward passes and a short one by forward and backward.

==========  ====================================================================================
addax       `Addax` under ZeRO-3.
clipped     The same with gradient clipping, which runs the first-order part twice.
accumulated The same with two micro-batches of each batch.
parts       What its step is made of, and nothing else: two forwards of the long batch under
            ``no_grad`` and forward and backward of the short one, under ZeRO-3 engines that gather
            and reduce-scatter, drop each reduced gradient and update nothing. Each kind of pass has
            an engine of its own, so that DeepSpeed's prefetching follows its recorded order.
sgd, adamw  torch's own in DeepSpeed's ZeRO-3 optimizer, with fp32 master weights. They go backward
            on the long batch too, since they would train on the same examples: two micro-batches of
            one step, which spares them the padding of a joint batch.
mezo        MeZO (arXiv 2305.17333), Algorithm 1: +eps, -2 eps, +eps in place with z from a reset
            generator, then the update with the same z; long batch only. It has no sharded form:
            each rank holds the whole model, and the loss difference is averaged over ranks.
lomo        LOMO (arXiv 2306.09782), Algorithm 1, on weights sharded by ZeRO-3: once backward has
            a parameter's gradient, it is all-reduced in full, as in the authors' code, and the
            rank's slice updates its shard. Without accumulation: a step on the long batch, then
            one on the short batch.
==========  ====================================================================================
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

import addax_ds  # noqa: F401  (registers the optimizer)
from benchmarks.common import SHAPES, random_model

LEARNING_RATE = 1e-3
ALPHA = 1e-3
EPSILON = 1e-3


@dataclass(frozen=True)
class Contender:
    """Phases of a step in their order, each of which returns the loss it saw."""

    phases: dict[str, Callable[[], float]]


def addax(shape: str, long: Tensor, short: Tensor) -> Contender:  # noqa: D103
    values = {"lr": LEARNING_RATE, "alpha": ALPHA, "zo_eps": EPSILON}
    engine, optimizer = _engine(shape, {"optimizer": {"type": "Addax", "params": values}})

    def zeroth_order() -> float:
        optimizer.measure(lambda: _loss(engine, long), None)
        return optimizer.optimizer.zeroth_order_loss

    return Contender({"zeroth_order": zeroth_order, "first_order": lambda: _train(engine, short)})


def clipped(shape: str, long: Tensor, short: Tensor) -> Contender:  # noqa: D103
    return _measured(shape, [long], [short], {"gradient_clipping": 0.1})


def accumulated(shape: str, long: Tensor, short: Tensor) -> Contender:  # noqa: D103
    return _measured(shape, list(long.chunk(2)), list(short.chunk(2)), {})


def _measured(
    shape: str, long: list[Tensor], short: list[Tensor], config: dict[str, Any]
) -> Contender:
    """Addax by `measure`, of which the phases cannot be told apart from outside."""
    values = {"lr": LEARNING_RATE, "alpha": ALPHA, "zo_eps": EPSILON}
    engine, optimizer = _engine(shape, {"optimizer": {"type": "Addax", "params": values}, **config})

    def step() -> float:
        loss = optimizer.measure(
            [lambda x=x: _loss(engine, x) for x in long],
            [lambda x=x: _loss(engine, x) for x in short],
        )
        engine.backward(loss)
        engine.step()
        return optimizer.optimizer.first_order_loss

    return Contender({"step": step})


def parts(shape: str, long: Tensor, short: Tensor) -> Contender:  # noqa: D103
    forward_engine, _ = _engine(shape, {})
    forward_engine.eval()
    engine, optimizer = _engine(shape, {"optimizer": {"type": "SGD", "params": {"lr": 0.0}}})

    def drop(parameters: list[nn.Parameter], shards: list[Tensor]) -> None:
        for parameter in parameters:
            parameter.grad = None

    # DeepSpeed's own would copy the shards into fp32, and its step would round master weights.
    optimizer.partition_grads = drop
    optimizer.step = optimizer._pre_step
    optimizer._global_grad_norm = 0.0
    for master in optimizer.fp32_partitioned_groups_flat:
        master.data = torch.empty(0)

    def zeroth_order() -> float:
        with torch.no_grad():
            losses = [_loss(forward_engine, long).item() for _ in range(2)]
        return losses[0]

    return Contender({"zeroth_order": zeroth_order, "first_order": lambda: _train(engine, short)})


def sgd(shape: str, long: Tensor, short: Tensor) -> Contender:  # noqa: D103
    return _stateful(shape, long, short, {"type": "SGD", "params": {"lr": LEARNING_RATE}})


def adamw(shape: str, long: Tensor, short: Tensor) -> Contender:  # noqa: D103
    values = {"lr": LEARNING_RATE, "torch_adam": True}
    return _stateful(shape, long, short, {"type": "AdamW", "params": values})


def _stateful(shape: str, long: Tensor, short: Tensor, optimizer: dict[str, Any]) -> Contender:
    config = {"optimizer": optimizer, "gradient_accumulation_steps": 2}
    engine, _ = _engine(shape, config)

    # The engine updates at the second micro-batch.
    return Contender({"long": lambda: _train(engine, long), "short": lambda: _train(engine, short)})


def mezo(shape: str, long: Tensor, short: Tensor) -> Contender:  # noqa: D103
    model = random_model(shape, long.device).eval()
    learning_rate = ALPHA * LEARNING_RATE  # as in Addax, whose zeroth-order part is so weighted
    seed = 0

    def add_z(scale: float) -> None:
        torch.manual_seed(seed)
        for parameter in model.parameters():
            z = torch.normal(
                0.0, 1.0, size=parameter.shape, dtype=parameter.dtype, device=parameter.device
            )
            parameter.add_(z, alpha=scale)

    @torch.no_grad()
    def step() -> float:
        nonlocal seed
        seed += 1
        add_z(EPSILON)
        loss_plus = _loss(model, long)
        add_z(-2 * EPSILON)
        loss_minus = _loss(model, long)
        add_z(EPSILON)
        difference = loss_plus - loss_minus
        dist.all_reduce(difference)
        g0 = difference.item() / dist.get_world_size() / (2 * EPSILON)
        add_z(-learning_rate * g0)
        return loss_plus.item()

    return Contender({"long": step})


def lomo(shape: str, long: Tensor, short: Tensor) -> Contender:  # noqa: D103
    engine, offload = _engine(shape, {})  # shards and gathers; there is no optimizer

    @torch.no_grad()
    def update(parameter: Any) -> None:
        dist.all_reduce(parameter.grad)
        gradient = parameter.grad.div_(dist.get_world_size()).view(-1)
        shard = parameter.ds_tensor
        start = shard.numel() * dist.get_rank()
        mine = gradient[start : start + shard.numel()]  # the last shard may be padded
        shard[: mine.numel()].add_(mine, alpha=-LEARNING_RATE)
        parameter.grad = None

    for parameter in engine.parameters():
        parameter.register_post_accumulate_grad_hook(update)

    def step(tokens: Tensor) -> float:
        loss = _loss(engine.module, tokens)  # the engine itself refuses to go backward
        loss.backward()
        offload.partition_all_parameters()  # what is still gathered is from before the update
        return loss.item()

    return Contender({"long": lambda: step(long), "short": lambda: step(short)})


CONTENDERS: dict[str, Callable[[str, Tensor, Tensor], Contender]] = {
    f.__name__: f for f in (addax, parts, sgd, adamw, mezo, lomo, clipped, accumulated)
}
USUAL = ("addax", "parts", "sgd", "adamw", "mezo", "lomo")


def zero_configuration(shape: str) -> dict[str, Any]:
    """ZeRO-3 as Trainer's "auto" configures it, except that backward gathers again.

    With DeepSpeed's default reuse distance a model this small would stay gathered from forward to
    backward; a large one does not.
    """
    hidden = SHAPES[shape]["hidden_size"]
    return {
        "stage": 3,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "reduce_bucket_size": hidden * hidden,
        "stage3_prefetch_bucket_size": int(0.9 * hidden * hidden),
        "stage3_param_persistence_threshold": 10 * hidden,
        "stage3_max_reuse_distance": 0,
    }


def _engine(shape: str, config: dict[str, Any]) -> tuple[Any, Any]:
    config = {
        "train_micro_batch_size_per_gpu": 1,  # DeepSpeed asks for it and only reports it
        "bf16": {"enabled": True},
        "zero_optimization": zero_configuration(shape),
        "zero_allow_untested_optimizer": True,  # torch's SGD is one
        **config,
    }
    device = torch.device(get_accelerator().current_device_name())
    model = random_model(shape, device)
    engine, wrapped, _, _ = deepspeed.initialize(model=model, config=config)
    return engine, wrapped


def _train(engine: Any, tokens: Tensor) -> float:
    loss = _loss(engine, tokens)
    engine.backward(loss)
    engine.step()
    return loss.item()


def _loss(model: Any, tokens: Tensor) -> Tensor:
    return model(input_ids=tokens, labels=tokens).loss
