"""A model of which a rank holds its part and no more, before there are any values in it."""

from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.initialization import no_init_weights
from transformers.integrations import deepspeed_config
from transformers.modeling_utils import set_zero3_state

from addax_ds.sharding.fsdp2 import materialize, shard_model
from addax_ds.sharding.zero3 import partition_empty


def empty_model(config: PreTrainedConfig, dtype: torch.dtype, **options: Any) -> Any:
    """Build a model with its parameters on the meta device and its buffers as they are.

    Args:
        config: of the model.
        dtype: of the weights.
        **options: of ``AutoModelForCausalLM.from_config``.
    """
    with (
        no_init_weights(),
        init_empty_weights(include_buffers=False),
        set_zero3_state(),  # or Transformers makes, partitions and broadcasts random weights
    ):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, **options)
    # Only now, or buffers would be computed in the dtype of the weights.
    model.initialize_weights()
    model.tie_weights()  # moving them to the meta device one by one has cut the ties
    return model


def lay_out(model: Any, sharding: str, device: torch.device) -> None:
    """Give memory to what this rank holds of an `empty_model`.

    Values of parameters are undefined afterwards; buffers keep theirs.

    Args:
        model: changed in place.
        sharding: "fsdp2", "none", or "zero3", for which Transformers has the live JSON.
        device: where it goes.
    """
    if sharding == "fsdp2":
        shard_model(model)
    elif sharding == "zero3":
        partition_empty(model, deepspeed_config())
    materialize(model, device)
    if sharding == "none":
        model.tie_weights()  # giving them memory one by one has cut the ties
