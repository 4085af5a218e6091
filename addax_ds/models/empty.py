"""Models on the meta device, of which a back end then allocates this rank's part."""

from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.initialization import no_init_weights
from transformers.modeling_utils import set_zero3_state


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
