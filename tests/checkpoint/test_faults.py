"""The short version of ``make faults`` (`tests.faults`): two kills in saves, nothing is lost."""

from dataclasses import replace

import pytest

from tests.faults.kills import Kill, Strike, interrupt
from tests.faults.training import Training, write_data

pytestmark = pytest.mark.slow

PLAN = [
    Kill("saving", "one rank", rank=1, delay=0.0, into_save=0.02),
    Kill("saving", "launcher and ranks", rank=0, delay=0.2, into_save=0.01),
]


def test_a_training_that_is_killed_while_it_saves_ends_in_the_same_weights(tmp_path):
    whole = Training("fsdp2", write_data(tmp_path / "data"), tmp_path / "whole", steps=30)
    whole.finish()
    killed = replace(whole, output=tmp_path / "killed")
    strikes: list[Strike] = []
    interrupt(killed, PLAN, strikes.append)
    assert [strike.kill for strike in strikes] == PLAN
    assert all(strike.checkpoints for strike in strikes)
    killed.require_same_result(whole)
