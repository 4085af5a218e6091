"""Record of what was called in a step: forwards, and the gradients of backwards."""

import torch


class Calls:
    """Calls since the last step, by which mistakes in their order are found.

    The back end owns it and notes forwards and gradients. The optimizer notes where the passes of a
    step end, and asks (`addax_ds.optim.call_order`).
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget all calls, as after a step."""
        self._forward_ran = self._gradient_arrived = False

    def forward_ran(self) -> None:
        """Note a forward of the model; one without autograd has no backward and does not count."""
        self._forward_ran |= torch.is_grad_enabled()

    def gradient_arrived(self) -> None:
        """Note a gradient; also one whose shard on this rank is empty."""
        self._gradient_arrived = True

    def passes_ended(self) -> None:
        """Note that the passes of a step are over: the backwards among them were not its last."""
        self._gradient_arrived = False

    @property
    def has_forward(self) -> bool:
        """Whether a forward with autograd ran, its backward or not."""
        return self._forward_ran

    @property
    def has_gradient(self) -> bool:
        """Whether a gradient of the step's last backward has arrived."""
        return self._gradient_arrived

    @property
    def awaits_backward(self) -> bool:
        """Whether a forward with autograd ran whose backward has not begun."""
        return self._forward_ran and not self._gradient_arrived
