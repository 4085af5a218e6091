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
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from addax_ds import kernels
from addax_ds.kernels import cpu, reference
from addax_ds.kernels.operation import Draw, Operation

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
CANONICAL_NAN = {torch.float32: 0x7FC00000, torch.bfloat16: 0x7FC0, torch.float16: 0x7E00}
MARGIN = 16
DRAW = Draw(1, 2, 3)

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


@pytest.fixture(scope="session")
def libraries(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("libraries")
    paths = {name: folder / f"{name}.so" for name in BUILDS}
    for name, flags in BUILDS.items():
        cpu._build([*cpu._command(), *flags], paths[name])
    return paths


@pytest.fixture(params=BUILDS)
def build(request, libraries, monkeypatch) -> str:
    """Let the module `cpu` work with one of the builds."""
    library = cpu.open_library(libraries[request.param])
    monkeypatch.setattr(cpu, "load", lambda: library)
    return request.param


def bits(tensor: Tensor) -> Tensor:
    return tensor.view(BITS[tensor.dtype])


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
        draw = Draw(rng.getrandbits(64), *(rng.getrandbits(n) for n in (32, 32, 31)))
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
        c2=rng.choice((0.0, 1e-3, -1.5, 400.0)),
        zo_eps=rng.choice((0.0, 1e-6, 1e-3, 0.3)),
        stochastic=dtype == torch.bfloat16 and rng.random() < 0.5,
    )
    weight = random_tensor(rng, count + 2 * MARGIN, dtype)
    gradient_type = rng.choice((None, torch.float32, dtype)) if operation.c1 else None
    gradient = None
    if gradient_type is not None:
        offset = rng.randrange(MARGIN)
        gradient = random_tensor(rng, count + MARGIN, gradient_type)[offset : offset + count]
    offset = rng.randrange(MARGIN)
    inside = slice(offset, offset + count)

    expected = weight.clone()
    reference.fused(expected[inside], weight[inside], gradient, operation, start)
    in_place = rng.random() < 0.5
    before = None if gradient is None else gradient.clone()
    out, source = weight.clone(), weight.clone()
    with threads(rng.choice((1, 2))):
        read = out if in_place else source
        module.fused(out[inside], read[inside], gradient, operation, start)
    case = (dtype, gradient_type, operation, start, count, offset, in_place)
    assert torch.equal(bits(out), bits(expected)), case  # its surroundings included
    assert torch.equal(bits(source), bits(weight)), case
    assert gradient is None or torch.equal(bits(gradient), bits(before)), case


def test_cpp_equals_the_reference_on_random_slices(build):
    check_random_slices(cpu, 1500, seed=sum(build.encode()))


def check_conversions(module: ModuleType) -> None:
    """Pass on every 16-bit weight unchanged, and round every tie and what is beside it."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for dtype, stochastic in (
        (torch.float16, False),
        (torch.bfloat16, False),
        (torch.bfloat16, True),
    ):
        weight = every.view(dtype)
        out = torch.empty_like(weight)
        module.fused(out, weight, None, Operation(DRAW, stochastic=stochastic), 0)
        expected = bits(weight).clone()
        expected[weight.isnan()] = CANONICAL_NAN[dtype]
        assert torch.equal(bits(out), expected), (dtype, stochastic)
    for dtype in (torch.float16, torch.bfloat16):
        values = ties(dtype)
        out = torch.full((len(values),), -0.0, dtype=dtype)
        module.fused(out, out, -values, Operation(DRAW, c1=1.0), 7)
        assert torch.equal(bits(out), bits(values.to(dtype))), dtype


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


@pytest.mark.parametrize(
    ("dtype", "stochastic"), [*((dtype, False) for dtype in WEIGHTS), (torch.bfloat16, True)]
)
def test_special_values(build, dtype, stochastic):
    largest = torch.finfo(dtype).max
    cases = [  # weight, gradient, what weight - gradient must be
        (math.nan, 0.0, math.nan),
        (1.0, math.nan, math.nan),
        (math.inf, math.inf, math.nan),
        (-math.inf, 1.0, -math.inf),
        (1.0, math.inf, -math.inf),
        (largest, -largest, math.inf),
        (-largest, largest, -math.inf),
        (-0.0, 0.0, -0.0),
        (0.0, 0.0, 0.0),
        (torch.finfo(dtype).smallest_normal / 4, 0.0, torch.finfo(dtype).smallest_normal / 4),
    ]
    weight, gradient, exact = (
        torch.tensor(column, dtype=dtype) for column in zip(*cases, strict=True)
    )
    expected = bits(exact).clone()
    expected[exact.isnan()] = CANONICAL_NAN[dtype]
    for module in (cpu, reference):
        out = torch.empty_like(weight)
        module.fused(out, weight, gradient, Operation(DRAW, c1=1.0, stochastic=stochastic), 9)
        assert torch.equal(bits(out), expected), module
        module.fused(out, weight, -gradient, Operation(DRAW, c1=-1.0, stochastic=stochastic), 9)
        assert torch.equal(bits(out), expected), module


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
        operation = Operation(DRAW, c1=0.1, c2=0.1, stochastic=True)
        kernels.fused(results[-1], weight, g, operation, 5)
    assert torch.equal(*results)


def test_tensors_must_be_contiguous():
    weight = torch.zeros(20)
    for out, source, gradient in (
        (weight[::2], torch.zeros(10), None),
        (torch.zeros(10), weight[::2], None),
        (torch.zeros(10), torch.zeros(10), weight[::2]),
    ):
        with pytest.raises(AssertionError):
            kernels.fused(out, source, gradient, Operation(DRAW, c1=1.0, c2=1.0), 0)
    with pytest.raises(AssertionError):
        kernels.gaussian(weight[::2], DRAW, 0)


# ---- Triton --------------------------------------------------------------------------------------


@needs_triton
def test_triton_equals_the_reference_under_the_interpreter(tmp_path):
    code = (
        "import tests.test_kernels as t; from addax_ds import kernels\n"
        "module = kernels.implementation('cpu'); assert module.__name__.endswith('gpu')\n"
        "t.check_random_slices(module, 150, seed=3); t.check_conversions(module)\n"
        "print('compared')"
    )
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env={**os.environ, "TRITON_INTERPRET": "1", "ADDAX_KERNELS": "triton"},
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
    )
    assert "compared" in result.stdout, result.stdout + result.stderr


@needs_triton
@pytest.mark.parametrize(
    ("weight", "gradient", "realised", "stochastic"),
    [
        (None, None, False, False),
        ("*i16", None, False, False),
        ("*i16", None, True, True),
        ("*i16", "*fp32", False, True),
        ("*i16", "*fp32", True, True),
        ("*i16", "*i16", True, True),
        ("*i16", "*i16", True, False),
        ("*fp16", "*fp16", False, False),
        ("*fp16", "*fp16", True, False),
        ("*fp32", "*fp32", False, False),
        ("*fp32", "*fp32", True, False),
    ],
)
def test_triton_compiles_without_fused_multiply_add(
    weight, gradient, realised, stochastic, tmp_path, monkeypatch
):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from addax_ds.kernels import gpu

    if weight is None:
        ptx = compiled(gpu.gaussian_kernel, {"out": "*fp32"}, {}, gpu.OPTIONS)
    else:
        types = {"out": weight, "weight": weight, "gradient": gradient}
        types |= {"c0": "fp32", "c1": "fp32", "c2": "fp32", "zo_eps": "fp32"}
        constants = {"STREAM_ROUNDING": 1, "HAS_D": True}
        constants |= {"REALISED": realised, "STOCHASTIC": stochastic}
        if gradient is None:
            constants["gradient"] = None
        ptx = compiled(gpu.fused_kernel, types, constants, gpu.OPTIONS)
        fusing = compiled(gpu.fused_kernel, types, constants, {"enable_fp_fusion": True})
        assert re.search(r"\bfma\.rn\.f32", fusing)
    # Conversions to 16 bits by hardware return another NaN than the reference.
    assert not re.search(r"\bfma\.|\.ftz|\bsqrt\.approx|\bmad\.rn|\bcvt\.rn\.b?f16", ptx)
    assert re.search(r"\bsqrt\.rn\.f32", ptx)


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
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
