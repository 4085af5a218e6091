"""Folders for ``from_pretrained``, of a model on any back end."""

import contextlib
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainingArguments
from transformers.trainer import TRAINING_ARGS_NAME

from addax_ds.checkpoint import atomic, weights
from addax_ds.checkpoint.adapters import (
    check_adapters,
    has_adapters,
    load_adapters,
    save_adapter_configs,
    save_adapters,
)
from addax_ds.checkpoint.folders import torch_save, writers
from addax_ds.distributed.collectives import raise_on_all_ranks
from addax_ds.utils.errors import UserError


def save_model(
    model: nn.Module,
    folder: Path,
    args: TrainingArguments,
    tokenizer: Any = None,
) -> None:
    """Write a folder that ``from_pretrained`` loads; every rank has to call it.

    Args:
        model: on any back end; of one with adapters these alone are written.
        folder: where to.
        args: say which ranks write.
        tokenizer: or None; saved with the model.
    """
    with raise_on_all_ranks(), atomic.writing(folder):
        if args.should_save:
            _start_folder(folder, args, tokenizer)
    if has_adapters(model):
        save_adapters(model, folder, args.should_save)
    else:
        shown = args.process_index == 0 and not args.disable_tqdm
        weights.save_weights(model, folder, writers(args), progress=shown)


def rehearse_saving(
    model: nn.Module, output_dir: Path, args: TrainingArguments, tokenizer: Any = None
) -> None:
    """Write what `save_model` writes beside the weights, and remove it; every rank has to call it.

    Raises:
        UserError: on all ranks, if one could not save what it is going to train.
    """
    folder = output_dir / atomic.UNFINISHED / "rehearsal"
    with raise_on_all_ranks():
        if not args.should_save:
            return
        try:
            with atomic.writing(output_dir):
                atomic.remove_unfinished(output_dir)
                _start_folder(folder, args, tokenizer)
                if has_adapters(model):
                    save_adapter_configs(model, folder)
                else:
                    weights.save_config(model, folder)
        except UserError:
            raise
        except Exception as error:  # of whatever class of configuration or tokenizer the model has
            raise UserError(
                f"the model could not be saved after the training, which therefore does not start: "
                f"{type(error).__name__}: {error}"
            ) from error
        finally:
            with contextlib.suppress(OSError):
                atomic.remove_unfinished(output_dir)


def load_model(model: nn.Module, folder: Path, progress: bool = False) -> None:
    """Fill this rank's shards from a folder that `save_model` wrote; every rank has to call it.

    It frees nothing: what is gathered has the old values, so `free_gathered` comes afterwards.

    Raises:
        UserError: on all ranks, if one cannot; see `WeightFiles`. Also if one
            of folder and model has adapters of PEFT and the other has not.
    """
    adapters = has_adapters(model)
    with raise_on_all_ranks():
        if adapters:
            load_adapters(model, folder)
        else:
            check_adapters(folder, None)
            weights.fill(model, folder, progress, of_same_model=True)


def _start_folder(folder: Path, args: TrainingArguments, tokenizer: Any) -> None:
    """Write all that does not depend on the model."""
    folder.mkdir(parents=True, exist_ok=True)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    torch_save(args, folder / TRAINING_ARGS_NAME)
