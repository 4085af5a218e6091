"""The end of a run: what is written, whatever else cannot be, and whose folder it is then."""

import json
import logging
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

from addax_ds import UserError
from addax_ds.checkpoint import folders
from addax_ds.cli import train
from addax_ds.cli.outputs import Outputs
from addax_ds.config import trials
from addax_ds.distributed import collectives
from addax_ds.training.saving import SavingMixin
from tests.support.tiny import rows, write_model, write_rows

pytestmark = pytest.mark.usefixtures("program_alone")

# As published: a temperature without do_sample. The tokenizer has another end.
GENERATION = {"temperature": 0.6, "top_p": 0.9, "eos_token_id": 5}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """In a folder whose name would be a formula."""
    folder = write_model(tmp_path_factory.mktemp("model") / "cost $5 {or $6")
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_rows(folder / "train.jsonl", rows(7, 9))
    write_rows(folder / "test.jsonl", rows(2, 3, seed=2))
    return folder


def flags(model: Path, data: Path, output: Path, **more: Any) -> list[str]:
    values = {
        **{"model_name_or_path": model, "train_file": data / "train.jsonl"},
        **{"test_file": data / "test.jsonl", "output_dir": output, "max_steps": 2},
        **{"per_device_train_batch_size": 2, "learning_rate": 0.01, "length_threshold": 12},
        **{"save_steps": 1, "logging_steps": 1, "report_to": "none"},
        **more,
    }
    return [f"--{name}={value}" for name, value in values.items()]


def ended(argv: list[str], capsys) -> tuple[int, str]:
    """Exit status of the program, and what it says."""
    status = 0
    try:
        train.main(argv)
    except SystemExit as exit_:
        status = exit_.code
    return status, capsys.readouterr().err


def results(output: Path) -> dict[str, Any]:
    return json.loads((output / "all_results.json").read_text())


def logged(output: Path) -> set[str]:
    state = json.loads((output / "trainer_state.json").read_text())
    return {name for entry in state["log_history"] for name in entry}


def test_a_generation_config_that_transformers_would_not_save_is_kept(
    model, data, tmp_path, capsys
):
    output = tmp_path / "output"
    output.mkdir()
    for name in ("all_results.json", "predictions_test.jsonl"):  # of an earlier run
        (output / name).write_text('{"test_accuracy": 1.0}')
    status, said = ended(flags(model, data, output), capsys)
    assert status == 0, said
    assert "test_accuracy" not in results(output), "there is none for these rows"
    assert not (output / "predictions_test.jsonl").exists()
    for folder in (output / "model", output / "checkpoint-2"):
        AutoModelForCausalLM.from_pretrained(folder)
        kept = GenerationConfig.from_pretrained(folder)
        assert (kept.temperature, kept.top_p, kept.do_sample) == (0.6, 0.9, None)
        assert kept.eos_token_id == [1, 5], "the tokenizer's end has come to it"
    assert (output / "training.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def with_a_hub(monkeypatch) -> None:
    """What is known of the hub without asking it does not forbid an upload."""
    monkeypatch.setattr(trials, "is_offline_mode", lambda: False)
    monkeypatch.setattr(trials, "get_token", lambda: "token")


@pytest.mark.usefixtures("with_a_hub")
def test_an_upload_that_fails_costs_nothing_else(model, data, tmp_path, capsys, monkeypatch):
    output, uploads = tmp_path / "output", []
    waits: list[float] = []
    monkeypatch.setattr(collectives, "limit_waiting", waits.append)

    def fail(self: Any, **given: Any) -> Future[None]:
        uploads.append({path.name for path in Path(given["folder_path"]).iterdir()})
        error = ConnectionError("the network is down")
        if not given.get("run_as_future"):
            raise error
        job: Future[None] = Future()
        job.set_exception(error)
        return job

    monkeypatch.setattr(HfApi, "create_repo", lambda *_, **__: type("Repo", (), {"repo_id": "a/b"}))
    monkeypatch.setattr(HfApi, "upload_folder", fail)
    status, said = ended(flags(model, data, output, push_to_hub=True), capsys)
    assert status == 1
    assert "Traceback" not in said
    # Those of the two checkpoints do not end the training.
    assert len(uploads) == 3
    assert waits[-2] > 24 * 3600 > waits[-1], "other ranks wait for the upload, and not ever after"
    what = f"--push_to_hub: the upload of a checkpoint in {output} has failed (ConnectionError"
    assert said.count(what) == 2
    (reason,) = said.split("addax_ds: error: ")[1:]
    assert reason.startswith(
        "The run has ended, and this is missing:\n  - the upload: --push_to_hub"
    )
    assert "ConnectionError: the network is down" in reason
    assert {"train_loss", "test_loss", "test_loss_before"} <= results(output).keys()
    assert "test_loss" in logged(output)
    assert {"model", "all_results.json", "trainer_state.json", "training.png"} <= uploads[-1]


def test_a_model_that_cannot_be_written_costs_no_results(
    model, data, tmp_path, capsys, monkeypatch
):
    def fail(self: Any, folder: Path) -> None:
        raise UserError(f"{folder}: cannot be written: no room")

    monkeypatch.setattr(SavingMixin, "save_complete_model", fail)
    output = tmp_path / "output"
    status, said = ended(flags(model, data, output), capsys)
    assert status == 1
    assert "Traceback" not in said
    (reason,) = said.split("addax_ds: error: ")[1:]
    assert reason.split("\n  - ")[1:] == [
        f"the model: {output}/model: cannot be written: no room\n"
    ]
    assert {"train_loss", "test_loss"} <= results(output).keys()
    assert "test_loss" in logged(output)


@pytest.mark.parametrize("error", [ValueError("no such thing"), OSError("no room")])
def test_what_cannot_be_saved_at_the_end_is_known_before_the_first_step(
    error, model, data, tmp_path, capsys, monkeypatch
):
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", fail)
    monkeypatch.setattr(train.AddaxTrainer, "training_step", fail)
    output = tmp_path / "output"
    status, said = ended(flags(model, data, output), capsys)
    assert status == 1
    assert "Traceback" not in said
    assert f"{error}" in said.split("addax_ds: error: ")[1]
    assert not output.exists()


def test_an_output_that_fails_is_named_and_the_next_one_tried(caplog):
    outputs, tried = Outputs(), []
    outputs.require_all()
    with caplog.at_level(logging.WARNING):
        for error in (None, OSError("no room"), KeyError("a bug")):
            with outputs.one(f"number {len(tried)}"):
                tried.append(error)
                if error is not None:
                    raise error
    assert len(tried) == 3
    assert [bool(entry.exc_info) for entry in caplog.records] == [False, True], "a bug has a trace"
    with pytest.raises(UserError, match="- number 1: no room\n  - number 2: 'a bug'"):
        outputs.require_all()
    with outputs.one("number 1"):  # again, and it succeeds
        pass
    with outputs.one("number 2"):
        raise OSError("still no room")
    with pytest.raises(UserError, match=r"missing:\n  - number 2: still no room$"):
        outputs.require_all()


@pytest.mark.usefixtures("with_a_hub")
def test_a_repository_out_of_reach_is_known_before_the_model_is_loaded(
    model, data, tmp_path, capsys, monkeypatch
):
    def refuse(*_: Any, **__: Any) -> None:
        raise ConnectionError("the network is down")

    monkeypatch.setattr(HfApi, "create_repo", refuse)
    monkeypatch.setattr(train, "_load_model", lambda *_: pytest.fail("the model is loaded"))
    output = tmp_path / "output"
    status, said = ended(flags(model, data, output, push_to_hub=True), capsys)
    assert status == 1
    assert "Traceback" not in said
    assert "--push_to_hub: the repository output cannot be reached" in said
    assert not output.exists()


# ---- a folder that another run has used ---------------------------------------------------------


def test_another_runs_checkpoints_are_neither_deleted_nor_continued(
    model, data, tmp_path, capsys, monkeypatch
):
    output = tmp_path / "output"
    first = flags(model, data, output, max_steps=4, save_total_limit=2)
    assert ended(first, capsys)[0] == 0
    assert sorted(folders.steps(output)) == [3, 4]
    run_id = folders.read_run_id(output / "checkpoint-4")
    assert run_id is not None

    # From the start, in its folder.
    with monkeypatch.context() as patch:
        patch.setattr(train, "_load_model", lambda *_: pytest.fail("the model is loaded"))
        for more in ({"save_total_limit": 1}, {"seed": 9}, {"save_strategy": "no"}):
            status, said = ended(flags(model, data, output, **more), capsys)
            assert status == 1
            assert f"--output_dir {output}: it holds checkpoint-4, checkpoint-3 of another" in said
    assert sorted(folders.steps(output)) == [3, 4]

    # From its checkpoint, in a folder that has those of a third one.
    third = tmp_path / "third"
    assert ended(flags(model, data, third), capsys)[0] == 0
    assert folders.read_run_id(third / "checkpoint-2") != run_id
    given = {"max_steps": 5, "resume_from_checkpoint": output / "checkpoint-4"}
    status, said = ended(flags(model, data, third, **given), capsys)
    assert status == 1
    assert f"--output_dir {third}: it holds checkpoint-2, checkpoint-1 of another run" in said

    # From its checkpoint, in its folder: it is the same run.
    more = {"max_steps": 5, "save_total_limit": 2, "resume_from_checkpoint": True}
    status, said = ended(flags(model, data, output, **more), capsys)
    assert status == 0, said
    assert sorted(folders.steps(output)) == [4, 5]
    assert folders.read_run_id(output / "checkpoint-5") == run_id
