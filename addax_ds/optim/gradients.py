"""First-order gradients between their reduction and the update: accumulated, or measured."""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum, auto

import torch
from torch import Tensor

from addax_ds.sharding.base import Shard, Sharding

Pairs = list[tuple[Shard, Tensor | None]]
"""Shards with their gradients, flat and as long as they; None where there is none."""


class Use(Enum):
    """Use of a gradient that has been reduced."""

    APPLY = auto()
    ACCUMULATE = auto()
    TAKE_NORM = auto()
    REFUSE = auto()


class FirstOrder:
    """The first-order part of a step: takes its gradients, and gives back what is to be applied.

    Args:
        sharding: the back end.
        loss_scale: factor of the loss, and of the gradients that arrive.
        max_grad_norm: see `Addax`.
        track_norm: see `Addax`.

    Attributes:
        norms: ||g1|| by parameter group, before clipping; empty until they are known.
        is_dropped: whether the part is left out, for a loss or a norm that is not finite.
        is_deferred: whether the last gradient is accumulated, too, and the sum is to be clipped
            and applied when the step is finished.
    """

    def __init__(
        self, sharding: Sharding, *, loss_scale: float, max_grad_norm: float, track_norm: bool
    ) -> None:
        self.loss_scale = loss_scale
        self.max_grad_norm = max_grad_norm
        self.norms: list[float] = []
        self.is_dropped = False
        self.is_deferred = False
        self._sharding = sharding
        self._use = Use.APPLY
        self._sums = GradientSums()
        self._squares = SquaredNorms()
        self._tracks_norm = track_norm  # until clipping has taken it

    # ---- gradients -----------------------------------------------------------------------------

    @contextmanager
    def used_to(self, use: Use) -> Iterator[None]:
        """Accumulate, measure or refuse the gradients that arrive in the body; see `Use`."""
        self._use = use
        yield
        # Not after an exception: what still arrives of a step that is given up is not applied.
        self._use = Use.APPLY

    def defer(self) -> None:
        """Accumulate the gradients of the last backward, too; see `is_deferred`."""
        self._use = Use.ACCUMULATE
        self.is_deferred = True

    def take(self, shards: Sequence[Shard], gradients: Sequence[Tensor]) -> Pairs:
        """Take averaged gradients as soon as they are reduced, and return what to apply now.

        Raises:
            RuntimeError: in a zeroth-order pass.
        """
        if self._use is Use.REFUSE:
            raise RuntimeError(
                f"{shards[0].name} got a gradient in a zeroth-order pass, whose weights are "
                "perturbed: a closure of the zeroth-order part computes a loss and runs no backward"
            )
        pairs = [
            (shard, gradient if (n := shard.data.numel()) == gradient.numel() else gradient[:n])
            for shard, gradient in zip(shards, gradients, strict=True)
        ]
        if self._use is Use.APPLY:
            return self._tracked([(shard, self._sums.take(shard, g)) for shard, g in pairs])
        if self._use is Use.TAKE_NORM:
            self._squares.add(pairs)
        else:
            for shard, gradient in pairs:
                self._sums.add(shard, gradient)
        return []

    def rest(self, shards: Iterable[Shard]) -> Pairs:
        """Return what to apply to shards that got nothing more: the sum, or no gradient."""
        return self._tracked([(shard, self._sums.take(shard, None)) for shard in shards])

    def drop(self) -> None:
        """Leave the part out of the step."""
        self.is_dropped = True
        self._sums.clear()

    # ---- norms ---------------------------------------------------------------------------------

    @property
    def norm(self) -> float:
        """||g1|| over all parameter groups, once `norms` are known."""
        return math.hypot(*self.norms)

    def clip(self) -> float | None:
        """Find the norm of g1, with one all-reduce, and drop the part if it is not finite.

        Returns:
            `Step.gradient_scale`, or None if the part was dropped.
        """
        held = ((shard, self._sums.held(shard)) for shard in self._sharding.shards())
        self._squares.add((shard, total) for shard, total in held if total is not None)
        squares = self.squares()
        self._sharding.sum_over_ranks(squares)
        self.norms = self._norms_of(squares.tolist())
        self._tracks_norm = False
        if not math.isfinite(self.norm):
            self.drop()
            return None
        # As torch's clip_grad_norm_.
        coefficient = min(1.0, self.max_grad_norm / (self.norm + 1e-6))
        return coefficient / self.loss_scale

    def squares(self) -> Tensor:
        """Return this rank's squared norms of what was applied or measured, and forget them.

        They are fp64, of shape ``(groups,)``; zeros if nobody asks for the norm.
        """
        return self._squares.take(len(self._sharding.group_elements), self._sharding.device)

    def end_tracking(self, squares: list[float]) -> None:
        """Know the norms of what was applied, if they are tracked, by `squares` of all ranks."""
        if self._tracks_norm:
            self.norms = self._norms_of(squares)

    def _tracked(self, pairs: Pairs) -> Pairs:
        if self._tracks_norm:
            self._squares.add(
                (shard, gradient) for shard, gradient in pairs if gradient is not None
            )
        return pairs

    def _norms_of(self, squares: list[float]) -> list[float]:
        """Norms of g1 by parameter group, of squares summed over ranks."""
        scale = self._sharding.replicas * self.loss_scale**2
        return [math.sqrt(square / scale) for square in squares]


class GradientSums:
    """Sums of the gradient shards of several micro-batches.

    They are kept in fp32, 4 bytes for each element that this rank holds, because a sum in bf16
    loses what later micro-batches add. This is what gradient accumulation costs; without it nothing
    is allocated here. They lie where the shards do, which with offload is in host memory.
    """

    def __init__(self) -> None:
        self._sums: dict[int, Tensor] = {}

    def add(self, shard: Shard, gradient: Tensor) -> None:
        """Add a gradient, flat and as long as the shard, which is copied."""
        held = self._sums.get(shard.index)
        if held is None:
            home = shard.data.device
            self._sums[shard.index] = gradient.to(home, torch.float32, copy=True)
        else:
            held += gradient.to(held.device)

    def take(self, shard: Shard, gradient: Tensor | None) -> Tensor | None:
        """Return the sum with a last gradient added, or None if there is neither; forget it."""
        held = self._sums.pop(shard.index, None)
        if held is None or gradient is None:
            return held if gradient is None else gradient
        return held.add_(gradient.to(held.device))

    def held(self, shard: Shard) -> Tensor | None:
        """Return the sum, which stays here."""
        return self._sums.get(shard.index)

    def clear(self) -> None:
        """Forget all sums."""
        self._sums.clear()


class SquaredNorms:
    """Squared 2-norms of this rank's gradient shards, by parameter group."""

    def __init__(self) -> None:
        self._norms: dict[int, list[Tensor]] = {}

    def add(self, pairs: Iterable[tuple[Shard, Tensor]]) -> None:
        """Take the norms of gradients, each of which is read once; on a GPU in few launches."""
        alike: dict[tuple, list[Tensor]] = {}
        for shard, gradient in pairs:
            key = shard.group, gradient.dtype, gradient.device
            alike.setdefault(key, []).append(gradient)
        for (group, *_), gradients in alike.items():
            norms = torch._foreach_norm(gradients, dtype=torch.float32)
            self._norms.setdefault(group, []).extend(norms)

    def take(self, groups: int, device: torch.device) -> Tensor:
        """Return the squared norms, fp64 of shape ``(groups,)``, and forget them."""
        squares = torch.zeros(groups, dtype=torch.float64, device=device)
        for group, norms in self._norms.items():
            of_group = torch.stack([norm.to(device) for norm in norms])
            squares[group] = of_group.double().square().sum()
        self._norms.clear()
        return squares


class SkippedUpdates:
    """Flags parameters in which a non-finite update was skipped.

    Args:
        names: of the trainable parameters, in their order.
    """

    def __init__(self, names: list[str]) -> None:
        self._names = names
        self._flags = torch.zeros(len(names), dtype=torch.int32)  # `flags` moves them

    def flags(self, device: torch.device) -> Tensor:
        """Return the flags, int32 of shape ``(parameters,)``, to be set to 1."""
        if self._flags.device != device:  # a model may be moved after it was attached
            self._flags = self._flags.to(device)
        return self._flags

    def any(self) -> Tensor:
        """Return 1 if a flag is set, int32 of shape ``()``, without a device sync."""
        return self._flags.any().to(torch.int32)

    def names(self) -> list[str]:
        """Return the names of the parameters whose flag is set."""
        return [name for name, flag in zip(self._names, self._flags.tolist(), strict=True) if flag]

    def clear(self) -> None:
        """Unset all flags."""
        self._flags.zero_()
