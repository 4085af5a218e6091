"""Conversations as the tokenizer's chat template writes them, and which part of them is learnt."""

from __future__ import annotations

import inspect
import json
import locale
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from addax_ds.utils.errors import UserError
from addax_ds.utils.messages import did_you_mean, shown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ROLES = ("assistant", "user", "system", "developer", "tool", "function")
_CALLS = ("tool_calls", "function_call")
_REASONING = ("reasoning_content", "reasoning", "thinking")  # names of one thing
_CLOCK = "strftime_now"  # in templates
_OTHER_WEIGHTS = ("train", "training", "loss")  # of other programs; "weight" is OpenAI's


@dataclass(frozen=True)
class Conversation:
    """A row of messages.

    Attributes:
        messages: as the chat template gets them, at least one.
        learnt: whether each of them carries loss.
        tools: JSON schemas of what the model may call, if any.
        options: further variables of the chat template.
        origin: where the row comes from, for messages.
    """

    messages: list[dict[str, Any]]
    learnt: list[bool]
    tools: list[Any] | None
    options: dict[str, Any]
    origin: str

    @classmethod
    def of(cls, messages: object, tools: object, options: object, origin: str) -> Conversation:
        """Check the values of a row's columns; the last two may be None.

        Raises:
            UserError: one is not what it should be.
        """
        checked = _messages(messages, origin)
        return cls(
            [{k: v for k, v in message.items() if k != "weight"} for message in checked],
            [_is_learnt(m, f"{origin}: messages[{i}]") for i, m in enumerate(checked)],
            _tools(tools, origin),
            _options(options, origin),
            origin,
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
        UserError: see `addax_ds.data.records.chat`.
    """
    origin, messages = conversation.origin, conversation.messages
    require_chat_template(tokenizer, origin)
    with _clock_at(now or datetime.now()):
        text = _render(conversation, tokenizer)
        targets = []
        for index in (i for i, learnt in enumerate(conversation.learnt) if learnt):
            if index == 0:
                raise UserError(
                    f"{origin}: messages start with the assistant; put a message before"
                )
            before = _render(conversation, tokenizer, index, add_generation_prompt=True)
            through = _render(conversation, tokenizer, index + 1)
            if not (through.startswith(before) and text.startswith(through)):
                raise UserError(
                    f"{origin}: the tokenizer's chat template writes the conversation up to "
                    f"messages[{index}] differently when later text follows, so the assistant's "
                    "tokens cannot be told apart; write the rows as prompt + completion instead"
                )
            turn = through[len(before) :]
            if not turn.strip():
                raise UserError(
                    f"{origin}: the tokenizer's chat template writes nothing for messages[{index}]"
                )
            length = _learnt_length(turn, messages[index].get("content"))
            targets.append((len(before), len(before) + length))
        if not targets:
            raise UserError(
                f"{origin}: messages hold no turn of the role 'assistant' to learn from (one of "
                "weight 0 is not learnt)"
            )
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


def moments_read(tokenizer: PreTrainedTokenizerBase, now: datetime) -> list[str]:
    """Return what a tokenizer's chat templates read of a moment; equal for equal texts.

    A template that calls ``strftime_now("...")`` alone reads what this writes, as "26 Nov 2026";
    one that does anything else with it reads all of the moment.
    """
    from jinja2 import TemplateError, nodes
    from transformers.utils import chat_template_utils

    given = tokenizer.chat_template or {}
    found: list[str] = []
    with _clock_at(now):
        for template in given.values() if isinstance(given, dict) else [given]:
            try:
                compiled = chat_template_utils._compile_jinja_template(template)
            except TemplateError:  # who renders it says so
                continue
            tree = compiled.environment.parse(template)
            calls = [call for call in tree.find_all(nodes.Call) if _is_literal(call)]
            tests = [test for test in tree.find_all(nodes.Test) if test.name == "defined"]
            harmless = {id(node.node) for node in (*calls, *tests)}
            names = [name for name in tree.find_all(nodes.Name) if name.name == _CLOCK]
            if any(id(name) not in harmless for name in names):
                return [now.isoformat()]
            write = compiled.environment.globals[_CLOCK]
            found += [write(call.args[0].value) for call in calls]
    return found


def _is_literal(call: Any) -> bool:
    """Return whether a node of a template is ``strftime_now`` with nothing but a string."""
    from jinja2 import nodes

    return (
        isinstance(call.node, nodes.Name)
        and call.node.name == _CLOCK
        and len(call.args) == 1
        and isinstance(call.args[0], nodes.Const)
        and not (call.kwargs or call.dyn_args or call.dyn_kwargs)
    )


# ---- what a row holds --------------------------------------------------------------------------


def _messages(value: object, origin: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise UserError(f"{origin}: messages must be a non-empty list of {{role, content}} objects")
    for index, message in enumerate(value):
        place = f"messages[{index}]"
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
    """Raise if the role is a slip of the pen: its turn would be rendered, and never learnt.

    Which other roles there are is the template's business.
    """
    if not role.strip():
        raise UserError(f"{place} is empty; expected one of {', '.join(_ROLES)}")
    meant = did_you_mean(role.strip().lower(), _ROLES, cutoff=0.8)
    if role not in _ROLES and meant:
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


@contextmanager
def _clock_at(now: datetime) -> Iterator[None]:
    """Let chat templates read a moment that stands still, in no country's spelling."""
    from transformers.utils import chat_template_utils

    templates: Any = chat_template_utils  # whose strftime_now reads the module's datetime
    clock, spelling = templates.datetime, locale.setlocale(locale.LC_TIME)
    locale.setlocale(locale.LC_TIME, "C")
    templates.datetime = SimpleNamespace(now=lambda: now)
    try:
        yield
    finally:
        templates.datetime = clock
        locale.setlocale(locale.LC_TIME, spelling)


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
                    f"messages[{index}].{given[0]}; use a model whose template does, or take it out"
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
