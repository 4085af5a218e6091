"""Where a model that was trained on conversations stops when it generates."""

import logging
from collections.abc import Collection
from typing import Any

from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def stop_at(model: Any, ends: Collection[int], tokenizer: PreTrainedTokenizerBase) -> None:
    """Make ``generate`` stop at the tokens that learnt turns end in; it is saved with the model.

    A token that may also stand inside a turn, such as a line break, is warned of instead.

    Args:
        model: what it says of generation is changed, if it is one of Transformers that generates.
        ends: ids of the tokens.
        tokenizer: knows which of them are tokens of their own, which no other text makes.
    """
    if not (hasattr(model, "can_generate") and model.can_generate()):
        return
    known = model.generation_config.eos_token_id
    known = [] if known is None else [known] if isinstance(known, int) else list(known)
    new = sorted(set(ends).difference(known, [tokenizer.eos_token_id]))  # Trainer adds EOS itself
    marks = [token for token in new if token in tokenizer.added_tokens_decoder]
    if marks:
        model.generation_config.eos_token_id = known + marks
        logger.info(
            "The chat template ends the assistant's turns with %s: saved models stop there, too, "
            "when they generate (eos_token_id in generation_config.json).",
            ", ".join(tokenizer.convert_ids_to_tokens(marks)),
        )
    if len(marks) < len(new):
        others = [tokenizer.decode([token]) for token in new if token not in marks]
        logger.warning(
            "The chat template ends turns of the assistant with no special token, but with %s: "
            "saved models go on there when they generate. Give generate() what the turns end in as "
            "stop_strings, or take a template that writes a special token.",
            ", ".join(map(repr, others[:3])),
        )
