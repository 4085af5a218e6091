"""Conversations as the tokenizer's chat template writes them, and which part of them is learnt."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any

from addax_ds.reading.clock import clock_at
from addax_ds.reading.conventions import SHAREGPT_ROLES
from addax_ds.utils.errors import UserError
from addax_ds.utils.messages import did_you_mean, shown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ROLES = ("assistant", "user", "system", "developer", "tool", "function")
_ASSISTANTS = ("model", "bot", "ai")  # what else templates and data sets call it
_CALLS = ("tool_calls", "function_call")
_REASONING = ("reasoning_content", "reasoning", "thinking")  # names of one thing
_OTHER_WEIGHTS = ("train", "training", "loss")  # of other programs; "weight" is OpenAI's


@dataclass(frozen=True)
class Conversation:
    """A row of messages.

    Attributes:
        messages: as the chat template gets them, at least one.
        places: what to call each of them: "messages[0]".
        learnt: whether each of them carries loss.
        tools: JSON schemas of what the model may call, if any.
        options: further variables of the chat template.
        origin: where the row comes from, for messages.
    """

    messages: list[dict[str, Any]]
    places: list[str]
    learnt: list[bool]
    tools: list[Any] | None
    options: dict[str, Any]
    origin: str

    @classmethod
    def of(
        cls, parts: Mapping[str, object], tools: object, options: object, origin: str
    ) -> Conversation:
        """Check the values of a row's columns.

        Args:
            parts: lists of messages by the names of their columns, in order; of the last one the
                assistant's turns are learnt, and of those before it none.
            tools: the JSON schemas; may be None.
            options: further variables of the template; may be None.
            origin: where the row comes from.

        Raises:
            UserError: one is not what it should be.
        """
        *_, last = parts
        messages, places, learnt = [], [], []
        for name, value in parts.items():
            for index, message in enumerate(_messages(value, name, origin)):
                places.append(f"{name}[{index}]")
                is_learnt = _is_learnt(message, f"{origin}: {places[-1]}")
                learnt.append(is_learnt and name == last)
                messages.append({k: v for k, v in message.items() if k != "weight"})
        if not any(learnt):
            raise UserError(
                f"{origin}: {last}: no turn of the role 'assistant' to learn from (one of "
                "weight 0 is not learnt)"
            )
        return cls(
            messages, places, learnt, _tools(tools, origin), _options(options, origin), origin
        )

    def without(self, index: int, keys: Sequence[str]) -> Conversation:
        """Return the conversation without some keys of a message."""
        messages = list(self.messages)
        kept = {k: v for k, v in messages[index].items() if k not in keys}
        messages[index] = {**kept, "content": kept.get("content", "")}
        return replace(self, messages=messages)


def learnt_turns(
    conversation: Conversation, tokenizer: PreTrainedTokenizerBase, now: datetime | None = None
) -> tuple[str, tuple[tuple[int, int], ...]]:
    """Return a conversation in the tokenizer's chat template, and the spans that are learnt.

    A turn is found by rendering prefixes: it is what the template writes for `messages[:i + 1]`
    beyond `messages[:i]` with the generation prompt, so it is exactly what the model has to
    produce at inference, end-of-turn mark included.

    Args:
        conversation: the row.
        tokenizer: has a chat template.
        now: date and time that the template reads, local and without a zone; None for the clock.

    Raises:
        UserError: see `addax_ds.reading.records.chat`.
    """
    origin, messages = conversation.origin, conversation.messages
    require_chat_template(tokenizer, origin)
    _require_known_roles(conversation, tokenizer)
    with clock_at(now or datetime.now()):
        text = _render(conversation, tokenizer)
        targets = []
        for index in (i for i, learnt in enumerate(conversation.learnt) if learnt):
            if index == 0:
                raise UserError(
                    f"{origin}: {conversation.places[0]} is the assistant's; put a message before"
                )
            before = _render(conversation, tokenizer, index, add_generation_prompt=True)
            through = _render(conversation, tokenizer, index + 1)
            if not (through.startswith(before) and text.startswith(through)):
                raise UserError(
                    f"{origin}: the tokenizer's chat template writes the conversation up to "
                    f"{conversation.places[index]} differently when later text follows, so the "
                    "assistant's tokens cannot be told apart; write the rows as prompt + "
                    "completion instead"
                )
            turn = through[len(before) :]
            if not turn.strip():
                raise UserError(
                    f"{origin}: the tokenizer's chat template writes nothing for "
                    f"{conversation.places[index]}"
                )
            length = _learnt_length(turn, messages[index].get("content"))
            targets.append((len(before), len(before) + length))
        _check_written(conversation, tokenizer, text)
    return text, tuple(targets)


def require_chat_template(tokenizer: PreTrainedTokenizerBase, origin: str) -> None:
    """Raise a `UserError` if the tokenizer cannot render conversations."""
    if not tokenizer.chat_template:
        raise UserError(
            f"{origin}: messages need a chat template and this model's tokenizer has none; use an "
            "instruction-tuned model, add chat_template.jinja to the model's folder, or write the "
            "rows as prompt + completion"
        )


def _require_known_roles(conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise if a role is neither a common one nor spelled by the template.

    A template may write any role, but only a model that was trained on it knows it.
    """
    templates: Any = tokenizer.chat_template
    source = "\n".join(templates.values()) if isinstance(templates, dict) else templates
    for place, message in zip(conversation.places, conversation.messages, strict=True):
        role = message["role"]
        if role not in _ROLES and not any(f"{q}{role}{q}" in source for q in "'\""):
            raise UserError(
                f"{conversation.origin}: {place}.role is {shown(role)!r}, which the tokenizer's "
                f"chat template does not know; expected one of {', '.join(_ROLES)}"
            )


# ---- what a row holds --------------------------------------------------------------------------


def _messages(value: object, name: str, origin: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise UserError(f"{origin}: {name} must be a non-empty list of {{role, content}} objects")
    for index, message in enumerate(value):
        place = f"{name}[{index}]"
        if not isinstance(message, dict):
            kind = type(message).__name__
            raise UserError(f"{origin}: {place} must be an object, got a {kind}")
        calls = message.get("role") == "assistant" and any(message.get(key) for key in _CALLS)
        for key in ("role", "content"):
            given = message.get(key)
            if not isinstance(given, str) and not (key == "content" and given is None and calls):
                raise UserError(
                    f"{origin}: {place}.{key} must be a string, got a {type(given).__name__}"
                )
        _require_role(message["role"], f"{origin}: {place}.role")
        if message["role"] == "assistant" and not (message["content"] or calls):
            raise UserError(f"{origin}: {place}, an assistant's turn, is empty")
    return value


def _require_role(role: str, place: str) -> None:
    """Raise if the role is a slip of the pen, or another name of the assistant's.

    Its turn would be rendered, and never learnt. Which other roles there are is the template's
    business (`_require_known_roles`).
    """
    if not role.strip():
        raise UserError(f"{place} is empty; expected one of {', '.join(_ROLES)}")
    if role in _ROLES:
        return
    bare = role.strip().lower()
    is_assistant = bare in _ASSISTANTS or SHAREGPT_ROLES.get(bare) == "assistant"
    meant = did_you_mean("assistant" if is_assistant else bare, _ROLES, cutoff=0.8)
    if meant:
        raise UserError(f"{place} is {shown(role)!r}.{meant}")


def _is_learnt(message: Mapping[str, Any], place: str) -> bool:
    """Return whether a message carries loss: the assistant's do, unless they have weight 0."""
    other = next((key for key in _OTHER_WEIGHTS if message.get(key) is not None), None)
    if other is not None:
        raise UserError(
            f'{place}.{other} is not known here: a turn that is not to be learnt has "weight": 0'
        )
    weight = message.get("weight")
    if weight is None:
        return message["role"] == "assistant"
    if not isinstance(weight, int | float) or weight not in (0, 1):
        raise UserError(f"{place}.weight must be 0 or 1, got {shown(json.dumps(weight))}")
    if weight and message["role"] != "assistant":
        raise UserError(f"{place}.weight is 1, but only the assistant's turns are learnt")
    return bool(weight)


def _tools(value: object, origin: str) -> list[Any] | None:
    """Return the schemas; some data sets hold them as a string of JSON, which TRL reads, too."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise UserError(f"{origin}: tools is a string that is not JSON: {error}") from None
    if value is None or value == []:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise UserError(f"{origin}: tools must be a list of objects, the JSON schemas of functions")
    return value


def _options(value: object, origin: str) -> dict[str, Any]:
    from transformers import PreTrainedTokenizerBase

    if value is None:
        return {}
    if not isinstance(value, dict):
        kind = type(value).__name__
        raise UserError(f"{origin}: chat_template_kwargs must be an object, got a {kind}")
    taken = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters
    # "documents" is an argument that is handed on to the template.
    reserved = next((name for name in value if name in taken and name != "documents"), None)
    if reserved is not None:
        raise UserError(
            f"{origin}: chat_template_kwargs.{reserved} is no variable of the chat template; take "
            "it out"
        )
    return value


# ---- the template ------------------------------------------------------------------------------


def _render(
    conversation: Conversation,
    tokenizer: PreTrainedTokenizerBase,
    end: int | None = None,
    *,
    add_generation_prompt: bool = False,
) -> str:
    """Return the messages up to ``end`` as the chat template writes them."""
    try:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in conversation.messages[:end]],
            tools=conversation.tools,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            **conversation.options,
        )
    except Exception as error:  # a template is a program of the model's author
        raise UserError(
            f"{conversation.origin}: the chat template refuses the messages: {error}"
        ) from error
    assert isinstance(text, str)  # because of tokenize=False
    return text


def _learnt_length(turn: str, content: str | None) -> int:
    """Return how many characters of an assistant's turn are learnt.

    Many templates write a newline after the end-of-turn mark. Generation stops at the mark, so the
    model never has to produce what follows. Without a mark, the whitespace is the end of the turn.
    """
    bare = turn.rstrip()
    return len(turn) if content and bare.endswith(content.rstrip()) else len(bare)


def _check_written(
    conversation: Conversation, tokenizer: PreTrainedTokenizerBase, text: str
) -> None:
    """Check that the template has written all that carries meaning, by leaving it out.

    Content that occurs anywhere in the text counts as written.

    Raises:
        UserError: the text is the same without it.
    """
    for index, message in enumerate(conversation.messages):
        # Templates leave out what the assistant has thought before; only where it is learnt not.
        reasoning = _REASONING if conversation.learnt[index] else ()
        for keys in (("content",), *((key,) for key in _CALLS), reasoning):
            given = [key for key in keys if message.get(key)]
            if not given or (keys == ("content",) and message["content"].strip() in text):
                continue
            if _writes_same(conversation.without(index, keys), tokenizer, text):
                raise UserError(
                    f"{conversation.origin}: the tokenizer's chat template writes nothing of "
                    f"{conversation.places[index]}.{given[0]}; use a model whose template does, or "
                    "take it out"
                )
    if conversation.tools and _writes_same(replace(conversation, tools=None), tokenizer, text):
        raise UserError(
            f"{conversation.origin}: the tokenizer's chat template writes nothing of tools; use a "
            "model whose template does, or take the column out"
        )


def _writes_same(conversation: Conversation, tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    try:
        return _render(conversation, tokenizer) == text
    except UserError:  # it looks for what was left out
        return False
