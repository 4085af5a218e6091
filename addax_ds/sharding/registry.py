"""The back ends."""

from torch import nn
from torch.distributed.fsdp import FSDPModule

from addax_ds.sharding.base import Sharding
from addax_ds.sharding.fsdp2 import Fsdp2
from addax_ds.sharding.unsharded import Unsharded
from addax_ds.sharding.zero3 import Zero3Sharding


def back_end_of(model: nn.Module) -> type[Sharding]:
    """Say which back end holds the weights of a model, attached or not."""
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        return Zero3Sharding
    if any(isinstance(module, FSDPModule) for module in model.modules()):
        return Fsdp2
    return Unsharded
