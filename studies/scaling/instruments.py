"""Watches a trainer: the phases of its steps, and its collectives.

Every collective of torch.distributed, by whatever function DeepSpeed, FSDP2 or this package calls
it, passes through a method of `ProcessGroup`, and every wait for one through `Work.wait`. Both are
wrapped while the instruments are in place.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor
from torch.distributed import ProcessGroup, Work

from addax_ds.optim import step
from addax_ds.training.steps import StepMixin
from studies.collectives import ALL_GATHER, ALL_REDUCE, REDUCE_SCATTER, Traffic
from studies.scaling import phases
from studies.scaling.phases import PhaseTimer

_PHASES = {
    ALL_GATHER: phases.GATHER,
    REDUCE_SCATTER: phases.REDUCE,
    ALL_REDUCE: phases.REDUCE,
}

# Of each method the kind, and the place among its arguments of the whole tensors. A torch before
# 2.13 lacks the "single" ones.
_COLLECTIVES: dict[str, tuple[str, int]] = {
    "all_gather_single": (ALL_GATHER, 0),
    "all_gather_single_coalesced": (ALL_GATHER, 0),
    "allgather": (ALL_GATHER, 0),
    "allgather_coalesced": (ALL_GATHER, 0),
    "_allgather_base": (ALL_GATHER, 0),
    "allgather_into_tensor_coalesced": (ALL_GATHER, 0),
    "reduce_scatter_single": (REDUCE_SCATTER, 1),
    "reduce_scatter_single_coalesced": (REDUCE_SCATTER, 1),
    "reduce_scatter": (REDUCE_SCATTER, 1),
    "_reduce_scatter_base": (REDUCE_SCATTER, 1),
    "reduce_scatter_tensor_coalesced": (REDUCE_SCATTER, 1),
    "allreduce": (ALL_REDUCE, 0),
    "allreduce_coalesced": (ALL_REDUCE, 0),
}


@contextmanager
def instrumented(trainer: StepMixin, timer: PhaseTimer, traffic: Traffic) -> Iterator[None]:
    """Watch a trainer that is training, while the context lasts.

    Args:
        trainer: its engine, if it has one, exists.
        timer: gets the phases.
        traffic: gets the collectives of all groups.
    """
    engine: Any = trainer.model_wrapped
    optimizer = engine.optimizer if trainer.is_deepspeed_enabled else trainer.optimizer
    timed = [
        (step, "perturb", phases.PERTURB),
        (step, "apply_update", phases.UPDATE),
        (trainer, "micro_batch_loss", phases.FORWARD),
        (trainer.accelerator, "backward", phases.BACKWARD),
        (optimizer, "step", phases.UPDATE),
        (Work, "wait", phases.WAIT),
    ]
    if trainer.is_deepspeed_enabled:
        timed.append((engine, "backward", phases.BACKWARD))
    with ExitStack() as stack:
        for owner, name, phase in timed:
            stack.enter_context(_wrapped(owner, name, functools.partial(_timed, timer, phase)))
        for name, (kind, place) in _COLLECTIVES.items():
            if not hasattr(ProcessGroup, name):
                continue
            wrap = functools.partial(_counted, timer, traffic, kind, place)
            stack.enter_context(_wrapped(ProcessGroup, name, wrap))
        yield


def _timed(timer: PhaseTimer, phase: str, function: Callable) -> Callable:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with timer.phase(phase):
            return function(*args, **kwargs)

    return call


def _counted(
    timer: PhaseTimer, traffic: Traffic, kind: str, place: int, function: Callable
) -> Callable:
    @functools.wraps(function)
    def call(group: ProcessGroup, *args: Any, **kwargs: Any) -> Any:
        traffic.add(kind, group.size(), _bytes(args[place]))
        with timer.phase(_PHASES[kind]):
            return function(group, *args, **kwargs)

    return call


def _bytes(tensors: Any) -> int:
    if isinstance(tensors, Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(map(_bytes, tensors))


@contextmanager
def _wrapped(owner: Any, name: str, wrap: Callable[[Callable], Callable]) -> Iterator[None]:
    """Replace an attribute of a module, class or object by a wrapper of it."""
    # What a class holds under a name is not always what it gives, of which it could make a method.
    own = vars(owner).get(name)
    setattr(owner, name, wrap(getattr(owner, name)))
    try:
        yield
    finally:
        if own is None:
            delattr(owner, name)
        else:
            setattr(owner, name, own)
