"""Units and constants of a plan."""

GRAIN = 16
"""Tokens; L_T is planned in multiples of it."""
GB = 10**9
RESERVE = 4 * GB
"""Of a GPU's memory, for what is not a tensor: CUDA context, NCCL, fragmentation; an assumption."""
