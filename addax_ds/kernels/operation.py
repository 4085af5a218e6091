"""What the kernels compute, apart from how."""

from dataclasses import dataclass

STREAM_Z = 0
STREAM_ROUNDING = 1


@dataclass(frozen=True)
class Draw:
    """Which random numbers: everything that goes into a counter besides the element.

    Attributes:
        seed: 64-bit key.
        step: index of the step, 32 bits.
        parameter_id: 32 bits.
        probe: index of the direction within the step, 31 bits; Addax uses number 0 alone.
    """

    seed: int
    step: int
    parameter_id: int
    probe: int = 0
