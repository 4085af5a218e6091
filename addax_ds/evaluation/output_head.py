"""Losses of many target tokens without the logits of all of them.

A text row of 8,192 tokens has 2.1 GB of logits with a vocabulary of 128k in bf16, and several times
that with the softmax in fp32 and its gradient. So the output projection computes the losses itself,
a chunk of tokens at a time, and again in backward. It runs as a module as ever, with the hooks by
which an engine gathers its weight.

`torch.nn.functional.linear_cross_entropy` chunks, too, but returns losses in the dtype of its input
(torch 2.13): in bf16 their rounding would drown the difference of two passes.
"""

import functools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import _disable_current_modes
from transformers import PreTrainedConfig
from transformers.initialization import no_init_weights

CHUNK_ELEMENTS = 2**25
"""Logits that are held at a time: 128 MiB in fp32."""


class _ChunkedLosses(torch.autograd.Function):
    """Cross-entropy of ``hidden @ weight.T + bias``, in chunks of rows."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor
    ) -> Tensor:
        # Parameters are saved as they came in: backward gathers them where they are sharded.
        ctx.save_for_backward(hidden, weight, bias, target)
        losses = [
            F.cross_entropy(F.linear(part, weight, bias).float(), tokens, reduction="none")
            for part, tokens in _chunks(hidden, target, len(weight))
        ]
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
        hidden, weight, bias, target = ctx.saved_tensors
        _, of_weight, of_bias, _ = ctx.needs_input_grad
        # Sums over chunks are wide; each chunk's own is rounded once, as that of a whole batch is.
        wide = functools.partial(torch.zeros_like, dtype=torch.float32)
        weight_gradient = wide(weight) if of_weight else None
        bias_gradient = wide(bias) if of_bias else None
        hidden_gradients = []
        for part, tokens, scale in _chunks(hidden, target, len(weight), gradient):
            logits = F.linear(part, weight, bias)
            change = torch.softmax(logits, dim=1, dtype=torch.float32)
            change[torch.arange(len(tokens), device=change.device), tokens] -= 1.0
            change = change.mul_(scale[:, None]).to(hidden.dtype)
            hidden_gradients.append(change @ weight)
            if weight_gradient is not None:
                weight_gradient += change.T @ part
            if bias_gradient is not None:
                bias_gradient += change.sum(dim=0, dtype=torch.float32)
        return (
            torch.cat(hidden_gradients),
            None if weight_gradient is None else weight_gradient.to(weight.dtype),
            None if bias_gradient is None else bias_gradient.to(bias.dtype),
            None,
        )


def _chunks(hidden: Tensor, target: Tensor, classes: int, *more: Tensor) -> Any:
    rows = max(1, CHUNK_ELEMENTS // classes)
    return zip(*(tensor.split(rows) for tensor in (hidden, target, *more)), strict=True)


def chunked_losses(hidden: Tensor, head: nn.Linear, target: Tensor) -> Any:
    """Return the cross-entropy of target tokens, computed in chunks of `CHUNK_ELEMENTS` logits.

    Logits have the dtype of the head, or that of autocast; softmax and losses are fp32.

    Args:
        hidden: ``(tokens, features)``.
        head: the output projection, its weight gathered.
        target: int64 ``(tokens,)``.

    Returns:
        fp32 ``(tokens,)``.
    """
    inputs, device = [hidden, head.weight, head.bias], hidden.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return _ChunkedLosses.apply(*inputs, target)
    narrow = torch.get_autocast_dtype(device)
    with torch.autocast(device, enabled=False):
        return _ChunkedLosses.apply(*(x if x is None else x.to(narrow) for x in inputs), target)


def plain_head(model: nn.Module, tokens: int) -> nn.Linear | None:
    """Return the output projection of a model without wrappers, if it can compute the losses.

    None if one chunk of logits is all that there is, if something comes after the projection
    (a cap, a factor), if it is no plain linear layer (adapters) or has a forward of its own (hooks
    of Accelerate), or if a part of the model is compiled.
    """
    find = getattr(model, "get_output_embeddings", None)
    head = None if find is None else find()
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        return None
    if "forward" in vars(head):
        return None
    if tokens <= CHUNK_ELEMENTS // head.out_features or any(map(_is_compiled, model.modules())):
        return None
    config = getattr(model, "config", None)
    if not isinstance(config, PreTrainedConfig):
        return None
    model_class: Any = type(model)
    return head if _results_are_logits(model_class, config.to_json_string()) else None


def _is_compiled(module: nn.Module) -> bool:
    return module._compiled_call_impl is not None or hasattr(module, "_orig_mod")


@functools.lru_cache(maxsize=64)
def _results_are_logits(model_class: Any, config: str) -> bool:
    """Try it on the meta device, without weights, so that all ranks find the same.

    Whoever records the operations of a pass (`addax_ds.planner.tape`) does not see it.
    """
    ids = torch.ones((1, 2), dtype=torch.int64, device="meta")
    result = torch.zeros((1, 2, 1), device="meta")
    try:
        settings = model_class.config_class.from_dict(json.loads(config))
        settings._attn_implementation = "eager"  # others look at the values of the mask
        with _disable_current_modes(), torch.device("meta"), no_init_weights(), torch.no_grad():
            model = model_class(settings).eval()
            for layers in [m for m in model.modules() if isinstance(m, nn.ModuleList)]:
                del layers[:]  # experts look at values, and nothing here depends on layers
            model.get_output_embeddings().forward = lambda hidden: result
            output = model(input_ids=ids, attention_mask=ids, use_cache=False)
            return output.logits is result
    except Exception:  # a model's code may ask for anything, and needs its logits then
        return False


@contextmanager
def computing_losses(
    head: nn.Linear, row: Tensor, position: Tensor, token: Tensor
) -> Iterator[None]:
    """Let a head return the losses of target tokens where it returns logits.

    Args:
        head: see `plain_head`.
        row: int64 ``(tokens,)``, of each target in what the head is given.
        position: int64 ``(tokens,)``, the same.
        token: int64 ``(tokens,)``, the targets.
    """

    def forward(hidden: Tensor) -> Tensor:
        return chunked_losses(hidden[row, position], head, token)

    vars(head)["forward"] = forward  # hides the method of the class
    try:
        yield
    finally:
        del head.forward
