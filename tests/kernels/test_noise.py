"""z against published answers of Philox, an independent scalar implementation, and statistics."""

import hashlib
import math
import struct

import numpy as np
import pytest
import torch

import addax_ds
from addax_ds.kernels import reference
from addax_ds.kernels.operation import STREAM_ROUNDING, STREAM_Z, Draw

# Random123 1.14, kat_vectors, "philox4x32 10": counter, key, result.
KNOWN_ANSWERS = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


def philox_scalar(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 in Python integers, from the paper's figure."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c0, 1 << 32)
        high1, low1 = divmod(0xCD9E8D57 * c2, 1 << 32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) % (1 << 32), (k1 + 0xBB67AE85) % (1 << 32)
    return [c0, c1, c2, c3]


def z_scalar(seed: int, step: int, pid: int, index: int) -> float:
    """z of one element by the documented mapping, with the exact functions in fp64.

    The package's polynomials approximate them to fp32 precision.
    """
    tile, row, lane = index >> 7, (index >> 4) & 7, index & 15
    key = [seed & 0xFFFFFFFF, seed >> 32]
    word = philox_scalar([tile * 16 + lane, pid, step, 0], key)[row >> 1]
    u = (2 * (word & 0xFFFF) + 1) / 2**17
    fraction = ((word >> 16) << 18 | 1 << 17) & 0xFFFFFFFF
    angle = struct.unpack("<i", struct.pack("<I", fraction))[0] / 2**31 * math.pi / 4
    radius = math.sqrt(-math.log(u))
    if row % 2 == 0:
        return (math.cos(angle) - math.sin(angle)) * radius * (-1 if word >> 31 else 1)
    return (math.cos(angle) + math.sin(angle)) * radius * (-1 if (word >> 30) & 1 else 1)


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_known_answers(counter, key, expected):
    words = reference.philox4x32(
        torch.tensor([counter[0]]), *counter[1:], key=key[0] | key[1] << 32
    )
    assert [word.item() for word in words] == expected
    assert philox_scalar(counter, key) == expected


@pytest.mark.parametrize(
    ("seed", "step", "pid", "start"),
    [(0, 0, 0, 0), (2**63 + 12345, 7, 3, 77), (5, 2**32 - 1, 2**32 - 1, 2**35 - 300)],
)
def test_z_follows_the_documented_mapping(seed, step, pid, start):
    z = addax_ds.gaussian(seed, step, pid, start, 300)
    expected = [z_scalar(seed, step, pid, start + i) for i in range(300)]
    assert z.dtype == torch.float32
    np.testing.assert_allclose(z.numpy(), expected, rtol=3e-6, atol=3e-6)


def test_bits_are_pinned():
    """A change of a single bit would end the resuming of old runs."""
    z = addax_ds.gaussian(1234, 5, "model.layers.0.weight", 100, 100_000)
    assert hashlib.sha256(z.numpy().tobytes()).hexdigest() == (
        "a01f598463b391a45e5ec7fd28edc2f3d709a499eedaf85bbb3701abba3a3aa4"
    )


def test_rounding_bits_are_pinned():
    """Those of stochastic rounding, for the same reason; half a word of Philox for each element."""
    draw = Draw(1234, 5, addax_ds.parameter_id("model.layers.0.weight"))
    words = reference.random_words(draw, 100, 100_000, STREAM_ROUNDING, torch.device("cpu"))
    bits = reference.rounding_bits(words, 100, 100_000)

    def scalar(index: int) -> int:
        tile, row, lane = index >> 7, (index >> 4) & 7, index & 15
        counter = [tile * 16 + lane, draw.parameter_id, 5, 1]
        word = philox_scalar(counter, [1234, 0])[row >> 1]
        return word >> 16 if row % 2 else word & 0xFFFF

    assert bits[:300].tolist() == [scalar(100 + i) for i in range(300)]
    assert hashlib.sha256(bits.numpy().tobytes()).hexdigest() == (
        "c71ad8849845eefddaa4982c4ff9ef59bfcc229450bc36d2aa8553531713bcf5"
    )


def test_any_slice_equals_that_part_of_the_whole():
    whole = addax_ds.gaussian(3, 4, "w", 0, 400_000)
    rng = np.random.default_rng(0)
    for _ in range(200):
        start, stop = sorted(rng.integers(0, 400_001, 2).tolist())
        part = addax_ds.gaussian(3, 4, "w", start, stop - start)
        assert torch.equal(part, whole[start:stop]), (start, stop)


def test_name_and_id_are_the_same_parameter():
    by_id = addax_ds.gaussian(1, 2, addax_ds.parameter_id("a.b"), 5, 50)
    assert torch.equal(addax_ds.gaussian(1, 2, "a.b", 5, 50), by_id)
    assert addax_ds.parameter_id("abc") == 0xBF1678BA  # SHA-256("abc") begins ba 78 16 bf


def test_seed_step_parameter_and_probe_give_other_z():
    arguments = [(1, 2, 3, 0), (2, 2, 3, 0), (1 + 2**32, 2, 3, 0), (1, 3, 3, 0), (1, 2, 4, 0)]
    draws = [addax_ds.gaussian(s, t, p, 0, 4096, probe=q) for s, t, p, q in arguments]
    draws.append(addax_ds.gaussian(1, 2, 3, 0, 4096, probe=1))
    correlation = torch.corrcoef(torch.stack(draws)) - torch.eye(len(draws))
    assert correlation.abs().max() < 5 / math.sqrt(4096)


def test_moments_and_tails_are_normal():
    n = 1 << 22
    z = addax_ds.gaussian(11, 0, "w", 0, n).double()
    assert abs(z.mean().item()) < 5 / math.sqrt(n)
    assert abs(z.square().mean().item() - 1) < 5 * math.sqrt(2 / n)
    assert abs(z.pow(3).mean().item()) < 5 * math.sqrt(15 / n)
    assert abs(z.pow(4).mean().item() - 3) < 5 * math.sqrt(96 / n)
    assert z.abs().max() <= 4.855
    ordered, _ = z.sort()
    expected = torch.special.ndtr(ordered)
    empirical = torch.arange(1, n + 1, dtype=torch.float64) / n
    assert (expected - empirical).abs().max() * math.sqrt(n) < 1.95  # Kolmogorov, p about 1e-3


def test_neighbours_are_uncorrelated():
    z = addax_ds.gaussian(12, 0, "w", 0, 1 << 20).double()
    for lag in (1, 2, 8, 15, 16, 17, 64, 128, 1024):
        correlation = (z[:-lag] * z[lag:]).mean().item()
        assert abs(correlation) < 5 / math.sqrt(len(z)), lag


def test_rounding_bits_are_uniform_and_not_those_of_z():
    words = {
        stream: reference.random_words(Draw(1, 2, 3), 0, 1 << 18, stream, torch.device("cpu"))
        for stream in (STREAM_Z, STREAM_ROUNDING)
    }
    bits = reference.rounding_bits(words[STREAM_ROUNDING], 0, 1 << 18).double()
    assert bits.min() >= 0
    assert bits.max() < 2**16
    counts = torch.histc(bits, bins=64, min=0, max=2**16)
    expected = len(bits) / 64
    chi_squared = ((counts - expected) ** 2 / expected).sum().item()
    assert chi_squared < 63 + 5 * math.sqrt(2 * 63)
    z = reference.normals(words[STREAM_Z], 0, 1 << 18).double()
    assert abs(torch.corrcoef(torch.stack((z, bits)))[0, 1]) < 5 / math.sqrt(len(bits))


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ((0, 0, 0, -1, 5), "outside"),
        ((0, 0, 0, 2**35 - 4, 5), "outside"),
        ((0, 2**32, 0, 0, 5), "step"),
        ((0, 0, 2**32, 0, 5), "parameter id"),
    ],
)
def test_slices_that_z_cannot_serve_are_refused(arguments, complaint):
    with pytest.raises(ValueError, match=complaint):
        addax_ds.gaussian(*arguments)


@pytest.mark.parametrize("probe", [-1, 2**31])
def test_probes_that_z_cannot_serve_are_refused(probe):
    with pytest.raises(ValueError, match=r"2 \* probe must lie in"):
        addax_ds.gaussian(0, 0, 0, 0, 5, probe=probe)
