"""The operation that all kernels implement."""

import struct
from collections.abc import Sequence
from ctypes import c_float
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from torch import Tensor

STREAM_Z = 0
STREAM_ROUNDING = 1

_ROW = struct.Struct("<QqqIi")
_ALIGNMENT = 256  # elements: 512 bytes of 16-bit weights, as for tensors of torch on a GPU


@dataclass(frozen=True)
class Draw:
    """Key of a stream of random numbers: all of a counter but the element.

    Attributes:
        seed: 64-bit key.
        step: index of the step, 32 bits.
        parameter_id: 32 bits.
        probe: index of the direction within the step, 31 bits.
    """

    seed: int
    step: int
    parameter_id: int
    probe: int = 0


@dataclass(frozen=True, eq=False)
class Slice:
    """A slice of a parameter, as it is stored.

    Attributes:
        data: flat, contiguous; fp32, bf16 or fp16.
        parameter_id: 32 bits.
        start: flat index of the slice's first element in the unsharded parameter.
        index: of the parameter's flag among those for skipped updates.
    """

    data: Tensor
    parameter_id: int
    start: int
    index: int = 0

    @cached_property
    def row(self) -> bytes:
        """What kernels need to know, 32 bytes: address, start, count, id and index."""
        data = self.data
        return _ROW.pack(data.data_ptr(), self.start, data.numel(), self.parameter_id, self.index)

    @cached_property
    def room(self) -> int:
        """Elements that the slice takes in a buffer of several, so that each begins aligned."""
        return -(-self.data.numel() // _ALIGNMENT) * _ALIGNMENT


def unpacked(rows: bytes) -> list[tuple[int, ...]]:
    """Return address, start, count, id and index of each of several slices' rows."""
    return list(_ROW.iter_unpack(rows))


def offsets(slices: Sequence[Slice]) -> list[int]:
    """Return where each slice begins in one buffer of all of them, and the buffer's length."""
    return [0, *accumulate(each.room for each in slices)]


@dataclass(frozen=True)
class Operation:
    """The one operation, which perturbs and updates, besides its tensors and the place of a slice.

        out = round(weight * c0 - (gradient * c1 + (d[0] * c2[0] + d[1] * c2[1] + ...)))

        d[k] = z[k]                                                          if zo_eps is 0, else
        d[k] = round(weight + z[k] * zo_eps) - round(weight - z[k] * zo_eps)

    The latter is the realised difference. ``z[k]`` is the z of probe ``draw.probe + k``.
    ``round`` is to the weights' type, and an element that it would make NaN or infinite keeps its
    weight instead, bit for bit: no operation brings a number that is not finite into weights that
    hold none. The realised difference is what forward passes at +zo_eps and -zo_eps see of z, as
    weights are perturbed by this same operation. It is not divided by 2 ``zo_eps``; that belongs
    into ``c2``.

    Computed in fp32 without fused multiply-add, in exactly this order: directions are summed from
    the first to the last. A term whose coefficient is 0 (for ``c0``: 1; for the sum over
    directions: all of ``c2``) is left out. Within d, ``round`` is always to nearest.

    Attributes:
        draw: which rounding bits, and the z of the first direction. Where an operation covers
            slices of several parameters, each has its own id.
        c0: coefficient of the weight.
        c1: coefficient of the gradient.
        c2: coefficients of d, one for each direction; empty if that term is left out.
        zo_eps: scale of the perturbations whose difference d is; 0 if d is z.
        stochastic: round the result stochastically instead of to nearest; bf16 and fp16 only. Of
            its two neighbours in that type the one farther from zero is taken if 2**16 f, cut to an
            integer, plus 16 random bits reach 2**16, where f is the distance from the other one in
            units of the last place. Without bias, save that fp16 below 2**-17 has more bits to cut.

    All numbers are rounded to fp32 when an operation is made.
    """

    draw: Draw
    c0: float = 1.0
    c1: float = 0.0
    c2: tuple[float, ...] = ()
    zo_eps: float = 0.0
    stochastic: bool = False

    def __post_init__(self) -> None:
        for name in ("c0", "c1", "zo_eps"):
            object.__setattr__(self, name, c_float(getattr(self, name)).value)
        c2 = tuple(c_float(coefficient).value for coefficient in self.c2)
        object.__setattr__(self, "c2", c2 if any(c2) else ())
