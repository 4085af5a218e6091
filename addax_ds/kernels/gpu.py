"""The kernels in Triton.

They compute the bits of `reference`: under Triton's interpreter in every test run, and on a GPU in
``tests/gpu``, by hand (benchmarks/README.md says what has run). Compiled for compute capability 9.0
they hold no fused multiply-add and a correctly rounded square root; by Triton's defaults multiply
and add are fused.

A launch covers any number of slices, by a table of their addresses in the GPU's memory. A thread
has two counters, and each of them one element of a tile's eight rows. More would make wider loads,
and need so many registers that few threads run at once, where arithmetic is what takes time.

One direction, the usual case, has code of its own. Several are a loop at run time, so their number
changes neither the time to compile nor the registers: unrolled, 32 took three minutes.
"""

import functools
from collections.abc import Sequence
from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from addax_ds.kernels.operation import (
    STREAM_ROUNDING,
    STREAM_Z,
    Draw,
    Operation,
    Slice,
    offsets,
    unpacked,
)

OPTIONS = {"enable_fp_fusion": False, "num_warps": 4}
"""Compile options of the kernels; fusion would change the bits of z."""

_TILE = 128
_LANES = 16
# Counters of a program, eight elements each. The interpreter wants few programs.
BLOCK = 1 << 11 if triton.knobs.runtime.interpret else 1 << 8
# A row of the table of slices (`_table`).
FIRST_PROGRAM, WEIGHTS, OFFSET, GRADIENTS, FIRST_TILE, SKIPPED, COUNT, ID, INDEX = map(
    tl.constexpr, range(9)
)
COLUMNS = tl.constexpr(9)
TILE, LANES = tl.constexpr(_TILE), tl.constexpr(_LANES)


def gaussian(out: Tensor, draw: Draw, start: int) -> None:
    """See `addax_ds.kernels.gaussian`."""
    if out.numel() == 0:
        return
    with _device(out):
        gaussian_kernel[_grid(start, out.numel())](
            out, *_slice(start, out.numel()), *_counter(draw, STREAM_Z), BLOCK, **OPTIONS
        )


def fused(
    slices: Sequence[Slice],
    operation: Operation,
    out: Tensor | None = None,
    gradients: Sequence[Tensor] | None = None,
    kept: Tensor | None = None,
) -> None:
    """See `addax_ds.kernels.fused`."""
    weight = slices[0].data
    with _device(weight):
        place = weight.device, torch.cuda.current_stream().cuda_stream if weight.is_cuda else 0
        table, rows, programs = _table(
            b"".join([each.row for each in slices]),
            None if out is None else tuple(offsets(slices)),
            None if gradients is None else tuple(each.data_ptr() for each in gradients),
            *place,
        )
        if programs == 0:
            return
        directions = len(operation.c2)
        several = _coefficients(operation.c2, *place) if directions > 1 else None
        seed_low, seed_high, _, *rest = _counter(operation.draw, STREAM_Z)
        realised = directions > 0 and operation.zo_eps != 0.0
        fused_kernel[(programs,)](
            *(table, rows, None if out is None else _as_integers(out), kept),
            *(operation.c0, operation.c1, operation.c2[0] if directions else 0.0),
            *(several, directions, operation.zo_eps),
            *(seed_low, seed_high, *rest),
            *(STREAM_ROUNDING, directions > 0, realised, operation.stochastic),
            *(_TYPES[weight.dtype], None if gradients is None else _TYPES[gradients[0].dtype]),
            BLOCK,
            **OPTIONS,
        )


_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.int16, torch.float16: tl.float16}


@functools.lru_cache(maxsize=1 << 12)
def _table(
    rows: bytes,
    begins: tuple[int, ...] | None,
    gradients: tuple[int, ...] | None,
    device: torch.device,
    stream: int,
) -> tuple[Tensor, int, int]:
    """Return a table of slices, the number of its rows, and the programs that work on them.

    The columns of a row, by the names above: the first program of the slice, the address of its
    weights, its place in the output, the address of its gradient, its first tile, elements of that
    tile before the slice, its elements, and parameter id and index.

    The table holds numbers alone, so it serves until another set of slices has the same ones, and
    what comes again in every step (most of it) is copied to the GPU once. A stream has its own, as
    nothing would order its copy before the kernels of another one.

    Args:
        rows: `Slice.row` of each slice.
        begins: the slices' `offsets` in the output; None if the weights are overwritten.
        gradients: their addresses, or None.
        device: of the table.
        stream: handle of the stream that it is used on.
    """
    table: list[tuple[int, ...]] = []
    programs = 0
    for number, (address, start, count, parameter_id, index) in enumerate(unpacked(rows)):
        if count == 0:
            continue
        offset = 0 if begins is None else begins[number]
        gradient = 0 if gradients is None else gradients[number]
        place = _slice(start, count)
        table.append((programs, address, offset, gradient, *place, _signed(parameter_id), index))
        programs += _grid(start, count)[0]
    return _moved(torch.tensor(table, dtype=torch.int64), device), len(table), programs


@functools.lru_cache(maxsize=1 << 4)
def _coefficients(c2: tuple[float, ...], device: torch.device, stream: int) -> Tensor:
    """Return the coefficients of several directions on a device, copied once for a step.

    Args:
        c2: see `Operation`.
        device: of the result.
        stream: as of `_table`.
    """
    return _moved(torch.tensor(c2, dtype=torch.float32), device)


def _moved(numbers: Tensor, device: torch.device) -> Tensor:
    """Return numbers on a device; a GPU copies them from pinned memory, so nobody waits."""
    if device.type == "cuda":
        numbers = numbers.pin_memory()
    return numbers.to(device, non_blocking=True)


def _device(tensor: Tensor) -> torch.cuda.device | nullcontext:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def _grid(start: int, count: int) -> tuple[int]:
    tiles = (start + count - 1) // _TILE - start // _TILE + 1
    return (triton.cdiv(tiles * _LANES, BLOCK),)


def _slice(start: int, count: int) -> tuple[int, int, int]:
    """First tile, elements of it before the slice, elements of the slice."""
    return start // _TILE, start % _TILE, count


def _counter(draw: Draw, stream: int) -> tuple[int, ...]:
    """Seed (low, high) and the counter's words from the second on.

    As signed integers of 32 bits, since Triton compiles anew for every type of integer.
    """
    words = (draw.seed, draw.seed >> 32, draw.parameter_id, draw.step, draw.probe << 1 | stream)
    return tuple(map(_signed, words))


def _signed(word: int) -> int:
    return (word + (1 << 31)) % (1 << 32) - (1 << 31)


def _as_integers(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor


_SCALARS = (
    *("c0", "c1", "c2", "directions", "zo_eps", "first_tile", "skipped", "count"),
    *("seed_low", "seed_high", "parameter_id", "step", "probe_and_stream"),
)


@triton.jit(do_not_specialize=_SCALARS)
def gaussian_kernel(
    out: tl.tensor,
    first_tile: tl.tensor,
    skipped: tl.tensor,
    count: tl.tensor,
    seed_low: tl.tensor,
    seed_high: tl.tensor,
    parameter_id: tl.tensor,
    step: tl.tensor,
    probe_and_stream: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """Fill a slice with z; see `_slice` and `_counter` for the arguments."""
    local = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    element = (local // LANES) * TILE + local % LANES - skipped
    words = _words(local, first_tile, seed_low, seed_high, parameter_id, step, probe_and_stream)
    for i in tl.static_range(4):
        even, odd = _normals(words[i])
        first = element + 2 * LANES * i
        second = first + LANES
        tl.store(out + first, even, mask=(first >= 0) & (first < count))
        tl.store(out + second, odd, mask=(second >= 0) & (second < count))


@triton.jit(do_not_specialize=("rows", *_SCALARS))
def fused_kernel(
    table: tl.tensor,
    rows: tl.tensor,
    out: tl.tensor | None,
    kept: tl.tensor | None,
    c0: tl.tensor,
    c1: tl.tensor,
    c2: tl.tensor,
    several: tl.tensor | None,
    directions: tl.tensor,
    zo_eps: tl.tensor,
    seed_low: tl.tensor,
    seed_high: tl.tensor,
    step: tl.tensor,
    probe_and_stream: tl.tensor,
    STREAM_ROUNDING: tl.constexpr,
    HAS_D: tl.constexpr,
    REALISED: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    WEIGHT: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """An `Operation` over slices; see `_table` and `_counter`. The type int16 stands for bf16.

    One direction has its coefficient in ``c2``; those of several are in the GPU's memory.
    """
    program = tl.program_id(0)
    low, high = rows * 0, rows
    while high - low > 1:
        middle = (low + high) // 2
        is_later = tl.load(table + middle * COLUMNS + FIRST_PROGRAM) > program
        high = tl.where(is_later, middle, high)
        low = tl.where(is_later, low, middle)
    row = table + low * COLUMNS
    # Number of this program among those of the slice.
    first = program - tl.load(row + FIRST_PROGRAM).to(tl.int32)
    draw = (seed_low, seed_high, tl.load(row + ID).to(tl.int32), step)
    first_tile = tl.load(row + FIRST_TILE) + first.to(tl.int64) * (BLOCK // LANES)
    # Where the program's elements begin in the slice, and which of them are of it.
    begin = first.to(tl.int64) * (BLOCK * 8) - tl.load(row + SKIPPED)
    lowest = tl.maximum(-begin, 0).to(tl.int32)
    end = tl.minimum(tl.load(row + COUNT) - begin, BLOCK * 8).to(tl.int32)
    weight = tl.load(row + WEIGHTS).to(tl.pointer_type(WEIGHT)) + begin
    if out is None:  # noqa: SIM108 (an expression would hold two types)
        target = weight
    else:
        target = out + (tl.load(row + OFFSET) + begin)
    if GRADIENT is not None:
        gradient = tl.load(row + GRADIENTS).to(tl.pointer_type(GRADIENT)) + begin
    local = tl.arange(0, BLOCK)
    element = (local // LANES) * TILE + local % LANES
    if HAS_D and several is None:
        z_words = _words(local, first_tile, *draw, probe_and_stream)
    random_words = _words(local, first_tile, *draw, probe_and_stream | STREAM_ROUNDING)
    # All is read before anything is written: an update whose reads and writes took turns was up to
    # six times slower on an H100.
    weights = ()  # static loops are unrolled, so tuples may grow in them
    gradients = ()
    for number in tl.static_range(8):
        at = element + LANES * number
        mask = (at >= lowest) & (at < end)
        weights += (_read_once(weight + at, mask),)  # type: ignore[assignment]
        if GRADIENT is not None:
            gradients += (_read_once(gradient + at, mask),)  # type: ignore[assignment]
    if several is not None:
        # -0, to which every number, -0 too, adds as it is. Of -0.0 `tl.full` would make 0.
        zero = tl.full((BLOCK,), 0x80000000, tl.uint32).to(tl.float32, bitcast=True)
        sums = (zero, zero, zero, zero, zero, zero, zero, zero)
        for k in range(directions):
            words = _words(local, first_tile, *draw, probe_and_stream + 2 * k)
            sums = _plus(sums, words, weights, tl.load(several + k), zo_eps, REALISED)
    keeping = tl.zeros((BLOCK,), tl.int1)
    for i in tl.static_range(4):
        if HAS_D and several is None:
            z = _normals(z_words[i])
        for half in tl.static_range(2):
            at = element + LANES * (2 * i + half)
            mask = (at >= lowest) & (at < end)
            stored = weights[2 * i + half]  # type: ignore[var-annotated]
            wide = _widen(stored)
            value = wide * c0
            if several is not None:
                decrement = sums[2 * i + half]
            elif HAS_D:
                decrement = _term(z[half], wide, stored.dtype, c2, zo_eps, REALISED)
            if GRADIENT is not None:
                part = _widen(gradients[2 * i + half]) * c1
                if HAS_D:
                    part = part + decrement
                value = value - part
            elif HAS_D:
                value = value - decrement
            if STOCHASTIC:
                random = (random_words[i] >> 16) if half else (random_words[i] & 0xFFFF)
                rounded = _round_stochastically(value, random, stored.dtype)
            else:
                rounded = _round(value, stored.dtype)
            finite = _is_finite(_widen(rounded))
            tl.store(target + at, tl.where(finite, rounded, stored), mask=mask)
            keeping |= mask & ~finite
    if kept is not None:
        mark = kept + tl.load(row + INDEX)
        tl.store(mark + tl.zeros((BLOCK,), tl.int32), 1, mask=keeping)


@triton.jit
def _plus(
    sums: tl.tuple,
    words: tl.tuple,
    weights: tl.tuple,
    coefficient: tl.tensor,
    zo_eps: tl.tensor,
    REALISED: tl.constexpr,
) -> tl.tuple:
    """The sums of eight rows and the terms of one more direction."""
    longer = ()
    for i in tl.static_range(4):
        z = _normals(words[i])
        for half in tl.static_range(2):
            stored = weights[2 * i + half]
            term = _term(z[half], _widen(stored), stored.dtype, coefficient, zo_eps, REALISED)
            longer += (sums[2 * i + half] + term,)  # type: ignore[assignment]
    return longer


@triton.jit
def _term(
    z: tl.tensor,
    weight: tl.tensor,
    to: tl.constexpr,
    coefficient: tl.tensor,
    zo_eps: tl.tensor,
    REALISED: tl.constexpr,
) -> tl.tensor:
    """The term of a direction, of weights that were widened from a type."""
    if REALISED:
        return _realised_difference(weight, z * zo_eps, to) * coefficient
    else:
        return z * coefficient


@triton.jit
def _read_once(at: tl.tensor, mask: tl.tensor) -> tl.tensor:
    """Read past the L1 cache, which would keep what nothing reads again."""
    return tl.load(at, mask=mask, other=0, cache_modifier=".cg")


@triton.jit
def _words(
    local: tl.tensor,
    first_tile: tl.tensor,
    seed_low: tl.tensor,
    seed_high: tl.tensor,
    parameter_id: tl.tensor,
    step: tl.tensor,
    probe_and_stream: tl.tensor,
) -> tl.tuple:
    """The Philox words of counters: four blocks of uint32."""
    c0 = (local + first_tile.to(tl.int64) * LANES).to(tl.uint32)
    low = seed_low.to(tl.uint32, bitcast=True).to(tl.uint64)
    seed = (seed_high.to(tl.uint32, bitcast=True).to(tl.uint64) << 32) | low
    c1 = parameter_id.to(tl.uint32, bitcast=True)
    c2 = step.to(tl.uint32, bitcast=True)
    c3 = probe_and_stream.to(tl.uint32, bitcast=True)
    return tl.philox(seed, c0, c1, c2, c3)


@triton.jit
def _normals(word: tl.tensor) -> tl.tuple:
    """The normals of an even row (cosine half) and of the odd row after it."""
    angle = (((word >> 16) << 18) | (1 << 17)).to(tl.int32, bitcast=True)
    theta = angle.to(tl.float32) * 3.6572951981930078e-10  # pi / 4 over 2**31
    square = theta * theta
    sine = (square * 0.008151647634804249 - 0.16662481427192688) * square + 0.9999985694885254
    sine = sine * theta
    cosine = (square * -0.001358591951429844 + 0.041655026376247406) * square - 0.4999985694885254
    cosine = cosine * square + 1.0
    radius = _radius(word)
    even = ((cosine - sine) * radius).to(tl.uint32, bitcast=True) ^ (word & 0x80000000)
    odd = ((cosine + sine) * radius).to(tl.uint32, bitcast=True) ^ ((word << 1) & 0x80000000)
    return even.to(tl.float32, bitcast=True), odd.to(tl.float32, bitcast=True)


@triton.jit
def _radius(word: tl.tensor) -> tl.tensor:
    n = (((word & 0xFFFF) << 1) | 1).to(tl.int32, bitcast=True).to(tl.float32)
    bits = n.to(tl.int32, bitcast=True)
    exponent = (bits - (0x3F3504F3 + (17 << 23))) >> 23
    x = (bits - ((exponent + 17) << 23)).to(tl.float32, bitcast=True) - 1.0
    p = x * -0.11896100640296936 + 0.18667858839035034
    p = p * x - 0.2049633264541626
    p = p * x + 0.24909743666648865
    p = p * x - 0.3331450819969177
    p = p * x + 0.500011146068573
    p = p * x - 1.0000009536743164
    return tl.sqrt_rn(p * x - exponent.to(tl.float32) * 0.6931471805599453)


@triton.jit
def _widen(value: tl.tensor) -> tl.tensor:
    if value.dtype == tl.int16:
        bits = value.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
        return bits.to(tl.float32, bitcast=True)
    else:
        return value.to(tl.float32)


@triton.jit
def _realised_difference(weight: tl.tensor, shift: tl.tensor, to: tl.constexpr) -> tl.tensor:
    """The difference of weights shifted up and down in their own type."""
    return _seen(weight, weight + shift, to) - _seen(weight, weight - shift, to)


@triton.jit
def _seen(weight: tl.tensor, shifted: tl.tensor, to: tl.constexpr) -> tl.tensor:
    rounded = _widen(_round(shifted, to))
    return tl.where(_is_finite(rounded), rounded, weight)


@triton.jit
def _is_finite(value: tl.tensor) -> tl.tensor:
    return tl.abs(value) < float("inf")


@triton.jit
def _round(value: tl.tensor, to: tl.constexpr) -> tl.tensor:
    """Round fp32 to the nearest of a type; int16 stands for bf16, in which NaN becomes infinite."""
    if to == tl.int16:
        bits = value.to(tl.uint32, bitcast=True)
        return _round_stochastically(value, 0x7FFF + ((bits >> 16) & 1), to)
    else:
        return value.to(to)


@triton.jit
def _round_stochastically(value: tl.tensor, random: tl.tensor, to: tl.constexpr) -> tl.tensor:
    """See `reference`; int16 stands for bf16."""
    bits = value.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    if to == tl.int16:
        rounded = (tl.minimum(magnitude, 0x7F800000) + random) >> 16
    else:
        magnitude = tl.minimum(magnitude, 0x47800000)
        normal = (magnitude - 0x38000000 + (random >> 3)) >> 13
        small = tl.minimum(magnitude, 0x38800000).to(tl.float32, bitcast=True)
        subnormal = ((small * 1099511627776.0).to(tl.uint32) + random) >> 16  # 2**40
        rounded = tl.where(magnitude < 0x38800000, subnormal, normal)
    signed = (rounded | ((bits >> 16) & 0x8000)).to(tl.int16)
    return signed.to(to, bitcast=True)
