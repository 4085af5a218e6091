"""bf16 products in fp32: the sum that bf16 products are, also under autograd."""

from typing import Any

import pytest
import torch
from torch import nn

from addax_ds.utils import bf16_matmul

SMALL = 2**-20
"""More than the order of 300 summands changes in fp32, before a sum near 1 is rounded to bf16."""


class Recording:
    """torch's kernel of an operation; notes the types that it is called with."""

    def __init__(self, kernel: Any, seen: list[set[torch.dtype]]) -> None:
        self._kernel, self._seen = kernel, seen

    def call_boxed(self, keys: Any, *operands: Any, **scales: Any) -> Any:
        self._seen.append({x.dtype for x in operands if isinstance(x, torch.Tensor)})
        return self._kernel.call_boxed(keys, *operands, **scales)


@pytest.fixture(autouse=True)
def slow_cpu(monkeypatch):
    """A CPU without bf16 products, whatever this one is; yields the types that torch multiplied."""
    seen: list[set[torch.dtype]] = []
    torchs = bf16_matmul.get_kernel
    monkeypatch.setattr(bf16_matmul, "get_kernel", lambda *name: Recording(torchs(*name), seen))
    monkeypatch.setattr(bf16_matmul, "_library", None)
    monkeypatch.setattr(bf16_matmul, "_cpu_has_bf16_products", lambda: False)
    bf16_matmul.multiply_in_fp32()
    library = bf16_matmul._library
    assert library is not None
    yield seen
    library._destroy()


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(shape).mul(0.1).bfloat16()


def assert_rounded(product: torch.Tensor, exact: torch.Tensor) -> None:
    """`product` is a sum in fp32, rounded to bf16 once."""
    assert product.dtype is torch.bfloat16
    lowest, highest = (exact - SMALL).bfloat16(), (exact + SMALL).bfloat16()
    assert bool(((lowest <= product) & (product <= highest)).all())


@pytest.mark.parametrize("batch", [(), (3,)])
@pytest.mark.parametrize("scales", [{}, {"beta": 0.5, "alpha": 2.0}])
def test_products(slow_cpu, batch, scales):
    torch.manual_seed(0)
    left, right, added = numbers(*batch, 5, 300), numbers(*batch, 300, 7), numbers(*batch, 5, 7)
    exact = left.double() @ right.double()
    assert_rounded(left @ right, exact)
    add = torch.baddbmm if batch else torch.addmm
    whole = scales.get("beta", 1.0) * added.double() + scales.get("alpha", 1.0) * exact
    assert_rounded(add(added, left, right, **scales), whole)
    assert slow_cpu.count({torch.float32}) >= 2  # besides the exact ones in float64
    assert not any(torch.bfloat16 in types for types in slow_cpu)


def test_a_layer_and_its_gradients():
    torch.manual_seed(0)
    layer = nn.Linear(64, 9).bfloat16()
    rows, upstream = numbers(2, 6, 64).requires_grad_(), numbers(2, 6, 9)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        output = layer(rows)
    output.backward(upstream)
    assert {tensor.dtype for tensor in saved} == {torch.bfloat16}

    weight, bias = layer.weight.double(), layer.bias.double()
    assert_rounded(output, rows.double() @ weight.T + bias)
    assert_rounded(rows.grad, upstream.double() @ weight)
    flat = upstream.double().flatten(0, 1), rows.detach().double().flatten(0, 1)
    assert_rounded(layer.weight.grad, flat[0].T @ flat[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_other_types_stay(dtype):
    torch.manual_seed(0)
    left, right = torch.randn(5, 300, dtype=dtype), torch.randn(300, 7, dtype=dtype)
    product = left @ right
    assert product.dtype is dtype
    torch.testing.assert_close(
        product, torch.einsum("ik,kj->ij", left, right), rtol=1e-5, atol=1e-5
    )


def test_it_is_left_to_a_cpu_that_can(monkeypatch):
    monkeypatch.setattr(bf16_matmul, "_library", None)
    monkeypatch.setattr(bf16_matmul, "_cpu_has_bf16_products", lambda: True)
    bf16_matmul.multiply_in_fp32()
    assert bf16_matmul._library is None
