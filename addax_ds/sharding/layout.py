"""Where the weights of a run lie."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """How the weights of a run are laid out over its ranks.

    Attributes:
        sharding: name of the back end (`addax_ds.sharding.registry`).
        replicas: copies of the weights, each sharded over consecutive ranks.
        cpu_offload: whether they are in host memory, of a back end without a JSON that says so.
    """

    sharding: str = "none"
    replicas: int = 1
    cpu_offload: bool = False
