"""Binding an optimizer to a model that no engine drives."""

from torch import nn

from addax_ds.optim.addax import Addax
from addax_ds.sharding.base import Sharding
from addax_ds.sharding.registry import back_end_of


def attach(optimizer: Addax, model: nn.Module) -> Sharding:
    """Attach an optimizer to a model: sharded by ``fully_shard``, or whole on each rank.

    Afterwards ``loss.backward()`` updates the weights as it goes, and ``model`` sees perturbed
    weights inside `Addax.measure`. A whole model on several ranks is replicated: the ranks start
    from rank 0's weights, and each gradient is averaged before it is applied.

    Args:
        optimizer: built from the parameters of ``model``.
        model: the model. Shard it first; do not wrap it in DistributedDataParallel.

    Returns:
        The back end; its ``detach()`` gives the model back as it was.

    Raises:
        UserError: if the optimizer's parameters are not the model's, or for a model that is
            sharded or wrapped in another way.
    """
    sharding = back_end_of(model).from_model(model, optimizer.param_groups)
    optimizer.bind(sharding)
    return sharding
