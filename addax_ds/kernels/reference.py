"""The kernels in plain torch: the definition that every other implementation equals bit by bit.

One 32-bit word makes two normals by Box-Muller: the cosine half for an even row, the sine half for
an odd one (`noise` has the mapping). The transform uses only fp32 multiply, add and
correctly rounded square root, in a fixed order and without fused multiply-add, hence it is
bit-identical on every device that rounds as IEEE 754 asks.

Source of the generator: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011).
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from addax_ds.kernels.operation import STREAM_ROUNDING, STREAM_Z, Draw, Operation, Slice, offsets

_TILE = 128  # elements that share a tile: 16 lanes of 8 rows
_LANES = 16
_MASK = 0xFFFFFFFF
_SIGN = -(1 << 31)
_ROUNDS = 10
_MULTIPLIER = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)

# Box-Muller from one word: 16 low bits make the radius, 16 high bits the angle within an octant;
# the two top bits of the word's halves choose the signs. Polynomials fitted for fp32 (see above).
_RADIUS_BITS = 16
_RADIUS_SCALE = _RADIUS_BITS + 1
_SQRT_HALF_BITS = 0x3F3504F3  # fp32 bits of sqrt(1/2): the mantissa is reduced to [0.707, 1.414)
_LN2 = 0.6931471805599453
_LOG = (
    -0.11896100640296936,
    0.18667858839035034,
    -0.2049633264541626,
    0.24909743666648865,
    -0.3331450819969177,
    0.500011146068573,
    -1.0000009536743164,
)
_SIN = (0.008151647634804249, -0.16662481427192688, 0.9999985694885254)
_COS = (-0.001358591951429844, 0.041655026376247406, -0.4999985694885254, 1.0)
_ANGLE_UNIT = 0.78539816339744830962 / 2147483648.0  # pi / 4 over 2**31

# Magnitudes as fp32 bits. Halves have 13 bits less, and an exponent that counts from 112 less.
_INFINITY_BITS = 0x7F800000
_FP16_TOO_LARGE_BITS = 0x47800000  # 2**16
_FP16_NORMAL_BITS = 0x38800000  # 2**-14
_FP16_REBIAS = 112 << 23

_CHUNK_TILES = {"cpu": 1 << 10}  # keeps the intermediates of a chunk in a core's cache
_CHUNK_TILES_ACCELERATOR = 1 << 17


def gaussian(out: Tensor, draw: Draw, start: int) -> None:
    """Fill a flat fp32 tensor with the z of ``[start, start + len(out))``."""
    for low, high, first in chunks(start, out.numel(), out.device):
        words = random_words(draw, first, high - low, STREAM_Z, out.device)
        out[low:high] = normals(words, first, high - low)


def fused(
    slices: Sequence[Slice],
    operation: Operation,
    out: Tensor | None = None,
    gradients: Sequence[Tensor] | None = None,
    kept: Tensor | None = None,
) -> None:
    """See `addax_ds.kernels.fused`."""
    for number, (each, begin) in enumerate(zip(slices, offsets(slices), strict=False)):
        weight = each.data
        _fused_slice(
            weight if out is None else out[begin : begin + weight.numel()],
            weight,
            None if gradients is None else gradients[number],
            replace(operation, draw=replace(operation.draw, parameter_id=each.parameter_id)),
            each.start,
            None if kept is None else kept[each.index : each.index + 1],
        )


def _fused_slice(
    out: Tensor,
    weight: Tensor,
    gradient: Tensor | None,
    operation: Operation,
    start: int,
    kept: Tensor | None,
) -> None:
    device = weight.device
    for low, high, first in chunks(start, weight.numel(), device):
        count = high - low
        decrement = _sum_of_directions(weight[low:high], operation, first)
        if gradient is not None:
            part = gradient[low:high].to(torch.float32, copy=True).mul_(operation.c1)
            decrement = part if decrement is None else part.add_(decrement)
        value = weight[low:high].to(torch.float32, copy=True)
        if operation.c0 != 1.0:
            value.mul_(operation.c0)
        if decrement is not None:
            value.sub_(decrement)
        if operation.stochastic:
            words = random_words(operation.draw, first, count, STREAM_ROUNDING, device)
            bits = rounding_bits(words, first, count)
            rounded = _round_stochastically(value, bits, weight.dtype)
        else:
            rounded = value.to(weight.dtype)
        finite = rounded.isfinite()
        out[low:high] = torch.where(finite, rounded, weight[low:high])
        if kept is not None:
            kept.masked_fill_(~finite.all(), 1)


def chunks(start: int, count: int, device: torch.device) -> list[tuple[int, int, int]]:
    """Cut a slice at tile borders into ``(low, high, global index of low)`` pieces.

    ``low`` and ``high`` count from the beginning of the slice. Chunks bound the size of the
    intermediates; where they fall does not change a bit of the result.
    """
    size = _CHUNK_TILES.get(device.type, _CHUNK_TILES_ACCELERATOR) * _TILE
    pieces, low = [], 0
    while low < count:
        high = min(count, (start + low) // size * size + size - start)
        pieces.append((low, high, start + low))
        low = high
    return pieces


def random_words(draw: Draw, start: int, count: int, stream: int, device: torch.device) -> Tensor:
    """Return the Philox words of all tiles that ``[start, start + count)`` touches.

    Returns:
        int64 tensor ``(tiles, 4, 16)`` of values in ``[0, 2**32)``: tile, word, lane.
    """
    first = start // _TILE
    tiles = (start + count - 1) // _TILE - first + 1
    c0 = torch.arange(first * _LANES, (first + tiles) * _LANES, device=device)
    words = philox4x32(c0, draw.parameter_id, draw.step, (draw.probe << 1) | stream, draw.seed)
    return torch.stack([word.view(tiles, _LANES) for word in words], dim=1)


def philox4x32(c0: Tensor, c1: int, c2: int, c3: int, key: int) -> tuple[Tensor, ...]:
    """Philox4x32-10 of the counters ``(c0[i], c1, c2, c3)`` under a 64-bit key.

    Args:
        c0: int64 tensor of shape ``(n,)``, values in ``[0, 2**32)``.
        c1: second counter word.
        c2: third counter word.
        c3: fourth counter word.
        key: 64-bit key; its low half is the first key word.

    Returns:
        Four int64 tensors of shape ``(n,)`` with values in ``[0, 2**32)``.
    """
    # The words travel as two pairs, x = (c0, c2) to be multiplied and y = (c1, c3) to be mixed in;
    # a round hands them on crosswise, so that odd rounds hold both pairs in swapped order.
    x = torch.empty(2, c0.numel(), dtype=torch.int64, device=c0.device)
    y = torch.empty_like(x)
    x[0], x[1], y[0], y[1] = c0, c2, c1, c3
    multipliers = torch.tensor(_MULTIPLIER, device=c0.device)[:, None]
    swapped = multipliers.flip(0)
    k0, k1 = key & _MASK, (key >> 32) & _MASK
    for index in range(_ROUNDS):
        # 32 x 32 bits fit 64: int64 wraps, and the arithmetic shift's sign bits are masked off.
        product = x * (swapped if index & 1 else multipliers)
        torch.bitwise_right_shift(product, 32, out=x)
        x[0].bitwise_xor_(y[1]).bitwise_xor_(k0 if index & 1 else k1)
        x[1].bitwise_xor_(y[0]).bitwise_xor_(k1 if index & 1 else k0)
        x.bitwise_and_(_MASK)
        y = product.bitwise_and_(_MASK)
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return x[0], y[0], x[1], y[1]


def normals(words: Tensor, start: int, count: int) -> Tensor:
    """Turn words into the normals of ``[start, start + count)``, fp32 of shape ``(count,)``.

    ``words`` is what `random_words` returned for this very slice.
    """
    radius = _radius((words & ((1 << _RADIUS_BITS) - 1)).mul_(2).add_(1).to(torch.float32))
    shifted = (words >> _RADIUS_BITS).bitwise_left_shift_(_RADIUS_BITS + 2)
    angle = shifted.bitwise_or_(1 << (_RADIUS_BITS + 1)).to(torch.int32)  # wraps modulo 2**32
    theta = angle.to(torch.float32).mul_(_ANGLE_UNIT)
    square = theta * theta
    sine = _horner(square, _SIN).mul_(theta)
    cosine = _horner(square, _COS)
    bits = words.to(torch.int32)
    z = torch.empty(*words.shape[:2], 2, _LANES, dtype=torch.float32, device=words.device)
    z_bits = z.view(torch.int32)
    z_bits[:, :, 0] = (cosine - sine).mul_(radius).view(torch.int32) ^ (bits & _SIGN)
    z_bits[:, :, 1] = (cosine + sine).mul_(radius).view(torch.int32) ^ ((bits << 1) & _SIGN)
    return z.view(-1)[start % _TILE : start % _TILE + count]


def rounding_bits(words: Tensor, start: int, count: int) -> Tensor:
    """Return 16 uniform bits for each element of the slice, int32 of shape ``(count,)``."""
    bits = torch.stack((words & 0xFFFF, words >> 16), dim=2).to(torch.int32)
    return bits.view(-1)[start % _TILE : start % _TILE + count]


def _radius(n: Tensor) -> Tensor:
    """sqrt(-ln(n / 2**17)) for odd n < 2**17 in fp32, which is the radius over sqrt(2).

    The missing sqrt(2) comes from the angle: cosine - sine and cosine + sine have length sqrt(2).
    """
    bits = n.view(torch.int32)
    exponent = (bits - (_SQRT_HALF_BITS + (_RADIUS_SCALE << 23))) >> 23
    x = (bits - ((exponent + _RADIUS_SCALE) << 23)).view(torch.float32).sub_(1.0)
    squared = _horner(x, _LOG).mul_(x).sub_(exponent.to(torch.float32).mul_(_LN2))
    if squared.device.type == "cpu":
        # torch's vectorised fp32 sqrt is not correctly rounded on CPU; by way of fp64 it is.
        return squared.double().sqrt_().float()
    return squared.sqrt_()


def _horner(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    value = x * coefficients[0]
    for coefficient in coefficients[1:-1]:
        value.add_(coefficient).mul_(x)
    return value.add_(coefficients[-1])


def _sum_of_directions(weight: Tensor, operation: Operation, start: int) -> Tensor | None:
    """Return ``d[0] * c2[0] + d[1] * c2[1] + ...``, fp32; None without directions."""
    total = None
    for k, coefficient in enumerate(operation.c2):
        draw = replace(operation.draw, probe=operation.draw.probe + k)
        words = random_words(draw, start, weight.numel(), STREAM_Z, weight.device)
        d = normals(words, start, weight.numel())
        if operation.zo_eps != 0.0:
            d = _realised_difference(weight, d.mul_(operation.zo_eps))
        d.mul_(coefficient)
        total = d if total is None else total.add_(d)
    return total


def _realised_difference(weight: Tensor, shift: Tensor) -> Tensor:
    """Realised difference of weights shifted by ``+shift`` and ``-shift``, fp32."""
    wide = weight.float()
    seen = [(wide + shift).to(weight.dtype), (wide - shift).to(weight.dtype)]
    plus, minus = (torch.where(x.isfinite(), x, weight).float() for x in seen)
    return plus - minus


def _round_stochastically(value: Tensor, random: Tensor, dtype: torch.dtype) -> Tensor:
    """Round fp32 to bf16 or fp16, up with the probability that the dropped bits stand for.

    Args:
        value: fp32 tensor.
        random: int32 tensor of the same shape, uniform in [0, 2**16).
        dtype: bf16 or fp16.

    Returns:
        Tensor of that type; infinite where ``value`` is too large or NaN.
    """
    bits = value.view(torch.int32)
    magnitude = bits & ~_SIGN
    # Adding to the bits about to be dropped carries with just the probability they stand for.
    if dtype == torch.bfloat16:
        rounded = (magnitude.clamp_(max=_INFINITY_BITS) + random) >> 16
    else:
        magnitude.clamp_(max=_FP16_TOO_LARGE_BITS)
        normal = (magnitude - _FP16_REBIAS + (random >> 3)) >> 13
        # Below 2**-14 the unit is 2**-24; in units of 2**-40, 16 bits are to be dropped.
        fixed = magnitude.view(torch.float32).mul(2.0**40).to(torch.int64)
        subnormal = (fixed + random) >> 16
        rounded = torch.where(magnitude < _FP16_NORMAL_BITS, subnormal, normal)
    return (rounded | (bits >> 31 << 15)).to(torch.int16).view(dtype)
