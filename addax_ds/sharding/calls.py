"""Record of what was called in a step: forwards, and the gradients of backwards."""

from dataclasses import dataclass


@dataclass
class Calls:
    """Calls since the last step, by which mistakes in their order are found.

    The back end notes forwards and gradients. The optimizer notes where the passes of a step end,
    and asks (`addax_ds.optim.call_order`).

    Attributes:
        forward_ran: whether a forward with autograd ran, its backward or not.
        gradient_arrived: whether a gradient of the step's last backward has arrived; also one whose
            shard on this rank is empty.
    """

    forward_ran: bool = False
    gradient_arrived: bool = False

    def clear(self) -> None:
        """Forget all calls, as after a step."""
        self.forward_ran = self.gradient_arrived = False
