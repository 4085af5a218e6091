"""Log-likelihood of target tokens, from logits at the positions that have one and no others.

A classification prompt of 2,048 tokens has one target. Logits of all its positions would take
206 MB a row with OPT's vocabulary in bf16, and their gradient as much again.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from addax_ds.data.examples import NO_LOSS
from addax_ds.evaluation.output_head import computing_losses, plain_head
from addax_ds.utils.errors import UserError

# They say what a row is: a model that does not take them must not go on without.
_OF_ROWS = ("input_ids", "attention_mask", "position_ids")
# What is known of targets and of rows to be scored. With labels the model would compute a loss.
_NO_INPUTS = ("labels", "index", "targets")


def targets_of(labels: Tensor) -> Tensor:
    """Return the token after each position, or `NO_LOSS`, from labels that are not shifted.

    Args:
        labels: int64 ``(sequences, length)``.

    Returns:
        int64 ``(sequences, length)``; nothing comes after the last position.
    """
    return F.pad(labels[:, 1:], (0, 1), value=NO_LOSS)


def positions_of(targets: Tensor) -> Tensor:
    """Return the positions at which any sequence has a target, or the first if none has.

    On a GPU this waits for the device; batches are better asked before they go there.

    Args:
        targets: int64 ``(sequences, length)``, see `targets_of`.

    Returns:
        int64, ascending.
    """
    found = (targets != NO_LOSS).any(dim=0).nonzero()[:, 0]
    return found if len(found) else torch.zeros(1, dtype=torch.int64, device=targets.device)


def target_tensors(labels: Tensor, row: Tensor | None = None) -> dict[str, dict[str, Tensor]]:
    """Return what `target_scores` needs to know of labels, to be added to a batch.

    On a GPU this waits for the device: make it of a batch before it goes there.

    Args:
        labels: int64 ``(sequences, length)``, not shifted.
        row: int64 ``(sequences,)``, the row of the model's input in which each sequence is; None if
            there is one for each.

    Returns:
        int64 tensors, under the name ``targets``: ``positions`` as `positions_of` has them; of each
        target token its ``sequence``, ``row``, ``position`` (the index in ``positions``) and
        ``token``; and the ``count`` of each sequence.
    """
    targets = targets_of(labels)
    positions = positions_of(targets)
    return {"targets": {"positions": positions, **_target_tokens(targets[:, positions], row)}}


def _target_tokens(targets: Tensor, row: Tensor | None = None) -> dict[str, Tensor]:
    mask = targets != NO_LOSS
    sequence, position = mask.nonzero(as_tuple=True)
    return {
        "sequence": sequence,
        "row": sequence if row is None else row[sequence],
        "position": position,
        "token": targets[mask],
        "count": mask.sum(dim=1),
    }


def target_scores(model: Any, batch: Mapping[str, Any]) -> Tensor:
    """Run a model and return each sequence's log-likelihood of its targets, and their number.

    The softmax is taken in fp32, the sum in fp64. Nothing waits for a GPU.

    Args:
        model: a causal language model, in the wrappers of DeepSpeed and PEFT or without. One that
            does not take ``logits_to_keep`` computes the logits of all positions
            (`takes_positions`).
        batch: ``input_ids``, int64 ``(rows, length)``, and `target_tensors`; of the same shape
            ``attention_mask`` if there is padding before a target, and ``position_ids`` if rows
            hold several sequences; and what else `model_inputs` passes on. The model's input may
            end where no sequence has a target any more.

    Returns:
        fp64 ``(sequences, 2)``.
    """
    targets = batch["targets"]
    return _sums(target_losses(model, model_inputs(model, batch), targets), targets)


def model_inputs(model: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of a batch the model's ``forward`` takes, but for what says what is learnt.

    With ones as ``attention_mask`` where there is none and ``forward`` insists.
    """
    parameters = _parameters(model)
    takes_any = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    taken = batch.keys() if takes_any else {*_OF_ROWS, *parameters}
    inputs = {k: v for k, v in batch.items() if k in taken and k not in _NO_INPUTS}
    mask = parameters.get("attention_mask")
    insists = mask is not None and mask.default is mask.empty
    ones = {"attention_mask": torch.ones_like(batch["input_ids"])} if insists else {}
    return {**ones, **inputs}


def target_losses(model: Any, arguments: Mapping[str, Any], targets: Mapping[str, Tensor]) -> Any:
    """Run a model and return the negative log-likelihood of each target token.

    Many are computed by the output projection itself (`addax_ds.evaluation.output_head`), and the
    logits of all of them are never held.

    Args:
        model: see `target_scores`.
        arguments: of the model.
        targets: of `target_tensors`; its ``sequence`` and ``count`` are not read.

    Returns:
        fp32 ``(tokens,)``.
    """
    positions = targets["positions"]
    takes = takes_positions(model)
    if takes:
        arguments = {**arguments, "logits_to_keep": positions}
    head = plain_head(_unwrapped(model), len(targets["token"]))
    if head is None:
        logits = model(**arguments).logits
        return _losses(logits if takes else logits[:, positions], targets)
    position = targets["position"] if takes else positions[targets["position"]]
    with computing_losses(head, targets["row"], position, targets["token"]):
        return model(**arguments).logits


def scores_of_logits(logits: Tensor, targets: Tensor) -> Tensor:
    """Return what `target_scores` does, from ``(rows, length, vocabulary)`` logits of any type.

    Args:
        logits: of all positions.
        targets: int64 ``(rows, length)``, see `targets_of`.
    """
    tokens = _target_tokens(targets)
    return _sums(_losses(logits, tokens), tokens)


def _losses(logits: Tensor, targets: Mapping[str, Tensor]) -> Tensor:
    chosen = logits[targets["row"], targets["position"]].float()
    return F.cross_entropy(chosen, targets["token"], reduction="none")


def _sums(losses: Tensor, targets: Mapping[str, Tensor]) -> Tensor:
    counts = targets["count"]
    sums = torch.zeros(len(counts), dtype=torch.float64, device=losses.device)
    sums.index_add_(0, targets["sequence"], -losses.double())
    return torch.stack((sums, counts.double()), dim=1)


def takes_positions(model: Any) -> bool:
    """Return whether a model, wrapped or not, takes positions as ``logits_to_keep``.

    Some take just a number of last ones there, so its annotation has to name a tensor.

    Raises:
        UserError: if adapters put virtual tokens in front of the prompt, which moves all positions.
    """
    parameter = _parameters(model).get("logits_to_keep")
    return parameter is not None and "Tensor" in str(parameter.annotation)


def _parameters(model: Any) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(_unwrapped(model).forward).parameters


def _unwrapped(model: Any) -> Any:
    inner = getattr(model, "module", model)
    if not hasattr(inner, "get_base_model"):
        return inner
    config = inner.active_peft_config
    if config.is_prompt_learning and config.peft_type != "PREFIX_TUNING":
        raise UserError(
            f"adapters of type {config.peft_type} put tokens in front of the prompt, which is not "
            "supported: use LoRA, or prefix tuning"
        )
    return inner.get_base_model()
