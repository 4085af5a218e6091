"""The compiled kernels against the reference, bit by bit."""

import importlib.util
import math
import os
import platform
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from addax_ds import kernels
from addax_ds.kernels import cpu, reference
from addax_ds.kernels.operation import STREAM_ROUNDING, Draw, Operation, Slice
from tests.support.slices import fused

X86 = platform.machine() == "x86_64"
# Native width, AVX2 and SSE2 as on older processors, and a width for which there is no intrinsic.
BUILDS = {
    "native": [],
    **(
        {"avx2": ["-mno-avx512f"], "sse2": ["-mno-avx512f", "-mno-avx", "-mno-f16c"]} if X86 else {}
    ),
    "2-lanes": ["-DLANES=2"],
}
WEIGHTS = (torch.float32, torch.bfloat16, torch.float16)
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
ROUNDED = [(dtype, False) for dtype in WEIGHTS] + [(dtype, True) for dtype in WEIGHTS[1:]]
COEFFICIENTS = (0.0, 1e-3, -1.5, 400.0)
MARGIN = 16
DRAW = Draw(1, 2, 3)

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


@pytest.fixture(scope="session")
def libraries(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("libraries")


@pytest.fixture(params=BUILDS)
def build(request, libraries, monkeypatch) -> str:
    """Let the module `cpu` work with one of the builds."""
    path = libraries / f"{request.param}.so"
    if not path.exists():
        cpu._build([*cpu._command(), *BUILDS[request.param]], path)
    library = cpu.open_library(path)
    monkeypatch.setattr(cpu, "load", lambda: library)
    return request.param


def bits(tensor: Tensor) -> Tensor:
    return tensor.view(BITS[tensor.dtype])


def new_kept() -> Tensor:
    """A mark for kept weights that is not set; another number than 0, since that must stay."""
    return torch.tensor([7], dtype=torch.int32)


def random_tensor(rng: random.Random, count: int, dtype: torch.dtype) -> Tensor:
    """Ordinary numbers of some magnitude, or any bits at all: NaN, infinities, subnormals."""
    generator = torch.Generator().manual_seed(rng.randrange(2**63))
    if rng.random() < 0.3:
        info = torch.iinfo(BITS[dtype])
        low, high = info.min, info.max + 1
        return torch.randint(low, high, (count,), dtype=BITS[dtype], generator=generator).view(
            dtype
        )
    return (torch.randn(count, generator=generator) * 10 ** rng.uniform(-8, 5)).to(dtype)


def random_slice(rng: random.Random) -> tuple[int, int]:
    """Start and length, often at the edges of tiles, of blocks and of what z can serve."""
    edge = rng.choice((0, 16, 128, 256, 2048, 4096))
    count = max(0, edge + rng.randrange(-2, 3)) if rng.random() < 0.5 else rng.randrange(6000)
    if rng.random() < 0.02:
        count = rng.randrange(70_000, 100_000)  # enough for two threads
    last = 2**35 - count
    start = rng.choice((0, rng.randrange(300), rng.randrange(5000), rng.randrange(last), last))
    return start, count


def check_random_slices(module: ModuleType, number: int, seed: int) -> None:
    """Compare an implementation with the reference on random slices of everything."""
    rng = random.Random(seed)
    for _ in range(number):
        start, count = random_slice(rng)
        draw = Draw(rng.getrandbits(64), *(rng.getrandbits(n) for n in (32, 32, 30)))
        check_gaussian(module, draw, start, count, rng)
        check_fused(module, draw, start, count, rng)


@contextmanager
def threads(number: int) -> Iterator[None]:
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(1)


def check_gaussian(
    module: ModuleType, draw: Draw, start: int, count: int, rng: random.Random
) -> None:
    expected = torch.full((count + 2 * MARGIN,), math.inf)
    z = expected.clone()
    offset = rng.randrange(MARGIN)
    inside = slice(offset, offset + count)
    reference.gaussian(expected[inside], draw, start)
    with threads(rng.choice((1, 2))):
        module.gaussian(z[inside], draw, start)
    assert torch.equal(z, expected), (draw, start, count, offset)


def check_fused(module: ModuleType, draw: Draw, start: int, count: int, rng: random.Random) -> None:
    dtype = rng.choice(WEIGHTS)
    operation = Operation(
        draw,
        c0=rng.choice((1.0, 0.875)),
        c1=rng.choice((0.0, 0.1)),
        c2=tuple(rng.choice(COEFFICIENTS) for _ in range(rng.choice((0, 1, 1, 2, 3)))),
        zo_eps=rng.choice((0.0, 1e-6, 1e-3, 0.3)),
        stochastic=dtype != torch.float32 and rng.random() < 0.5,
    )
    weight = random_tensor(rng, count + 2 * MARGIN, dtype)
    gradient_type = rng.choice((None, torch.float32, dtype)) if operation.c1 else None
    gradient = None
    if gradient_type is not None:
        offset = rng.randrange(MARGIN)
        gradient = random_tensor(rng, count + MARGIN, gradient_type)[offset : offset + count]
    offset = rng.randrange(MARGIN)
    inside = slice(offset, offset + count)

    expected, expected_kept = weight.clone(), new_kept()
    fused(reference, expected[inside], weight[inside], gradient, operation, start, expected_kept)
    kept = rng.choice((None, new_kept()))
    in_place = rng.random() < 0.5
    before = None if gradient is None else gradient.clone()
    out, source = weight.clone(), weight.clone()
    with threads(rng.choice((1, 2))):
        read = out if in_place else source
        fused(module, out[inside], read[inside], gradient, operation, start, kept)
    case = (dtype, gradient_type, operation, start, count, offset, in_place)
    assert torch.equal(bits(out), bits(expected)), case  # its surroundings included
    assert kept is None or torch.equal(kept, expected_kept), case
    assert torch.equal(bits(source), bits(weight)), case
    assert gradient is None or torch.equal(bits(gradient), bits(before)), case


def check_many_directions(module: ModuleType) -> None:
    """Compare sums over many directions with the reference, and those of nothing but -0."""
    rng = random.Random(6)
    for dtype, stochastic in ROUNDED:
        for zo_eps, c1 in ((0.0, 0.1), (1e-3, 0.0)):
            c2 = tuple(rng.choice((*COEFFICIENTS, -2e-3)) for _ in range(33))
            operation = Operation(DRAW, 0.875, c1, c2, zo_eps, stochastic)
            weight, gradient = (random_tensor(rng, 300, dtype) for _ in range(2))
            results = torch.empty(2, 300, dtype=dtype)
            for out, each in zip(results, (reference, module), strict=True):
                fused(each, out, weight, gradient if c1 else None, operation, 5)
            assert torch.equal(*bits(results)), (dtype, operation)
    # Shifts that are rounded away leave d = 0 and terms of -0, and -0 - (-0) is 0.
    weight, sums = torch.full((300,), -1e6), torch.ones(300)
    for directions in (1, 2, 3):
        operation = Operation(DRAW, c0=0.0, c2=directions * (-1.0,), zo_eps=1e-6)
        fused(module, sums, weight, None, operation, 0)
        assert not bits(sums).any(), directions


def check_many_slices(module: ModuleType, number: int, seed: int) -> None:
    """Compare one call over slices of several parameters with the reference, one by one."""
    rng = random.Random(seed)
    for _ in range(number):
        dtype = rng.choice(WEIGHTS)
        stochastic = dtype != torch.float32 and rng.random() < 0.5
        draw = Draw(rng.getrandbits(64), 7, 0, rng.getrandbits(30))
        c1, zo_eps = rng.choice((0.0, 0.1)), rng.choice((0.0, 1e-3))
        operation = Operation(draw, 0.875, c1, (1e-3,), zo_eps, stochastic)
        gradient_type = rng.choice((dtype, torch.float32))
        slices, gradients, kept = [], [] if c1 else None, torch.zeros(9, dtype=torch.int32)
        for index in rng.sample(range(9), rng.randrange(1, 9)):
            start, count = random_slice(rng)
            offset = rng.choice((0, 0, rng.randrange(MARGIN)))  # often aligned
            stored = random_tensor(rng, count + MARGIN, dtype)[offset : offset + count]
            slices.append(Slice(stored, rng.getrandbits(32), start, index))
            if gradients is not None:
                gradients.append(torch.randn(count).to(gradient_type))
        buffer, parts = kernels.room_for(slices)
        expected_kept, expected = kept.clone(), []
        for at, each in enumerate(slices):
            expected.append(torch.empty_like(each.data))
            alone = [Slice(each.data, each.parameter_id, each.start, each.index)]
            gradient = None if gradients is None else [gradients[at]]
            reference.fused(alone, operation, expected[-1], gradient, expected_kept)
        module.fused(slices, operation, buffer, gradients, kept)
        for part, each in zip(parts, expected, strict=True):
            assert torch.equal(bits(part), bits(each))
        module.fused(slices, operation, None, gradients, kept)
        for each, result in zip(slices, expected, strict=True):
            assert torch.equal(bits(each.data), bits(result))
        assert torch.equal(kept, expected_kept)


def test_cpp_works_on_many_slices_at_once(build):
    check_many_slices(cpu, 100, seed=1)


def test_cpp_sums_over_many_directions(build):
    check_many_directions(cpu)


@pytest.mark.slow
def test_cpp_equals_the_reference_on_random_slices(build):
    check_random_slices(cpu, 1500, seed=sum(build.encode()))


def check_conversions(module: ModuleType) -> None:
    """Pass on every 16-bit weight unchanged, and round every tie and what is beside it."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for dtype, stochastic in ROUNDED[1:]:
        weight = every.view(dtype)
        out = torch.empty_like(weight)
        fused(module, out, weight, None, Operation(DRAW, stochastic=stochastic), 0)
        assert torch.equal(bits(out), every), (dtype, stochastic)
    for dtype in (torch.float16, torch.bfloat16):
        values = ties(dtype)
        out = torch.full((len(values),), -0.0, dtype=dtype)
        fused(module, out, out, -values, Operation(DRAW, c1=1.0), 7)
        expected = values.to(dtype)
        expected[expected.isinf()] = -0.0
        assert torch.equal(bits(out), bits(expected)), dtype


def stochastically_rounded(value: Tensor, random: Tensor, dtype: torch.dtype) -> Tensor:
    """What `Operation` defines, in float64; as if the type's numbers had no largest."""
    exact = value.double()
    smallest = torch.finfo(dtype).tiny
    exponent = torch.frexp(exact.abs().clamp(min=smallest)).exponent - 1
    unit = torch.finfo(dtype).eps * torch.ones_like(exact).ldexp(exponent)
    below = (exact.abs() / unit).floor()
    farther = ((exact.abs() / unit - below) * 2**16).floor() + random >= 2**16
    return (below + farther.double()) * unit * exact.sign()


def magnitudes(dtype: torch.dtype) -> Tensor:
    """Numbers of both signs: of all magnitudes, around the smallest normal and the largest."""
    generator = torch.Generator().manual_seed(5)
    info = torch.finfo(dtype)
    normal, largest = math.log2(info.tiny), math.log2(info.max)
    end = math.ceil(largest) - 1e-6
    ranges = ((normal - 20, end), (normal - 1, normal + 1), (2 * largest - end, end))
    exponents = [torch.empty(50_000).double().uniform_(*r, generator=generator) for r in ranges]
    values = torch.cat(exponents).exp2().float()
    return torch.stack([values, -values], dim=1).view(-1)


def check_stochastic_rounding(module: ModuleType) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        value = magnitudes(dtype)
        words = reference.random_words(DRAW, 5, len(value), STREAM_ROUNDING, value.device)
        random = reference.rounding_bits(words, 5, len(value))
        expected = stochastically_rounded(value, random, dtype)
        too_large = expected.abs() > torch.finfo(dtype).max
        assert 0.05 < too_large.double().mean() < 0.3
        expected[too_large] = 1.5
        out = torch.full((len(value),), 1.5, dtype=dtype)
        operation = Operation(DRAW, c0=0.0, c1=-1.0, stochastic=True)
        fused(module, out, out, value, operation, 5)
        assert torch.equal(out.double(), expected), dtype


def ties(dtype: torch.dtype) -> Tensor:
    """All numbers of a type, the ties between neighbours, and what lies next to those in fp32."""
    infinity = torch.tensor(math.inf, dtype=dtype).view(torch.int16).item()
    numbers = torch.arange(infinity + 1, dtype=torch.int16).view(dtype).double()
    numbers[-1] = 2 * numbers[-2] - numbers[-3]  # where infinity begins, were it a number
    middles = ((numbers[:-1] + numbers[1:]) / 2).float()
    beside = [bits(middles).add(n).view(torch.float32) for n in (-1, 0, 1)]
    values = torch.cat([numbers.float(), *beside])
    return torch.cat([values, -values])


def test_cpp_converts_every_16_bit_number_and_rounds_at_every_tie(build):
    check_conversions(cpu)


def test_cpp_rounds_stochastically_as_defined(build):
    check_stochastic_rounding(cpu)


def test_the_reference_rounds_stochastically_as_defined():
    check_stochastic_rounding(reference)


@pytest.mark.parametrize(("dtype", "stochastic"), ROUNDED)
def test_what_is_not_finite_keeps_the_weight_and_is_reported(build, dtype, stochastic):
    largest = torch.finfo(dtype).max
    tiny = torch.finfo(dtype).smallest_normal / 4
    cases = [  # weight, gradient, what comes of weight - gradient, whether it was kept
        (1.0, math.nan, 1.0, True),
        (-1.5, math.inf, -1.5, True),
        (1.5, -math.inf, 1.5, True),
        (largest, -largest, largest, True),
        (-largest, largest, -largest, True),
        (math.inf, math.inf, math.inf, True),
        (-math.inf, 1.0, -math.inf, True),
        (math.nan, 0.0, math.nan, True),
        (largest, 0.0, largest, False),
        (largest, largest, 0.0, False),
        (-0.0, 0.0, -0.0, False),
        (0.0, 0.0, 0.0, False),
        (-tiny, 0.0, -tiny, False),
    ]
    for module in (cpu, reference):
        for weight, gradient, expected, is_kept in cases:
            for sign in (1.0, -1.0):
                out, kept = torch.tensor([weight], dtype=dtype), new_kept()
                slope = torch.tensor([sign * gradient], dtype=dtype)
                operation = Operation(DRAW, c1=sign, stochastic=stochastic)
                fused(module, out, out, slope, operation, 9, kept)
                case = (module, weight, gradient)
                assert torch.equal(bits(out), bits(torch.tensor([expected], dtype=dtype))), case
                assert kept.item() == (1 if is_kept else 7), case


@pytest.mark.parametrize("dtype", WEIGHTS)
def test_the_bits_of_a_nan_that_is_kept_stay(build, dtype):
    signalling = {torch.float32: -0x7FFFFF, torch.bfloat16: -0x7F, torch.float16: -0x3FF}
    weight = torch.full((40,), signalling[dtype], dtype=BITS[dtype]).view(dtype)
    assert weight.isnan().all()
    for module in (cpu, reference):
        out = torch.empty_like(weight)
        fused(module, out, weight, torch.ones(40), Operation(DRAW, c1=1.0, c2=(1.0,)), 0)
        assert torch.equal(bits(out), bits(weight)), module


def test_one_kept_element_is_reported_wherever_it_is(build):
    """In whole vectors and in the rest of one, in the first block and the last, on any thread."""
    for start, count in ((0, 1), (3, 37), (2040, 4100)):
        gradient = torch.zeros(count)
        for at in {*range(min(count, 70)), *range(max(count - 70, 0), count)}:
            gradient[at] = math.nan
            out, kept = torch.ones(count), new_kept()
            fused(cpu, out, out, gradient, Operation(DRAW, c1=1.0), start, kept)
            gradient[at] = 0.0
            assert kept.item() == 1, (start, count, at)
            assert torch.equal(out, torch.ones(count))
    gradient = torch.zeros(400_000)
    gradient[-1] = math.nan
    with threads(2):
        for expected in (1, 7):
            kept = new_kept()
            fused(cpu, gradient, gradient, gradient, Operation(DRAW, c1=1.0), 0, kept)
            assert kept.item() == expected
            gradient[-1] = 0.0


def check_nan_gradients(module: ModuleType) -> None:
    """NaNs of both signs, the ones with most payload included, to which nothing may be added."""
    nans = torch.tensor([0x7FFFFFFF, -1, 0x7FFF8000, 0x7FC00000, -0x400000], dtype=torch.int32)
    gradient = nans.repeat(1000).view(torch.float32)
    for dtype, stochastic in ROUNDED:
        out, kept = torch.ones(5000, dtype=dtype), new_kept()
        fused(module, out, out, gradient, Operation(DRAW, c1=1.0, stochastic=stochastic), 0, kept)
        assert torch.equal(out, torch.ones(5000, dtype=dtype)), (dtype, stochastic)
        assert kept.item() == 1


def test_no_nan_is_rounded_into_a_number(build):
    check_nan_gradients(cpu)


def check_elements_beside_a_slice(module: ModuleType) -> None:
    """One element that stays finite, in a tile whose others would not if they were computed."""
    z = torch.empty(128)
    reference.gaussian(z, DRAW, 0)
    at = z.abs().argmin().item()
    weight, kept = torch.zeros(1, dtype=torch.float16), new_kept()
    fused(module, weight, weight, None, Operation(DRAW, c2=(-6e4 / z[at].item(),)), at, kept)
    assert weight.item() == pytest.approx(6e4, rel=1e-3)
    assert kept.item() == 7


def test_what_is_beside_a_slice_is_not_reported(build):
    check_elements_beside_a_slice(cpu)


def check_overflowing_passes(module: ModuleType) -> None:
    """Compare d with what two passes see of weights that one of the two would overflow."""
    for dtype in WEIGHTS:
        largest = torch.finfo(dtype).max
        zo_eps = largest / 64
        weight = torch.full((3000,), largest, dtype=dtype)
        weight[::2].neg_()
        plus, minus = torch.empty_like(weight), torch.empty_like(weight)
        for seen, sign in ((plus, 1), (minus, -1)):
            fused(module, seen, weight, None, Operation(DRAW, c2=(-sign * zo_eps,)), 3)
            assert seen.isfinite().all()
        assert ((plus == weight) ^ (minus == weight)).double().mean() > 0.9
        exact = weight.double() - 0.125 * (plus.double() - minus.double())
        inside = exact.abs() <= largest
        assert 0.4 < inside.double().mean() < 0.6
        out = torch.empty_like(weight)
        fused(module, out, weight, None, Operation(DRAW, c2=(0.125,), zo_eps=zo_eps), 3)
        assert torch.equal(out, torch.where(inside, exact.to(dtype), weight)), dtype


def test_the_realised_difference_is_what_two_passes_see_where_weights_overflow(build):
    check_overflowing_passes(cpu)


@pytest.mark.parametrize(
    "check",
    [
        partial(check_many_slices, number=5, seed=2),
        check_many_directions,
        check_nan_gradients,
        check_elements_beside_a_slice,
        check_overflowing_passes,
    ],
)
def test_the_reference_too(check):
    check(reference)


def test_ten_million_samples_are_normal():
    n, n_bins = 10_000_000, 1000
    z = torch.empty(n)
    cpu.gaussian(z, Draw(seed=20, step=1, parameter_id=7), 12345)
    uniform = torch.special.ndtr(z.double())
    counts = torch.histc(uniform, n_bins, 0, 1)
    chi_squared = ((counts - n / n_bins) ** 2 / (n / n_bins)).sum().item()
    assert abs(chi_squared - n_bins) < 5 * math.sqrt(2 * n_bins)
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        mean = z.double().pow(power).mean().item()
        assert abs(mean - moment) < 5 * math.sqrt(variance / n), power
    beyond = (z.abs() > 4).sum().item() / n
    assert beyond == pytest.approx(6.334e-5, rel=0.2)


@pytest.mark.parametrize("gradient_type", [torch.float64, torch.float16])
def test_a_gradient_of_another_type_counts_as_fp32(gradient_type):
    weight = torch.randn(300, generator=torch.Generator().manual_seed(1)).bfloat16()
    gradient = torch.randn(300, generator=torch.Generator().manual_seed(2)).to(gradient_type)
    results = []
    for g in (gradient, gradient.float()):
        results.append(torch.empty_like(weight))
        operation = Operation(DRAW, c1=0.1, c2=(0.1,), stochastic=True)
        fused(kernels, results[-1], weight, g, operation, 5)
    assert torch.equal(*results)


def test_tensors_must_be_contiguous():
    weight = torch.zeros(20)
    for out, source, gradient in (
        (weight[::2], torch.zeros(10), None),
        (torch.zeros(10), weight[::2], None),
        (torch.zeros(10), torch.zeros(10), weight[::2]),
    ):
        with pytest.raises(AssertionError):
            fused(kernels, out, source, gradient, Operation(DRAW, c1=1.0, c2=(1.0,)), 0)
    with pytest.raises(AssertionError):
        kernels.gaussian(weight[::2], DRAW, 0)


@pytest.mark.parametrize("kept", [torch.zeros(1), torch.zeros(0, dtype=torch.int32)])
def test_marks_for_kept_weights_are_int32_and_one_for_each_slice(kept):
    weight = torch.zeros(20)
    with pytest.raises(AssertionError):
        fused(kernels, weight, weight, None, Operation(DRAW), 0, kept)


def test_fp32_is_not_rounded_stochastically():
    weight = torch.zeros(20)
    with pytest.raises(AssertionError):
        fused(kernels, weight, weight, None, Operation(DRAW, stochastic=True), 0)


# ---- Triton --------------------------------------------------------------------------------------


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize(
    "checks",
    [
        (
            "t.check_random_slices(module, 8, seed=3); t.check_many_slices(module, 2, seed=4)\n"
            "t.check_nan_gradients(module); t.check_elements_beside_a_slice(module)\n"
        ),
        (
            "t.check_conversions(module); t.check_stochastic_rounding(module)\n"
            "t.check_overflowing_passes(module)\n"
        ),
        "t.check_many_directions(module)\n",
    ],
    ids=["slices", "roundings", "directions"],
)
def test_triton_equals_the_reference_under_the_interpreter(checks):
    code = (
        "import tests.kernels.test_kernels as t; from addax_ds import kernels\n"
        "module = kernels.implementation('cpu'); assert module.__name__.endswith('gpu')\n"
        f"{checks}"
        "print('compared')"
    )
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env={**os.environ, "TRITON_INTERPRET": "1", "ADDAX_KERNELS": "triton"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert "compared" in result.stdout, result.stdout + result.stderr


@needs_triton
@pytest.mark.parametrize(
    ("weight", "gradient", "directions", "realised", "stochastic", "kept"),
    [
        (None, None, 1, False, False, None),
        ("*i16", None, 1, False, False, None),
        ("*i16", None, 1, True, True, "*i32"),
        ("*i16", "*fp32", 1, False, True, "*i32"),
        ("*i16", "*fp32", 2, True, True, "*i32"),
        ("*i16", "*i16", 0, False, True, "*i32"),
        ("*i16", "*i16", 1, True, False, None),
        ("*fp16", "*fp16", 1, False, False, "*i32"),
        ("*fp16", "*fp32", 1, True, True, None),
        ("*fp32", "*fp32", 1, False, False, None),
        ("*fp32", None, 2, False, False, None),
        ("*fp32", "*fp32", 1, True, False, "*i32"),
    ],
)
@pytest.mark.slow
def test_triton_compiles_without_fused_multiply_add(
    weight, gradient, directions, realised, stochastic, kept, tmp_path, monkeypatch
):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from addax_ds.kernels import gpu

    if weight is None:
        ptx = compiled(gpu.gaussian_kernel, {"out": "*fp32"}, {}, gpu.OPTIONS)
    else:
        out = weight if kept is None else None  # both of these, with a gradient or without one
        types = {"table": "*i64", "out": out, "kept": kept}
        types |= {"c0": "fp32", "c1": "fp32", "c2": "fp32", "zo_eps": "fp32"}
        types |= {"several": "*fp32" if directions > 1 else None}
        constants = {"STREAM_ROUNDING": 1, "HAS_D": directions > 0}
        constants |= {"REALISED": realised, "STOCHASTIC": stochastic}
        constants |= {"WEIGHT": element(weight), "GRADIENT": gradient and element(gradient)}
        constants |= {name: None for name in ("out", "kept", "several") if types[name] is None}
        ptx = compiled(gpu.fused_kernel, types, constants, gpu.OPTIONS)
        if not realised and gradient is None:  # the search finds what Triton does by default
            fusing = compiled(gpu.fused_kernel, types, constants, {"enable_fp_fusion": True})
            assert re.search(r"\bfma\.rn\.f32", fusing)
    assert not re.search(r"\bfma\.|\.ftz|\bsqrt\.approx|\bmad\.rn", ptx)
    assert bool(re.search(r"\bsqrt\.rn\.f32", ptx)) == bool(directions)  # IP-SGD draws no z


@needs_triton
def test_triton_compiles_no_kernel_for_each_number_of_directions(monkeypatch):
    """Unrolled, 32 directions took three minutes to compile, and 1024 are allowed."""
    from addax_ds.kernels import gpu

    kernel, launches = gpu.fused_kernel, []

    class Launcher:
        def __getitem__(self, grid):
            return lambda *arguments, **options: launches.append(arguments)

    monkeypatch.setattr(gpu, "fused_kernel", Launcher())
    weight = torch.zeros(300)
    for directions in (2, 16, 1024):
        coefficients = tuple(range(1, directions + 1))
        fused(gpu, weight, weight, None, Operation(DRAW, c2=coefficients, zo_eps=1e-3), 0)
        given = dict(zip(kernel.arg_names, launches[-1], strict=True))
        assert given["directions"] == directions
        assert given["several"].tolist() == list(coefficients)
    first, *others = [compiled_for(kernel, arguments) for arguments in launches]
    assert all(other == first for other in others)


def compiled_for(kernel: Any, arguments: tuple) -> list:
    """What Triton compiles a launch for: types, and values unless it is told to ignore them."""
    return [
        value
        if parameter.is_constexpr or not (isinstance(value, Tensor) or parameter.do_not_specialize)
        else getattr(value, "dtype", type(value))
        for parameter, value in zip(kernel.params, arguments, strict=True)
    ]


def element(pointer: str) -> Any:
    """The type in Triton that a pointer of its signatures points to."""
    import triton.language as tl

    return {"*i16": tl.int16, "*fp16": tl.float16, "*fp32": tl.float32}[pointer]


def compiled(kernel, types: dict, constants: dict, options: dict) -> str:
    """PTX of a kernel for compute capability 9.0."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from addax_ds.kernels import gpu

    constants = {**constants, "BLOCK": gpu.BLOCK}
    signature = {
        name: "constexpr" if name in constants else types.get(name, "i32")
        for name in kernel.arg_names
    }
    # As at run time, where addresses that the allocator gives are multiples of 16.
    pointers = [i for i, kind in enumerate(signature.values()) if str(kind).startswith("*")]
    attributes = {(i,): [["tt.divisibility", 16]] for i in pointers}
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
