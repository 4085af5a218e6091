"""Weights of PEFT adapters, whatever back end holds them; the frozen base is not saved."""

import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn
from transformers.utils import is_peft_available

from addax_ds.checkpoint.atomic import writing
from addax_ds.checkpoint.weight_files import WeightFiles
from addax_ds.checkpoint.weights import full_shapes, gather_weights, local_slices
from addax_ds.distributed.collectives import is_rank_zero, raise_on_all_ranks
from addax_ds.utils.errors import UserError

logger = logging.getLogger(__name__)

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILE = "adapter_model.safetensors"


def has_adapters(model: nn.Module) -> bool:
    """Return whether a model was made by ``peft.get_peft_model``."""
    if not is_peft_available():
        return False
    from peft import PeftModel

    return isinstance(model, PeftModel)


def save_adapters(model: Any, folder: Path, keep: bool) -> None:
    """Write a folder for ``PeftModel.from_pretrained``; every rank has to call it.

    Args:
        model: a `peft.PeftModel` on any back end.
        folder: where to.
        keep: whether this rank writes.
    """
    # PEFT may ask the hub what to save, so one rank asks for all.
    wanted = [sorted({n for adapter in model.peft_config for n in _saved_names(model, adapter)})]
    if dist.is_initialized():
        dist.broadcast_object_list(wanted)
    tensors = gather_weights(model, wanted[0], keep)
    with raise_on_all_ranks(), writing(folder):
        if keep:
            model.save_pretrained(folder, state_dict=tensors)


def save_adapter_configs(model: Any, folder: Path) -> None:
    """Write the configuration of each adapter, which `save_adapters` writes with its weights."""
    for config in model.peft_config.values():
        config.save_pretrained(str(folder))


def check_adapters(folder: Path, settings: Mapping[str, Any] | None) -> None:
    """Check that a run has the adapters of a checkpoint.

    Args:
        folder: the checkpoint.
        settings: of the run's adapters, by PEFT's names; None if it trains whole weights.

    Raises:
        UserError: if one of them has no adapters, or others.
    """
    path = folder / ADAPTER_CONFIG
    if path.is_file() != (settings is not None):
        saved, trained = "adapters of PEFT", "the whole model"
        if settings is not None:
            saved, trained = trained, saved
        raise UserError(f"{folder}: it holds {saved}, and this run trains {trained}")
    saved_settings = json.loads(path.read_text(encoding="utf-8")) if settings else {}
    for name, value in (settings or {}).items():
        if saved_settings.get(name, value) != value:
            raise UserError(
                f"{folder}: its adapters have {name} {saved_settings[name]}, and those of this run "
                f"{value}"
            )


def load_adapters(model: Any, folder: Path) -> None:
    """Fill this rank's shards of the adapters from a folder that `save_adapters` wrote.

    Raises:
        UserError: see `addax_ds.checkpoint.weight_files.WeightFiles`; also if the folder holds
            adapters of layers that have none in the model.
    """
    for adapter, config in model.peft_config.items():
        of_adapter = folder if adapter == "default" else folder / adapter
        kept = {
            name: getattr(config, name) for name in ("r", "lora_alpha") if hasattr(config, name)
        }
        check_adapters(of_adapter, kept)
        _warn_of_another_base(of_adapter, config.base_model_name_or_path)
        files = WeightFiles(of_adapter, ADAPTER_FILE)
        saved = _saved_names(model, adapter)
        if lacking := sorted(files.names - set(saved.values())):
            raise UserError(
                f"{of_adapter}: it has adapters that this run has not, such as {lacking[0]}: "
                "resume with the --lora_target_modules that it was written with"
            )
        slices = [
            replace(wanted, names=(saved[wanted.names[0]],))
            for wanted in local_slices(model)
            if wanted.names[0] in saved
        ]
        files.fill(slices)


def _warn_of_another_base(folder: Path, base: str | None) -> None:
    """Warn, on rank 0, if adapters were trained on a model of another name; it may have moved."""
    content = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    saved = content.get("base_model_name_or_path")
    if None not in (saved, base) and saved != base and is_rank_zero():
        logger.warning(
            "%s: its adapters were trained on %s, and this run has %s: they work on the same "
            "weights alone.",
            folder,
            saved,
            base,
        )


def _saved_names(model: Any, adapter: str) -> dict[str, str]:
    """Return the names of what PEFT saves for an adapter: in the model, and in the file.

    Raises:
        UserError: for adapters that are computed anew to be saved.
    """
    from peft import get_peft_model_state_dict

    tensors = full_shapes(model)
    names = {id(tensor): name for name, tensor in tensors.items()}
    chosen = get_peft_model_state_dict(model, state_dict=dict(tensors), adapter_name=adapter)
    if any(id(tensor) not in names for tensor in chosen.values()):
        kind = model.peft_config[adapter].peft_type
        raise UserError(f"the adapter {adapter!r} is of type {kind}, which cannot be saved here")
    return {names[id(tensor)]: saved for saved, tensor in chosen.items()}
