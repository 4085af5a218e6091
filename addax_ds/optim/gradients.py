"""First-order gradients between their reduction and the update: accumulated, or measured."""

from collections.abc import Iterable

import torch
from torch import Tensor

from addax_ds.sharding.base import Shard


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
        held = self._sums.get(shard.parameter_id)
        if held is None:
            home = shard.data.device
            self._sums[shard.parameter_id] = gradient.to(home, torch.float32, copy=True)
        else:
            held += gradient.to(held.device)

    def take(self, shard: Shard, gradient: Tensor | None) -> Tensor | None:
        """Return the sum with a last gradient added, or None if there is neither; forget it."""
        held = self._sums.pop(shard.parameter_id, None)
        if held is None or gradient is None:
            return held if gradient is None else gradient
        return held.add_(gradient.to(held.device))

    def held(self, shard: Shard) -> Tensor | None:
        """Return the sum, which stays here."""
        return self._sums.get(shard.parameter_id)

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
