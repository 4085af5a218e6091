"""Runs a pass of the model on the meta device and keeps what it allocates and frees.

No formula for a layer's activations could follow every model of Transformers, so the model's own
code says what it keeps: a forward, and a backward with its autograd graph, over tensors without
memory. Weights are not on this tape; which of them are gathered when is for the back ends to say
(`addax_ds.planner.replay`), at the module boundaries that the tape notes.

Three things that depend on the device are stood in for. Attention by ``sdpa`` or a flash kernel
keeps query, key, value, result and one fp32 number a query and head (Dao et al.,
"FlashAttention", section 3.1), and no score matrix, unless keys have fewer heads and are broadcast
over the queries', which no fused kernel does. Dropout keeps a mask of one byte an
element on a GPU and of the activation's own type on a CPU (``native_dropout``; ``_dropout_impl`` in
ATen's Dropout.cpp). The loss is that of `addax_ds.evaluation.likelihood`.
"""

import functools
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedModel, masking_utils
from typing_extensions import override

from addax_ds.evaluation.likelihood import target_losses
from addax_ds.planner.shapes import ModelShape, reason
from addax_ds.planner.tape import Event, Tape
from addax_ds.utils.errors import UserError
from addax_ds.utils.extras import naming_extras

MOST_OPERATIONS = 400_000
"""Tensor operations of a pass, beyond which it is not planned. It is a number and not a time, so
that every machine plans the same. A block that is recomputed has 270 in OPT and 410 in Llama, its
backward included, whatever its width and rows, and 800 with experts; the losses of 33 million
logits have 19. Of a model that loops over tokens a block may have 200 a token.
"""


class PlanError(UserError):
    """The planner cannot follow a model."""


@dataclass(frozen=True)
class Batch:
    """The tensors of one micro-batch on one rank.

    Attributes:
        rows: sequences.
        length: tokens of the longest, to which the others are padded.
        targets: positions of a sequence whose next token is predicted; at most ``length - 1``.
    """

    rows: int
    length: int
    targets: int

    @classmethod
    def of(cls, rows: int, length: int, targets: int | None) -> "Batch":
        """Return a batch of sequences with at most ``targets`` targets each; None for all."""
        most = max(length - 1, 1)
        return cls(rows, length, most if targets is None else min(targets, most))

    @property
    def positions(self) -> int:
        """Positions whose logits are computed: those at which any row may have a target."""
        return min(self.rows * self.targets, self.length - 1)


@dataclass(frozen=True)
class Trace:
    """Allocations of one pass, and the order in which it needs modules.

    Attributes:
        events: in their order: ``("alloc", storage, bytes)``, ``("free", storage)``,
            ``("fetch", module, is_forward)`` before and ``("release", module, is_forward)`` after a
            module computes, ``("gradient", parameter, storage)``.
        categories: of each storage: "activations", "logits" or "gradients".
    """

    events: tuple[Event, ...]
    categories: tuple[str, ...]


@functools.lru_cache(maxsize=64)
def trace(
    shape: ModelShape,
    batch: Batch,
    *,
    backward: bool,
    checkpointing: bool = False,
    attention: str | None = None,
    cuda: bool = True,
    zero3_linear: bool = False,
) -> Trace:
    """Run one pass on the meta device.

    Args:
        shape: of the model.
        batch: its input.
        backward: whether it is a first-order pass, in training mode; else forward alone, in
            evaluation mode.
        checkpointing: recompute each block in backward (``activation_checkpointing_enable``).
        attention: "eager", "sdpa" or a flash implementation; None for the model's own choice.
        cuda: whether to count what kernels keep on a GPU, or on a CPU.
        zero3_linear: whether linear layers are DeepSpeed's, which ``zero.Init`` puts in place of
            torch's.

    Raises:
        PlanError: if the model does not run without the values of its tensors, or not with this
            attention or checkpointing, or has more than `MOST_OPERATIONS`.
    """
    # Outside of what is caught below: a private name that has moved is not the model's fault.
    with _stand_ins(attention, cuda, zero3_linear):
        try:
            return _run(shape, batch, backward, checkpointing, attention)
        except (AssertionError, UserError):
            raise
        except Exception as error:  # a model's code may ask for anything
            model_type = json.loads(shape.config)["model_type"]
            recomputed = ", checkpointing" if checkpointing else ""
            what = (
                f"with {batch.rows} row(s) of {batch.length} tokens, attention "
                f"{attention or 'of its own choice'}{recomputed}"
            )
            if isinstance(error, _TooManyOperationsError):
                raise PlanError(
                    f"{shape.name}: a model of type {model_type} cannot be planned {what}: a pass "
                    f"has more than {MOST_OPERATIONS} tensor operations, as where a model loops "
                    "over tokens. Find by a trial run what fits"
                ) from None
            raise PlanError(
                f"{shape.name}: the planner cannot run a model of type {model_type} without its "
                f"weights, {what}: {reason(error)}. Find by a trial run what fits"
            ) from error


class _TooManyOperationsError(Exception):
    """A pass has more than `MOST_OPERATIONS`."""


class _BoundedTape(Tape):
    """Tape of at most `MOST_OPERATIONS`."""

    _operations = 0

    @override
    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self._operations += 1
        if self._operations > MOST_OPERATIONS:
            raise _TooManyOperationsError
        return super().__torch_dispatch__(function, types, args, kwargs)


def _run(
    shape: ModelShape,
    batch: Batch,
    backward: bool,
    checkpointing: bool,
    attention: str | None,
) -> Trace:
    model: Any = shape.build("sdpa" if _fused(attention) else attention)
    model.config.use_cache = False  # as Trainer sets it
    model.train(backward)
    if checkpointing and backward:
        model.activation_checkpointing_enable()
    tape = _BoundedTape(lambda tensor, _: category_of(tensor, shape.vocabulary))
    inputs = _model_inputs(batch)
    for tensor in (*model.parameters(), *model.buffers(), *inputs.values()):
        tape.ignore(tensor)
    parameters = _note_gradients(model, tape)
    _note_modules(model, tape)
    with tape, torch.set_grad_enabled(backward):
        loss = _loss(model, inputs, batch)
        if backward:
            loss.backward()
    del loss, parameters
    return Trace(tuple(tape.events), tuple(tape.categories))


def _fused(attention: str | None) -> bool:
    return attention is not None and "flash" in attention


def category_of(tensor: Tensor, vocabulary: int) -> str:
    """Return "logits", "gradients" or "activations" for what a pass has allocated.

    Logits and what the softmax makes of them have the vocabulary as their last dimension. The
    embedding's two gradients, of the output projection and of the input, have it as their first.
    Other gradients are known when backward has put them in place.
    """
    if tensor.ndim >= 2 and tensor.shape[-1] == vocabulary:
        return "logits"
    if tensor.ndim == 2 and tensor.shape[0] == vocabulary:
        return "gradients"
    return "activations"


def _note_gradients(model: nn.Module, tape: Tape) -> list[nn.Parameter]:
    parameters = list(model.parameters())

    def hook(index: int, parameter: nn.Parameter) -> None:
        assert parameter.grad is not None
        storage = tape.note(parameter.grad)
        assert storage is not None
        tape.categories[storage] = "gradients"
        tape.events.append(("gradient", index, storage))
        parameter.grad = None

    for index, parameter in enumerate(parameters):
        parameter.register_post_accumulate_grad_hook(functools.partial(hook, index))
    return parameters


class _Boundary(torch.autograd.Function):
    """Notes that backward has come to a place of the graph."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, tape: Tape, event: Event) -> Tensor:
        ctx.note = tape, event
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        tape, event = ctx.note
        tape.events.append(event)
        return gradient, None, None


def _note_modules(model: nn.Module, tape: Tape) -> None:
    """Note where each module starts and ends, in forward and in backward.

    As `DeepSpeedZeRoOffload` does: backward reaches a module's results before, and its positional
    arguments after it has computed; a module without an argument to differentiate does not end.
    """

    def boundary(value: Any, event: Event) -> Any:
        def mark(tensor: Tensor) -> Tensor:
            marks = tensor.requires_grad and torch.is_grad_enabled()
            return _Boundary.apply(tensor, tape, event) if marks else tensor

        return tree_map_only(Tensor, mark, value)

    def before(index: int, module: nn.Module, arguments: Any) -> Any:
        tape.events.append(("fetch", index, True))
        return boundary(arguments, ("release", index, False))

    def after(index: int, module: nn.Module, arguments: Any, result: Any) -> Any:
        tape.events.append(("release", index, True))
        return boundary(result, ("fetch", index, False))

    for index, module in enumerate(model.modules()):
        module.register_forward_pre_hook(functools.partial(before, index))
        module.register_forward_hook(functools.partial(after, index))


def _model_inputs(batch: Batch) -> dict[str, Tensor]:
    shape = batch.rows, batch.length
    return {"input_ids": torch.zeros(shape, dtype=torch.long, device="meta")}


def _loss(model: Any, inputs: dict[str, Tensor], batch: Batch) -> Tensor:
    def indices(number: int) -> Tensor:
        return torch.zeros(number, dtype=torch.long, device="meta")

    targets = {n: indices(batch.rows * batch.targets) for n in ("row", "position", "token")}
    losses = target_losses(model, inputs, {**targets, "positions": indices(batch.positions)})
    return losses.double().sum()


class _Attention(torch.autograd.Function):
    """Attention by a fused kernel, on the meta device: only what it keeps is right."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, cuda: bool
    ) -> Tensor:
        rows, heads, length, width = query.shape
        if (mask is not None and cuda) or value.shape[-1] != width:
            # `_efficient_attention_forward` in ATen's attention.cu
            result = query.new_empty(rows, length, heads, value.shape[-1]).transpose(1, 2)
        else:
            # The others lay it out as the query, and what a model makes of it may be a copy.
            result = torch.empty_like(query)
        normalizer = query.new_empty(rows, heads, length, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, mask, result, normalizer)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query, key, value, *_ = ctx.saved_tensors
        gradients = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        return *gradients, None, None


def _attention(
    cuda: bool,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *rest: Any,
    enable_gqa: bool = False,
    **more: Any,
) -> Tensor:
    if key.shape[1] != query.shape[1] and not enable_gqa:
        # Fused kernels do not broadcast heads (`check_batch_size_and_num_heads_dense` of ATen's
        # sdp_utils_cpp.h), so torch multiplies matrices, which meta tensors can do as well.
        return torch._C._nn.scaled_dot_product_attention(
            query, key, value, attn_mask, *rest, **more
        )
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        # `convert_boolean_attn_mask` of ATen's attention.cpp makes one for each call.
        attn_mask = torch.empty_like(attn_mask, dtype=query.dtype)
    return _Attention.apply(query, key, value, attn_mask, cuda)


def _fused_dropout(
    input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Tensor:
    return torch.native_dropout(input, p, True)[0] if training and p > 0.0 else input


@contextmanager
def _stand_ins(attention: str | None, cuda: bool, zero3_linear: bool) -> Iterator[None]:
    """Replace functions whose meta version keeps something else than the real one."""
    linear = torch._C._nn.linear
    if zero3_linear:
        with naming_extras():
            from deepspeed.runtime.zero.linear import zero3_linear_wrap
        linear = zero3_linear_wrap
    patches: list[Any] = [
        mock.patch.object(F, "scaled_dot_product_attention", functools.partial(_attention, cuda)),
        # zero.Init leaves its own in place for good, also for models without ZeRO-3.
        mock.patch.object(F, "linear", linear),
        # These read values: a mask of the model's own (BioGPT's) has ones, a row is one sequence.
        mock.patch.object(masking_utils, "fast_all", return_value=True),
        mock.patch.object(masking_utils, "find_packed_sequence_indices", return_value=None),
        mock.patch.object(PreTrainedModel, "warn_if_padding_and_no_attention_mask"),
    ]
    if _fused(attention):  # the planner has sdpa in its place, which would need a square mask
        skip = mock.patch.object(masking_utils, "_ignore_causal_mask_sdpa", return_value=True)
        patches.append(skip)
    if cuda:
        patches.append(mock.patch.object(F, "dropout", _fused_dropout))
    with ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        yield
