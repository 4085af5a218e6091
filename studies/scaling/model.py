"""A model with random weights, of which a rank makes what it holds and no more."""

import torch
from torch import nn
from transformers import PreTrainedConfig

from addax_ds.models.empty import empty_model
from addax_ds.sharding.registry import back_end

_STANDARD_DEVIATION = 0.02


def random_model(
    config: PreTrainedConfig, sharding: str, dtype: torch.dtype, device: torch.device
) -> nn.Module:
    """Build a model as `ModelSource.load` does, with random weights instead of files.

    Matrices are normal with a standard deviation of 0.02, gains 1 and biases 0. Ranks draw
    different numbers, and the weights depend on their number: losses are finite, and mean nothing.

    Args:
        config: of the model.
        sharding: name of the back end.
        dtype: of the weights.
        device: where the weights go.
    """
    model = empty_model(config, dtype)
    chosen = back_end(sharding)
    chosen.lay_out(model, device)
    for name, parameter in model.named_parameters():
        _, data = chosen.local_slice(parameter)
        if len(chosen.full_shape(parameter)) >= 2:
            data.normal_(0.0, _STANDARD_DEVIATION)
        else:
            data.fill_(0.0 if name.endswith("bias") else 1.0)
    return model
