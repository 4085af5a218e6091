"""The two operations on slices of a parameter that everything else is made of.

`gaussian` fills a slice with z; `fused` perturbs and updates. `reference` defines them in plain
torch; `cpu` (C++) and `gpu` (Triton) compute the same bits faster. Which one runs follows the
device of the tensors; the environment variable ``ADDAX_KERNELS``, ``reference``, ``cpp`` or
``triton``, forces one.
"""

import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from addax_ds.kernels import reference
from addax_ds.kernels.operation import Draw, Operation, Slice
from addax_ds.utils.errors import UserError

logger = logging.getLogger(__name__)

_MODULES = {"reference": "reference", "cpp": "cpu", "triton": "gpu"}


@torch.no_grad()
def gaussian(out: Tensor, draw: Draw, start: int) -> None:
    """Fill a slice with z.

    Args:
        out: flat, contiguous fp32 tensor.
        draw: which z.
        start: flat index of the slice's first element in the unsharded parameter.
    """
    assert out.dtype == torch.float32
    assert out.is_contiguous()
    implementation(out.device.type).gaussian(out, draw, start)


@torch.no_grad()
def fused(
    slices: Sequence[Slice],
    operation: Operation,
    out: Tensor | None = None,
    gradients: Sequence[Tensor] | None = None,
    kept: Tensor | None = None,
) -> None:
    """Compute an `Operation` over slices of any number of parameters; on a GPU in one launch.

    Args:
        slices: all of one dtype and on one device.
        operation: the equation's coefficients, z and rounding.
        out: flat tensor of the slices' dtype, which `operation.offsets` divides among them (of
            `room_for`, or of one slice as long as that); None to overwrite the slices.
        gradients: flat, contiguous, as long as their slices, of any one floating type; None for
            none. They are moved to the weights' device if they are elsewhere.
        kept: int32, flat, on the weights' device; None if nobody asks. The element `Slice.index` is
            set to 1 if an element of that slice kept its weight because its result was NaN or
            infinite, and left alone if none did. Nothing waits for a GPU.
    """
    weights = [each.data for each in slices]
    dtype, device = weights[0].dtype, weights[0].device
    assert dtype in (torch.float32, torch.bfloat16, torch.float16)
    assert all(w.is_contiguous() and w.dtype == dtype and w.device == device for w in weights)
    assert not operation.stochastic or dtype != torch.float32
    if operation.c1 == 0.0:
        gradients = None
    if gradients is not None:
        narrow = dtype if gradients[0].dtype == dtype else torch.float32
        gradients = [gradient.to(device, narrow) for gradient in gradients]
        lengths = zip(gradients, weights, strict=True)
        assert all(g.is_contiguous() and g.numel() == w.numel() for g, w in lengths)
    if out is not None:
        assert out.is_contiguous()
        assert (out.dtype, out.device) == (dtype, device)
    if kept is not None:
        assert (kept.dtype, kept.device) == (torch.int32, device)
        assert kept.numel() > max(each.index for each in slices)
    implementation(device.type).fused(slices, operation, out, gradients, kept)


def room_for(slices: Sequence[Slice]) -> tuple[Tensor, list[Tensor]]:
    """Allocate a buffer for copies of slices, which share dtype and device.

    Returns:
        The buffer, to be given to `fused`, and its parts, as long as the slices.
    """
    lengths = [n for each in slices for n in (each.data.numel(), each.room - each.data.numel())]
    buffer = slices[0].data.new_empty(sum(lengths))
    return buffer, list(buffer.split(lengths)[::2])


@functools.cache
def implementation(device_type: str) -> ModuleType:
    """Return the module whose kernels serve a type of device, chosen at the first call.

    Raises:
        UserError: ``ADDAX_KERNELS`` is unknown, or names what cannot run here.
    """
    forced = os.environ.get("ADDAX_KERNELS")
    if forced and forced not in _MODULES:
        raise UserError(f"ADDAX_KERNELS is {forced!r}; it must be one of {', '.join(_MODULES)}")
    name = forced or {"cpu": "cpp", "cuda": "triton"}.get(device_type, "reference")
    obstacle = _obstacle(name, device_type)
    if obstacle is not None and forced:
        raise UserError(
            f"ADDAX_KERNELS={forced} cannot serve {device_type} tensors here: {obstacle}. Mend "
            "that, or unset the variable"
        )
    if obstacle is not None:
        logger.warning(
            "Falling back to the slow kernels in plain torch, which ADDAX_KERNELS=reference asks "
            "for without this warning: %s",
            obstacle,
        )
        name = "reference"
    logger.info("Kernels for %s tensors: %s", device_type, name)
    return _module(name)


def _obstacle(name: str, device_type: str) -> str | None:
    """Return why an implementation cannot serve a device type, or None."""
    if name == "cpp" and device_type != "cpu":
        return "the C++ kernels run on a CPU"
    if name == "triton" and importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if name == "triton" and device_type != "cuda" and not os.environ.get("TRITON_INTERPRET"):
        return "the Triton kernels run on a GPU, or anywhere under TRITON_INTERPRET=1"
    try:
        if name == "reference" or _agrees(_module(name), device_type):
            return None
    except Exception as error:  # compilers fail in many ways
        return f"{type(error).__name__}: {error}"
    return f"the {name} kernels compute other bits than the reference on this machine"


def _agrees(module: ModuleType, device_type: str) -> bool:
    """Return whether an implementation equals the reference on the CPU.

    In what Addax does with bf16 and fp16 weights, so that little is compiled for this check alone.
    """
    draw, start, results = Draw(1, 2, 3), 5, []
    update = Operation(draw, 0.875, 0.5, (0.25,), 0.01, stochastic=True)
    for kernels, device in ((reference, "cpu"), (module, device_type)):
        z = torch.empty(4096, dtype=torch.float32, device=device)
        kernels.gaussian(z, draw, start)
        result = [z.cpu()]
        for dtype in (torch.bfloat16, torch.float16):
            weight, kept = z.to(dtype), torch.zeros(1, dtype=torch.int32, device=device)
            weight.view(torch.int16)[0] = -1  # a NaN with sign and payload, which is kept
            slices, gradient = [Slice(weight, 2, start)], weight.clone()
            perturbed, _ = room_for(slices)
            kernels.fused(slices, Operation(draw, c2=(0.25,)), perturbed)
            kernels.fused(slices, update, None, [gradient], kept)
            numbers = (perturbed, weight)
            result += [each.view(torch.int16).cpu() for each in numbers] + [kept.cpu()]
        results.append(result)
    return all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"addax_ds.kernels.{_MODULES[name]}")
