"""The Triton kernels on a GPU against the definition on the CPU, bit by bit."""

import math
import random

import pytest
import torch
from torch import Tensor

import addax_ds
from addax_ds import kernels
from addax_ds.kernels import reference
from addax_ds.kernels.operation import Draw, Operation, Slice
from tests.support.slices import fused

BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def bits(tensor: Tensor) -> Tensor:
    return tensor.cpu().view(BITS[tensor.dtype])


def test_triton_serves_the_gpu():
    assert kernels.implementation("cuda").__name__ == "addax_ds.kernels.gpu"


# Directions, zo_eps, gradient (of the weights' type, or wider), stochastic rounding.
KINDS = [
    (1, 0.0, None, False),  # perturbation
    (1, 1e-3, None, True),  # MeZO
    (0, 1e-3, "same", True),  # in-place SGD
    (1, 1e-3, "same", True),  # Addax
    (1, 0.0, "fp32", False),  # Addax on fp32 weights
    (3, 1e-3, "fp32", True),  # from sums over micro-batches
    (33, 1e-3, None, True),  # MeZO along many directions
]


@pytest.mark.parametrize("dtype", BITS)
def test_a_thousand_random_slices(dtype):
    """Each kind is compiled, which takes longer than all else here."""
    rng, generator = random.Random(1), torch.Generator().manual_seed(1)
    for turn in range(1000):
        directions, zo_eps, gradient_type, stochastic = KINDS[turn % len(KINDS)]
        count, start = rng.randrange(1, 5000), rng.randrange(2**35 - 5000)
        offset = rng.randrange(16)  # from the alignment of an allocation
        stored = torch.randn(offset + count, generator=generator).mul_(0.1).to(dtype)
        gradient = None
        if gradient_type is not None:
            gradient = torch.randn(count, generator=generator)
            gradient = gradient.to(dtype if gradient_type == "same" else torch.float32)
            if rng.random() < 0.5:
                gradient[rng.randrange(count)] = math.inf
        operation = Operation(
            Draw(rng.randrange(2**64), rng.randrange(2**32), rng.randrange(2**32)),
            c0=rng.choice((1.0, 0.99)),
            c1=0.0 if gradient is None else 1e-3,
            c2=(11 * (1e-3, -2e-3, 0.0))[:directions],
            zo_eps=zo_eps,
            stochastic=stochastic and dtype != torch.float32,
        )
        expected, on_gpu = stored.clone()[offset:], stored.cuda()[offset:]
        kept = torch.zeros(1, dtype=torch.int32)
        kept_on_gpu = kept.cuda()
        fused(reference, expected, expected, gradient, operation, start, kept)
        moved = None if gradient is None else gradient.cuda()
        fused(kernels, on_gpu, on_gpu, moved, operation, start, kept_on_gpu)
        assert torch.equal(bits(on_gpu), bits(expected)), (count, start, offset, operation)
        assert torch.equal(kept_on_gpu.cpu(), kept), (count, start, offset, operation)


@pytest.mark.parametrize("dtype", BITS)
def test_a_launch_covers_many_slices(dtype):
    """Whole tiles and ragged ends, on two streams and again at the same addresses."""
    rng, generator = random.Random(2), torch.Generator().manual_seed(2)
    places = [
        (rng.choice((0, 128, rng.randrange(5000))), rng.randrange(1, 9000)) for _ in range(40)
    ]
    stored = [torch.randn(count, generator=generator).to(dtype) for _, count in places]
    slopes = [torch.randn(count, generator=generator).to(dtype) for _, count in places]
    operation = Operation(Draw(5, 6, 0), 0.99, 0.1, (1e-3,), 1e-3, dtype != torch.float32)

    def slices(device: str) -> list[Slice]:
        return [
            Slice(weight.to(device, copy=True), 7 * i, start, i)
            for i, (weight, (start, _)) in enumerate(zip(stored, places, strict=True))
        ]

    on_cpu, on_gpu = slices("cpu"), slices("cuda")
    kept = torch.zeros(len(places), dtype=torch.int32, device="cuda")
    gradients = [slope.cuda() for slope in slopes]
    for stream in (torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.current_stream()):
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            buffer, parts = kernels.room_for(on_gpu)
            kernels.fused(on_gpu, operation, buffer, gradients)
            kernels.fused(on_gpu, operation, None, gradients, kept)
        torch.cuda.synchronize()
        reference.fused(on_cpu, operation, None, slopes)
        for part, ours, theirs in zip(parts, on_gpu, on_cpu, strict=True):
            assert torch.equal(bits(ours.data), bits(theirs.data))
            assert torch.equal(bits(part), bits(theirs.data))
    assert not kept.any()


def test_ten_million_normals():
    count = 10**7
    on_gpu = addax_ds.gaussian(7, 3, "w", 2**34 + 11, count, device="cuda")
    assert torch.equal(on_gpu.cpu(), addax_ds.gaussian(7, 3, "w", 2**34 + 11, count))
