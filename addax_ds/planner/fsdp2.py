"""FSDP2 during a pass: its rules for gathering, prefetching, resharding and reducing.

The rules are torch's (2.13): `FSDPParamGroup` and `_fsdp_collectives`. What a perturbed pass adds
is `addax_ds.sharding.fsdp2`.
"""

import math
from collections.abc import Collection

from typing_extensions import override

from addax_ds.planner.replay import BackEndPass, Ledger
from addax_ds.planner.shapes import ModelShape

_ROOT = -1


def fsdp2_shard(shape: ModelShape, ranks: int, parameters: Collection[int]) -> int:
    """Return the bytes of a rank's shards, which are rows, padded to as many on each rank."""
    elements = 0
    for parameter in parameters:
        rows, *rest = shape.sizes[parameter] or (1,)
        elements += math.ceil(rows / ranks) * math.prod(rest)
    return elements * shape.itemsize


class Fsdp2Pass(BackEndPass):
    """FSDP2 during one pass: each block a group, what is left with the root.

    Args:
        ledger: the account.
        shape: of the model.
        ranks: over which parameters are sharded.
        perturbed: whether what travels is a perturbed copy.
        gloo: whether gloo reduces, which copies what it is given.
        replicated: whether reduced gradients are summed over replicas, too; FSDP2 keeps them until
            the end of the backward (``_all_reduce_state``).
        offloaded: whether what travels comes from host memory.
    """

    def __init__(
        self,
        ledger: Ledger,
        shape: ModelShape,
        ranks: int,
        *,
        perturbed: bool,
        gloo: bool,
        replicated: bool,
        offloaded: bool,
    ) -> None:
        super().__init__(ledger)
        self._copied = perturbed or offloaded
        self._replicated, self._kept = replicated, 0
        self._gloo = gloo and ranks > 1
        self._ranks, self._perturbed = ranks, perturbed
        # Rotary embeddings in a list are blocks without parameters. Blocks that share parameters
        # are left to the root.
        pairs = zip(shape.blocks, shape.block_parameters, strict=True)
        blocks = [(module, own) for module, own in pairs if own and module in shape.separate]
        self._groups = {group: parameters for group, (_, parameters) in enumerate(blocks)}
        in_blocks = {p for parameters in self._groups.values() for p in parameters}
        self._groups[_ROOT] = tuple(p for p in range(len(shape.sizes)) if p not in in_blocks)
        self._shards = {g: fsdp2_shard(shape, ranks, ps) for g, ps in self._groups.items()}
        sizes = [numel * shape.itemsize for numel in shape.numels]
        self._largest = {
            g: max((sizes[p] for p in ps), default=0) for g, ps in self._groups.items()
        }
        self._modules = {module: group for group, (module, _) in enumerate(blocks)} | {0: _ROOT}
        self._owners = {p: group for group, parameters in self._groups.items() for p in parameters}
        self._whole: set[int] = set()
        self._travelling: set[int] = set()
        self._deferred = 0  # buffer of the last all-gather, which forward frees with the next
        self._gradients = dict.fromkeys(self._groups, 0)
        self._reduced = 0  # input of the last reduce-scatter, which the next one frees
        self._in_backward = False

    @override
    def fetch(self, module: int, is_forward: bool) -> None:
        group = self._modules.get(module)
        if group is None:
            return
        self._in_backward |= not is_forward
        self._unshard(group)
        if group in self._travelling:
            self._copy_out(group)
        if not is_forward:
            # Groups are done backward in the order in which forward left them: root first.
            following = len(self._groups) - 2 if group == _ROOT else group - 1
            if following >= 0:
                self._unshard(following)

    @override
    def release(self, module: int, is_forward: bool) -> None:
        group = self._modules.get(module)
        if group is None:
            return
        if not is_forward:
            self._reduce(group)
        elif not self._in_backward:  # a block that is recomputed stays
            if group == _ROOT:
                self._free_deferred()
            else:
                self._reshard(group)

    @override
    def gradient(self, parameter: int, size: int) -> None:
        self._gradients[self._owners[parameter]] += size

    @override
    def end(self) -> None:
        if self._in_backward:
            self._reduce(_ROOT)
        for group in list(self._whole):
            self._reshard(group)
        self._free_deferred()
        self.ledger.add("buckets", -self._reduced - self._kept)

    def _unshard(self, group: int) -> None:
        """Gather all of a group into one buffer (``foreach_all_gather``)."""
        if group in self._whole or group in self._travelling:
            return
        shard = self._shards[group]
        if self._ranks > 1:
            copies = shard if self._copied else 0
            self.ledger.add("gathered", copies)
            self.ledger.add("gathered", shard * self._ranks)
            self.ledger.add("gathered", -copies)
        self._travelling.add(group)

    def _copy_out(self, group: int) -> None:
        """Copy the buffer into the parameters (``wait_for_unshard``)."""
        self._travelling.discard(group)
        self._whole.add(group)
        buffer = self._shards[group] * self._ranks
        self.ledger.add("gathered", buffer)
        if self._ranks == 1 and self._copied:
            # All are perturbed at once; offloaded ones are copied one after the other.
            copies = buffer if self._perturbed else self._largest[group]
            self.ledger.add("gathered", copies)
            self.ledger.add("gathered", -copies)
        self._free_deferred()  # a local variable there keeps it until now
        if self._ranks == 1:
            return
        if self._in_backward:
            self.ledger.add("gathered", -buffer)
        else:
            self._deferred = buffer

    def _free_deferred(self) -> None:
        self.ledger.add("gathered", -self._deferred)
        self._deferred = 0

    def _reshard(self, group: int) -> None:
        self._whole.discard(group)
        self.ledger.add("gathered", -self._shards[group] * self._ranks)

    def _reduce(self, group: int) -> None:
        """Reduce-scatter a group's gradients (``post_backward``, ``foreach_reduce``)."""
        if group not in self._whole:
            return
        self._reshard(group)
        self.ledger.add("buckets", -self._reduced)
        self._reduced = self._shards[group] * self._ranks
        self.ledger.add("buckets", self._reduced)
        self.ledger.add("gradients", -self._gradients[group])
        self._gradients[group] = 0
        result = self._shards[group] + (self._reduced if self._gloo else 0)
        self.ledger.add("buckets", result)
        self.reduced(self._groups[group])
        if self._replicated:
            self._kept += self._shards[group]
            result -= self._shards[group]
        self.ledger.add("buckets", -result)
