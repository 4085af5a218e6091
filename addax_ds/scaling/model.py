"""A model with random weights, of which a rank makes what it holds and no more."""

from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.initialization import no_init_weights
from transformers.integrations import deepspeed_config
from transformers.modeling_utils import set_zero3_state

from addax_ds.sharding.attach import back_end_of
from addax_ds.sharding.fsdp2 import materialize, shard_model
from addax_ds.sharding.zero3 import partition_empty

_STANDARD_DEVIATION = 0.02


def random_model(
    config: PreTrainedConfig, sharding: str, dtype: torch.dtype, device: torch.device
) -> nn.Module:
    """Build a model as `ModelSource.load` does, with random weights instead of files.

    Matrices are normal with a standard deviation of 0.02, gains 1 and biases 0. Ranks draw
    different numbers, and the weights depend on their number: losses are finite, and mean nothing.

    Args:
        config: of the model.
        sharding: "zero3" (the live `TrainingArguments` have the JSON) or "fsdp2".
        dtype: of the weights.
        device: where the weights go.
    """
    with no_init_weights(), init_empty_weights(include_buffers=False), set_zero3_state():
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.initialize_weights()  # buffers
    model.tie_weights()  # moving them to the meta device one by one has cut the ties
    if sharding == "fsdp2":
        shard_model(model)
    else:
        partition_empty(model, deepspeed_config())
    materialize(model, device)
    back_end = back_end_of(model)
    for name, parameter in model.named_parameters():
        _, data = back_end.local_slice(parameter)
        if len(back_end.full_shape(parameter)) >= 2:
            data.normal_(0.0, _STANDARD_DEVIATION)
        else:
            data.fill_(0.0 if name.endswith("bias") else 1.0)
    return model
