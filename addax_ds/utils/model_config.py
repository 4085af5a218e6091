"""What a model's configuration says of its limits."""

from typing import Any


def vocabulary_size(config: Any) -> int | None:
    """Return for how many tokens a model has embeddings, if its configuration says it."""
    if not hasattr(config, "get_text_config"):
        return None
    return getattr(config.get_text_config(), "vocab_size", None)


def max_positions(config: Any) -> int | None:
    """Return the longest sequence that a model takes, if its configuration has a limit."""
    if not hasattr(config, "get_text_config"):
        return None
    return getattr(config.get_text_config(), "max_position_embeddings", None)
