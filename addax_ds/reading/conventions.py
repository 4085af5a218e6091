"""Rows of Alpaca and of ShareGPT, as prompts or messages."""

from __future__ import annotations

from typing import Any

from addax_ds.utils.errors import UserError
from addax_ds.utils.messages import did_you_mean, shown

# As in train.py of github.com/tatsu-lab/stanford_alpaca.
_ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{instruction}\n\n### Response:"
)

SHAREGPT_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard"), "assistant"),
    "system": "system",
    **dict.fromkeys(("tool", "observation"), "tool"),
}
"""Role by what ShareGPT's rows call it."""


def alpaca_prompt(instruction: str, further: str) -> str:
    """Return the prompt that Stanford Alpaca was trained on; ``further`` may be empty."""
    template = _ALPACA_WITH_INPUT if further else _ALPACA
    return template.format(instruction=instruction, input=further)


def alpaca_messages(instruction: str, further: str, output: str) -> list[dict[str, str]]:
    """Return what a user asks, the input below the instruction, and the assistant answers."""
    asked = f"{instruction}\n\n{further}" if further else instruction
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": output}]


def sharegpt_messages(value: object, origin: str) -> object:
    """Return ShareGPT's turns as messages; other keys of a turn stay.

    Turns that have no ``from`` are returned as they are: some data sets have messages in that
    column.

    Args:
        value: list of ``{"from": ..., "value": ...}``.
        origin: where the row comes from.

    Raises:
        UserError: a turn is from somebody who has no role.
    """
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        return value
    return [
        _message(turn, f"{origin}: conversations[{i}]") if "from" in turn else turn
        for i, turn in enumerate(value)
    ]


def _message(turn: dict[str, Any], place: str) -> dict[str, Any]:
    speaker = turn["from"]
    role = SHAREGPT_ROLES.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        meant = did_you_mean(str(speaker).strip().lower(), SHAREGPT_ROLES)
        raise UserError(
            f"{place}.from is {shown(repr(speaker))}; expected one of "
            f"{', '.join(SHAREGPT_ROLES)}.{meant}"
        )
    rest = {key: value for key, value in turn.items() if key not in ("from", "value")}
    return {"role": role, "content": turn.get("value"), **rest}
