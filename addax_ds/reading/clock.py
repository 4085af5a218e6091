"""Date and time as chat templates read them."""

from __future__ import annotations

import locale
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CLOCK = "strftime_now"  # the function of templates


@contextmanager
def clock_at(now: datetime) -> Iterator[None]:
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


def moments_read(tokenizer: PreTrainedTokenizerBase, now: datetime) -> list[str]:
    """Return what a tokenizer's chat templates read of a moment; equal for equal texts.

    A template that calls ``strftime_now("...")`` alone reads what this writes, as "26 Nov 2026";
    one that does anything else with it reads all of the moment.
    """
    from jinja2 import TemplateError, nodes
    from transformers.utils import chat_template_utils

    given = tokenizer.chat_template or {}
    found: list[str] = []
    with clock_at(now):
        for template in given.values() if isinstance(given, dict) else [given]:
            try:
                environment = chat_template_utils._compile_jinja_template(template).environment
            except TemplateError:  # who renders it says so
                continue
            tree = environment.parse(template)
            calls = [call for call in tree.find_all(nodes.Call) if _is_literal(call)]
            tests = [test for test in tree.find_all(nodes.Test) if test.name == "defined"]
            harmless = {id(node.node) for node in (*calls, *tests)}
            names = [name for name in tree.find_all(nodes.Name) if name.name == _CLOCK]
            if any(id(name) not in harmless for name in names):
                return [now.isoformat()]
            write = environment.globals[_CLOCK]
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
