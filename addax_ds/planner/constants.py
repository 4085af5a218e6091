"""Constants of a plan."""

GRAIN = 16
"""Tokens; L_T is planned in multiples of it."""
GB = 10**9
FORWARD, BACKWARD = 1, 2
"""Computation of a token in units of its forward pass (Kaplan et al., "Scaling Laws for Neural
Language Models", section 2.1: a backward takes twice as many operations)."""
RESERVE = 4 * GB
"""Of a GPU's memory, for what is not a tensor: CUDA context, NCCL, fragmentation; an assumption."""


def first_order_units(recomputes: bool) -> int:
    """Return the forward passes that a first-order token costs, with checkpointing or without."""
    return FORWARD + BACKWARD + (FORWARD if recomputes else 0)
