"""The random direction z: a pure function of (seed, step, parameter, global element index).

Every element draws its normal from a counter, never from generator state, so a rank can produce
the z of any slice of any parameter by itself, and 1, 2 or 64 ranks see the same z bit for bit.

The mapping (``docs/architecture.md``, "z") for the flat index ``i`` of the unsharded parameter::

    tile = i >> 7        row = (i >> 4) & 7        lane = i & 15
    counter = (tile * 16 + lane, parameter id, step, probe << 1 | stream)
    key     = (seed & 0xffffffff, seed >> 32)
    word    = Philox4x32-10(counter, key)[row >> 1]

``stream`` 0 is z, ``stream`` 1 holds the bits for stochastic rounding. One 32-bit word makes two
normals by Box-Muller: the cosine half for an even row, the sine half for an odd one. The transform
uses only fp32 multiply, add and correctly rounded square root, in a fixed order and without fused
multiply-add, hence it is bit-identical on every device that rounds as IEEE 754 asks.

Source of the generator: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011).
"""

import hashlib

import torch
from torch import Tensor

MAX_PARAMETER_ELEMENTS = 1 << 35
"""A counter word has 32 bits and serves 8 elements, so no parameter may be larger than this."""

STREAM_Z = 0
STREAM_ROUNDING = 1

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

_CHUNK_TILES = {"cpu": 1 << 10}  # keeps the intermediates of a chunk in a core's cache
_CHUNK_TILES_ACCELERATOR = 1 << 17


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
        probe: index of the direction within the step; Addax uses one, number 0.
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
    z = torch.empty(count, dtype=torch.float32, device=device)
    for low, high, first in chunks(start, count, z.device):
        words = random_words(seed, step, pid, first, high - low, STREAM_Z, probe, z.device)
        z[low:high] = normals(words, first, high - low)
    return z


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


def random_words(
    seed: int,
    step: int,
    pid: int,
    start: int,
    count: int,
    stream: int,
    probe: int,
    device: torch.device,
) -> Tensor:
    """Return the Philox words of all tiles that ``[start, start + count)`` touches.

    Returns:
        int64 tensor ``(tiles, 4, 16)`` of values in ``[0, 2**32)``: tile, word, lane.
    """
    first = start // _TILE
    tiles = (start + count - 1) // _TILE - first + 1
    c0 = torch.arange(first * _LANES, (first + tiles) * _LANES, device=device)
    words = philox4x32(c0, pid, step, (probe << 1) | stream, seed)
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


def _check_slice(start: int, count: int) -> None:
    if start < 0 or count < 0 or start + count > MAX_PARAMETER_ELEMENTS:
        raise ValueError(
            f"slice [{start}, {start + count}) lies outside [0, 2**35): z has counters for "
            f"{MAX_PARAMETER_ELEMENTS} elements of a parameter; split a larger one"
        )


def _check_word(what: str, value: int) -> None:
    if not 0 <= value <= _MASK:
        raise ValueError(f"{what} must lie in [0, 2**32), got {value}")
