"""The methods of training, and what they have in common."""

from typing import Literal, get_args

Method = Literal["addax", "addax-wa", "mezo", "ip-sgd", "sgd", "adamw"]

ZEROTH_ORDER: tuple[Method, ...] = ("addax", "addax-wa", "mezo")
"""Methods with a zeroth-order part."""

BASELINES: tuple[Method, ...] = ("sgd", "adamw")
"""Methods that are not Addax at some alpha: torch's optimizers in DeepSpeed's ZeRO-3."""

METHODS: tuple[Method, ...] = get_args(Method)
IN_PLACE = tuple(method for method in METHODS if method not in BASELINES)
"""Methods that are Addax at some alpha, whose model state is the weights."""
