"""Where a model stops that has learnt turns with ends of their own."""

from typing import Any

import pytest

from addax_ds.models.stopping import stop_at
from tests.support.tiny import tiny_model, tiny_tokenizer

EOS, WORD = 1, 7


def stops(before: Any, ends: set[int]) -> Any:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["w8", "w9"]})
    model.generation_config.eos_token_id = before
    stop_at(model, ends, tokenizer)
    return model.generation_config.eos_token_id


MARK, OTHER = (tiny_tokenizer().convert_tokens_to_ids(word) for word in ("w8", "w9"))


@pytest.mark.parametrize(
    ("before", "ends", "after", "said"),
    [
        (EOS, {MARK}, [EOS, MARK], "turns with w8: saved models stop there, too"),
        ([EOS, OTHER], {MARK}, [EOS, OTHER, MARK], "turns with w8: saved models stop there, too"),
        (None, {MARK, OTHER}, [MARK, OTHER], "turns with w8, w9: saved models"),
        (MARK, {MARK}, MARK, None),
        ([OTHER, MARK], {MARK}, [OTHER, MARK], None),
        # That Trainer adds where it is missing.
        (EOS, {EOS}, EOS, None),
        (OTHER, {EOS}, OTHER, None),
        # Other text makes the token, too.
        (EOS, {WORD}, EOS, "with no special token, but with 'w4': saved models go on there"),
        (EOS, {WORD, MARK}, [EOS, MARK], "with no special token, but with 'w4'"),
        (EOS, set(), EOS, None),
    ],
)
def test_a_model_stops_at_tokens_that_only_end_turns(before, ends, after, said, caplog):
    with caplog.at_level("INFO", logger="addax_ds"):
        assert stops(before, ends) == after
    assert (said or "") in caplog.text
    assert bool(caplog.text) == bool(said)
