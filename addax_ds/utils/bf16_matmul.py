"""bf16 matrix products on a CPU that has no instructions for them.

Without AVX-512 (on x86) torch multiplies bf16 matrices element by element: 0.9 GFLOP/s where fp32
has 70, on one core of an EPYC 7003. The same product through fp32 copies gives the same numbers, as
the sum is taken in fp32 either way, and takes 1/50 of the time.
"""

import warnings
from typing import Any

import torch
from torch.library import Library, get_kernel

_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")
_library: Library | None = None


def multiply_in_fp32() -> None:
    """Take bf16 matrix products of this process in fp32, unless the CPU has a way of its own.

    Operands are copied to fp32 for one product, its result is rounded to bf16; autograd saves what
    it saved before. Products of other types pass through.
    """
    global _library
    if _library is None and not _cpu_has_bf16_products():
        _library = Library("aten", "IMPL")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="(?s).*verrid")  # that is what it is for
            for name in _PRODUCTS:
                _widen(_library, name)


def _cpu_has_bf16_products() -> bool:
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _widen(library: Library, name: str) -> None:
    kernel = get_kernel(f"aten::{name}", "CPU")

    def product(keys: Any, *operands: Any, **scales: Any) -> torch.Tensor:
        if operands[0].dtype is not torch.bfloat16:
            return kernel.call_boxed(keys, *operands, **scales)
        widened = (x.float() if isinstance(x, torch.Tensor) else x for x in operands)
        return kernel.call_boxed(keys, *widened, **scales).bfloat16()

    library.impl(name, product, "CPU", with_keyset=True)
