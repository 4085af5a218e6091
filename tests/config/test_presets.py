"""The ready DeepSpeed JSONs, by name."""

import json

import pytest

from addax_ds.config import presets
from addax_ds.config.deepspeed import load_ds_config
from addax_ds.config.presets import find_preset
from addax_ds.utils.errors import UserError
from tests.support.ranks import ROOT


@pytest.mark.parametrize("path", sorted((ROOT / "ds_configs").glob("*.json")), ids=lambda p: p.stem)
def test_a_name_stands_for_a_ready_json(path):
    assert find_preset(path.stem) == str(path)
    config, where = load_ds_config(path.stem)
    assert config == json.loads(path.read_text())
    assert where == str(path)


@pytest.mark.parametrize("source", ["zero3.json", "./zero3", "a b", '{"a": 1}', "", "\0"])
def test_what_cannot_be_a_name_is_left_as_it_is(source):
    assert find_preset(source) == source


def test_a_file_of_that_name_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "zero3").write_text("{}")
    assert find_preset("zero3") == "zero3"


def test_an_unknown_name_is_refused_with_those_there_are():
    with pytest.raises(UserError) as refused:
        find_preset("zero3_ofload")
    assert "There is no DeepSpeed config zero3_ofload (looked in" in str(refused.value)
    assert "Did you mean 'zero3_offload'? Ready are: zero3, zero3_offload." in str(refused.value)


def test_a_folder_of_that_name_does_not_hide_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "zero3").mkdir()
    assert find_preset("zero3") == str(ROOT / "ds_configs" / "zero3.json")


def test_the_first_folder_wins(tmp_path, monkeypatch):
    folders = [tmp_path / "package", tmp_path / "checkout"]
    for folder in folders:
        folder.mkdir()
        (folder / "zero3.json").write_text("{}")
    monkeypatch.setattr(presets, "_FOLDERS", folders)
    assert find_preset("zero3") == str(folders[0] / "zero3.json")
