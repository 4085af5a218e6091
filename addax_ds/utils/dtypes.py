"""Weight types and the flags that choose them."""

from typing import Any

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
"""Types of weights, by their names."""


def weights_dtype(args: Any) -> torch.dtype:
    """Return the type that ``--bf16`` or ``--fp16`` asks for; there is no other copy of weights."""
    return DTYPES[dtype_name(args)]


def dtype_name(args: Any) -> str:
    """Return what `weights_dtype` is called: "bf16", "fp16" or "fp32"."""
    return "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"
