"""The methods of training, and what they have in common."""

from typing import Literal, get_args

Method = Literal["addax", "addax-wa", "mezo", "ip-sgd", "sgd", "adamw"]

METHODS: tuple[Method, ...] = get_args(Method)

ZEROTH_ORDER: tuple[Method, ...] = ("addax", "addax-wa", "mezo")
"""Methods with a zeroth-order part."""

FIRST_ORDER: tuple[Method, ...] = tuple(method for method in METHODS if method != "mezo")
"""Methods with a first-order part."""

BASELINES: tuple[Method, ...] = ("sgd", "adamw")
"""Methods that are not Addax at some alpha: torch's optimizers in DeepSpeed's ZeRO-3."""

IN_PLACE: tuple[Method, ...] = tuple(method for method in METHODS if method not in BASELINES)
"""Methods that are Addax at some alpha, whose model state is the weights."""
