"""The random direction z: a pure function of (seed, step, parameter, global element index).

Every element draws its normal from a counter, never from generator state, so a rank can produce
the z of any slice of any parameter by itself, and 1, 2 or 64 ranks see the same z bit for bit.

The mapping (``docs/architecture.md``, "z") for the flat index ``i`` of the unsharded parameter::

    tile = i >> 7        row = (i >> 4) & 7        lane = i & 15
    counter = (tile * 16 + lane, parameter id, step, probe << 1 | stream)
    key     = (seed & 0xffffffff, seed >> 32)
    word    = Philox4x32-10(counter, key)[row >> 1]

``stream`` 0 is z, ``stream`` 1 holds the bits for stochastic rounding. `addax_ds.kernels` does the
arithmetic.
"""

import hashlib

import torch
from torch import Tensor

from addax_ds import kernels
from addax_ds.kernels.operation import Draw

MAX_PARAMETER_ELEMENTS = 1 << 35
"""A counter word has 32 bits and serves 8 elements, so no parameter may be larger than this."""


def parameter_id(name: str) -> int:
    """Return the stable 32-bit id of a canonical parameter name (first word of its SHA-256)."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")


def gaussian(
    seed: int,
    step: int,
    parameter: str | int,
    start: int,
    count: int,
    *,
    probe: int = 0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Return z for the elements ``[start, start + count)`` of a parameter.

    Args:
        seed: 64-bit seed of the run.
        step: index of the optimizer step, below 2**32.
        parameter: canonical name of the parameter, or its id (see `parameter_id`).
        start: flat index, in the unsharded parameter, of the first element.
        count: number of elements.
        probe: index of the direction within the step, below 2**31, counted from 0; a step has
            ``zo_directions`` of them.
        device: where the result is made.

    Returns:
        fp32 tensor of shape ``(count,)``, standard normal, |z| <= 4.855.

    Raises:
        ValueError: if the slice lies outside ``[0, 2**35)`` or a counter word would overflow.
    """
    pid = parameter_id(parameter) if isinstance(parameter, str) else parameter
    _check_slice(start, count)
    _check_word("step", step)
    _check_word("parameter id", pid)
    _check_word("2 * probe", 2 * probe)
    z = torch.empty(count, dtype=torch.float32, device=device)
    kernels.gaussian(z, Draw(seed, step, pid, probe), start)
    return z


def _check_slice(start: int, count: int) -> None:
    if start < 0 or count < 0 or start + count > MAX_PARAMETER_ELEMENTS:
        raise ValueError(
            f"slice [{start}, {start + count}) lies outside [0, 2**35): z has counters for "
            f"{MAX_PARAMETER_ELEMENTS} elements of a parameter; split a larger one"
        )


def _check_word(what: str, value: int) -> None:
    if not 0 <= value < 1 << 32:
        raise ValueError(f"{what} must lie in [0, 2**32), got {value}")
