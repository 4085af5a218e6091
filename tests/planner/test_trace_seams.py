"""The private names of torch and Transformers that the planner patches or reads."""

import inspect
from types import FunctionType

import pytest
import torch
import transformers
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils import _python_dispatch, _pytree
from transformers import PreTrainedModel, masking_utils, modeling_utils
from transformers.integrations import sdpa_attention

NAMES = [
    (modeling_utils, "is_deepspeed_zero3_enabled"),
    (masking_utils, "fast_all"),
    (masking_utils, "find_packed_sequence_indices"),
    (masking_utils, "_ignore_causal_mask_sdpa"),
    (torch._C._nn, "linear"),
    (torch._C._nn, "scaled_dot_product_attention"),
    (torch, "native_dropout"),
    (_python_dispatch, "TorchDispatchMode"),
    (_pytree, "tree_leaves"),
    (_pytree, "tree_map_only"),
]
SOURCES = {
    # Where a patched name is called by the name that is patched.
    PreTrainedModel._from_config: ("= is_deepspeed_zero3_enabled() and",),
    masking_utils._ignore_causal_mask_sdpa: ("fast_all(padding_mask)",),
    masking_utils._preprocess_mask_arguments: ("= find_packed_sequence_indices(position_ids)",),
    masking_utils.sdpa_mask: ("if allow_is_causal_skip and _ignore_causal_mask_sdpa(",),
    sdpa_attention.sdpa_attention_forward: ("torch.nn.functional.scaled_dot_product_attention(",),
    nn.Linear.forward: ("F.linear(",),
    nn.Dropout.forward: ("F.dropout(input, self.p, self.training, self.inplace)",),
    DTensor.to_local: ("self._local_tensor",),
}


@pytest.mark.parametrize(("owner", "name"), NAMES, ids=[name for _, name in NAMES])
def test_the_name_is_there(owner, name):
    assert hasattr(owner, name), (
        f"torch {torch.__version__}, Transformers {transformers.__version__}: {owner.__name__} has "
        f"no {name} any more; addax_ds/planner/trace.py, tape.py or shapes.py relies on it"
    )


@pytest.mark.parametrize(
    ("owner", "text"), [(owner, text) for owner, texts in SOURCES.items() for text in texts]
)
def test_the_name_is_still_called(owner: FunctionType, text):
    assert text in inspect.getsource(owner), (
        f"torch {torch.__version__}, Transformers {transformers.__version__}: {owner.__qualname__} "
        f"has no {text!r} any more; addax_ds/planner/trace.py, tape.py or shapes.py relies on it"
    )
