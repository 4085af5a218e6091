"""What is said of flags that other programs have."""

import dataclasses
import re

import pytest

from addax_ds import AddaxConfig, UserError
from addax_ds.config.arguments import DataArguments, ModelArguments, parse_arguments
from addax_ds.config.former_flags import FORMER_FLAGS

KNOWN = {
    field.name
    for kind in (ModelArguments, DataArguments, AddaxConfig)
    for field in dataclasses.fields(kind)
}


def test_no_flag_that_there_is_is_called_a_former_one():
    assert not FORMER_FLAGS.keys() & KNOWN


@pytest.mark.parametrize("name", FORMER_FLAGS)
def test_what_is_named_instead_exists(name):
    assert set(re.findall(r"--(\w+)", FORMER_FLAGS[name])) <= KNOWN


def test_the_command_line_and_argument_files_say_it(tmp_path):
    with pytest.raises(UserError, match=r"Unknown flag --warmup_ratio\. --warmup_steps takes a"):
        parse_arguments(["--warmup_ratio", "0.1"])
    with pytest.raises(UserError, match=r"Unknown flag --packing\. Rows are not packed"):
        parse_arguments(["--packing=True"])
    path = tmp_path / "run.yaml"
    path.write_text("evaluation_strategy: steps\n")
    with pytest.raises(
        UserError, match=r"evaluation_strategy: no such argument\. It is --eval_str"
    ):
        parse_arguments([str(path)])


def test_a_share_is_what_warmup_steps_takes(tmp_path):
    args = AddaxConfig(str(tmp_path), use_cpu=True, learning_rate=0.1, warmup_steps=0.25)
    assert args.get_warmup_steps(100) == 25
