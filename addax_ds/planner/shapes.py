"""The shape of a model: its parameters, modules and blocks, from its configuration alone.

The model is built on the meta device, so a shape of 66 billion parameters takes a second and no
memory. Configurations of the OPT family (Zhang et al., "OPT: Open Pre-trained Transformer Language
Models", table 1, and the ``config.json`` files of ``facebook/opt-*``) are built in.
"""

import functools
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    OPTConfig,
    PreTrainedConfig,
    modeling_utils,
)

from addax_ds.sharding.modules import blocks, is_uniform, separate_blocks
from addax_ds.utils.dtypes import DTYPES
from addax_ds.utils.errors import UserError
from addax_ds.utils.files import read_regular
from addax_ds.utils.messages import did_you_mean, shown


def opt_shape(hidden: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    """Return arguments of `OPTConfig`; ``more`` overrides them."""
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "ffn_dim": 4 * hidden,
        "word_embed_proj_dim": hidden,
        **more,
    }


OPT_FAMILY: dict[str, dict[str, Any]] = {
    "opt-125m": opt_shape(768, 12, 12),
    "opt-350m": opt_shape(1024, 24, 16, word_embed_proj_dim=512, do_layer_norm_before=False),
    "opt-1.3b": opt_shape(2048, 24, 32),
    "opt-2.7b": opt_shape(2560, 32, 32),
    "opt-6.7b": opt_shape(4096, 32, 32),
    "opt-13b": opt_shape(5120, 40, 40),
    "opt-30b": opt_shape(7168, 48, 56),
    "opt-66b": opt_shape(9216, 64, 72),
}
"""Arguments of `OPTConfig` in which the models differ from its defaults: vocabulary 50272, 2048
positions, dropout 0.1 after attention and feed-forward, none on attention weights, tied
embeddings."""


@dataclass(frozen=True)
class ModelShape:
    """A model without its weights.

    Attributes:
        name: what a report calls it.
        config: its configuration as JSON text, from which `build` makes the model again.
        dtype: "bf16", "fp16" or "fp32", of the weights.
        sizes: shape of each parameter, in the model's order; a tied one counts once.
        modules: of each module, in the order of ``model.modules()``, the parameters it owns itself.
        blocks: of each block (decoder layer), its own index among the modules.
        block_parameters: of each block, its parameters, those of its children included.
        separate: those of the blocks that share no parameter with another module.
        uniform: those of the blocks that run the same modules for all data.
        vocabulary: number of rows of the logits' last dimension.
        positions: longest sequence, if there is a limit.
        head: index of the parameter of the output projection.
        tied: whether it is the input embedding's, too.
        hidden: width of the residual stream, from which Trainer fills "auto" in a DeepSpeed JSON.
    """

    name: str
    config: str
    dtype: str
    sizes: tuple[tuple[int, ...], ...]
    modules: tuple[tuple[int, ...], ...]
    blocks: tuple[int, ...]
    block_parameters: tuple[tuple[int, ...], ...]
    separate: frozenset[int]
    uniform: frozenset[int]
    vocabulary: int
    positions: int | None
    head: int
    tied: bool
    hidden: int

    @functools.cached_property
    def numels(self) -> tuple[int, ...]:
        """Elements of each parameter."""
        return tuple(math.prod(size) for size in self.sizes)

    @property
    def itemsize(self) -> int:
        """Bytes of a weight."""
        return DTYPES[self.dtype].itemsize

    @property
    def parameters(self) -> int:
        """Number of elements of all parameters."""
        return sum(self.numels)

    def build(self, attention: str | None = None) -> nn.Module:
        """Return the model on the meta device."""
        with _not_partitioned():
            return _build(json.loads(self.config), self.dtype, attention)


def find_shape(model: str, dtype: str = "bf16") -> ModelShape:
    """Return the shape of a built-in model, or of the one in a folder or a ``config.json``.

    Args:
        model: ``facebook/opt-66b`` or ``opt-66b`` and their like, a folder, or a JSON file.
        dtype: "bf16", "fp16" or "fp32".

    Raises:
        UserError: if there is no such model, or its configuration is not of a causal language
            model that Transformers can build without remote code.
    """
    known = model.removeprefix("facebook/")
    if not os.path.exists(model):
        if known not in OPT_FAMILY:
            raise UserError(
                f"--model {model}: there is no such folder or config.json, and it is none of "
                f"{', '.join(f'facebook/{name}' for name in OPT_FAMILY)}."
                f"{did_you_mean(known, OPT_FAMILY)} The hub is not asked: download the model's "
                "config.json and give its path"
            )
        return shape_of(OPTConfig(**OPT_FAMILY[known]), model, dtype)
    path = Path(model)
    path = path / "config.json" if os.path.isdir(path) else path
    content = _read(path)
    for kernel in ("attn_implementation", "_attn_implementation"):
        content.pop(kernel, None)  # it may be code from the hub, which is not asked
    with _not_partitioned():
        try:
            return _shape(AutoConfig.for_model(**content), model, dtype)
        except UserError:
            raise
        except Exception as error:  # it may hold anything; of some of it torch asserts more
            raise UserError(
                f"--model {model}: {path} is not a configuration that Transformers can build a "
                f"causal language model from: {reason(error)}"
            ) from error


def shape_of(config: PreTrainedConfig, name: str, dtype: str = "bf16") -> ModelShape:
    """Return the shape of the causal language model that a configuration describes.

    Raises:
        UserError: if it has no blocks, or its output projection is no parameter of its own.
    """
    with _not_partitioned():
        return _shape(config, name, dtype)


def reason(error: Exception) -> str:
    """Return what an error of a library says, as the end of a sentence: some list all they know."""
    return shown(f"{type(error).__name__}: {error}".partition("\n")[0], 300).rstrip(".: ")


def _read(path: Path) -> dict[str, Any]:
    """Read the configuration of a model that can be planned.

    Raises:
        UserError: if it cannot be read, or is not one.
    """
    try:
        content = json.loads(read_regular(path, "utf-8"))
    except FileNotFoundError:
        raise UserError(f"--model {path.parent}: the folder has no config.json") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"--model {path} cannot be read as JSON: {reason(error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"--model {path} must hold a JSON object, not {type(content).__name__}")
    model_type = content.get("model_type")
    if not isinstance(model_type, str):
        raise UserError(
            f"--model {path} has no model_type, by which Transformers knows what to build"
        )
    if model_type not in CONFIG_MAPPING:
        raise UserError(
            f"--model {path}: Transformers {transformers.__version__} knows no model_type "
            f"{shown(model_type)!r}.{did_you_mean(model_type, CONFIG_MAPPING)}"
        )
    if content.get("quantization_config") is not None:
        raise UserError(
            f"--model {path} has a quantization_config: training of quantised weights is not "
            "planned. Remove it to plan with weights of --dtype"
        )
    return content


def _shape(config: PreTrainedConfig, name: str, dtype: str) -> ModelShape:
    text = json.dumps({**config.to_dict(), "model_type": config.model_type}, sort_keys=True)
    model: Any = _build(json.loads(text), dtype, None)
    parameters = {parameter: index for index, parameter in enumerate(model.parameters())}
    modules = list(model.modules())
    places = {module: index for index, module in enumerate(modules)}
    layers = list(blocks(model))
    head = model.get_output_embeddings()
    if not layers or head is None:
        raise UserError(f"{name} has no decoder layers in an nn.ModuleList, or no output embedding")
    limits = config.get_text_config()
    return ModelShape(
        name=name,
        config=text,
        dtype=dtype,
        sizes=tuple(tuple(parameter.shape) for parameter in parameters),
        modules=tuple(
            tuple(dict.fromkeys(parameters[p] for p in module.parameters(recurse=False)))
            for module in modules
        ),
        blocks=tuple(places[layer] for layer in layers),
        block_parameters=tuple(
            tuple(parameters[p] for p in layer.parameters()) for layer in layers
        ),
        separate=frozenset(places[layer] for layer in separate_blocks(model)),
        uniform=frozenset(places[layer] for layer in layers if is_uniform(layer)),
        vocabulary=head.weight.shape[0],
        positions=getattr(limits, "max_position_embeddings", None),
        head=parameters[head.weight],
        tied=head.weight is model.get_input_embeddings().weight,
        hidden=limits.hidden_size,
    )


@contextmanager
def _not_partitioned() -> Iterator[None]:
    """Build models whole, where a training under ZeRO-3 would have them partitioned."""
    with mock.patch.object(modeling_utils, "is_deepspeed_zero3_enabled", return_value=False):
        yield


def _build(config: dict[str, Any], dtype: str, attention: str | None) -> nn.Module:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**config),
            dtype=DTYPES[dtype],
            **({"attn_implementation": attention} if attention else {}),
        )
