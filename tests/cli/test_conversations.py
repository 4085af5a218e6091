"""Training on conversations: where the saved model stops, and which day a template reads."""

import json
import logging
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig

from addax_ds.cli import prepare, train
from tests.support.tiny import BYTE_VOCABULARY, byte_tokenizer, tiny_model, write_rows

pytestmark = pytest.mark.usefixtures("program_alone")

TODAY, TOMORROW = datetime(2025, 12, 31, 23, 59), datetime(2026, 1, 1, 0, 1)
EOS, END = 1, BYTE_VOCABULARY + 1
TEMPLATE = (
    "Today is {{ strftime_now('%d %B %Y') }}.\n"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def run(tmp_path, caplog, monkeypatch):
    """Train on conversations at a moment; return what was said."""

    def run(now: datetime = TODAY, **more: Any) -> str:
        model = tiny_model(vocab_size=BYTE_VOCABULARY + 2, max_position_embeddings=512)
        model.save_pretrained(tmp_path / "start")
        tokenizer = byte_tokenizer()
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
        assert tokenizer.convert_tokens_to_ids("<|im_end|>") == END
        tokenizer.chat_template = TEMPLATE
        tokenizer.save_pretrained(tmp_path / "start")
        row = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
        given = {
            "model_name_or_path": tmp_path / "start",
            "train_file": write_rows(tmp_path / "rows.jsonl", [{"messages": row}] * 4),
            "output_dir": tmp_path / "output",
            "method": "ip-sgd",
            "learning_rate": 0.1,
            "per_device_train_batch_size": 2,
            "max_steps": 2,
            "save_steps": 1,
            "report_to": "none",
            **more,
        }
        monkeypatch.setattr(prepare, "datetime", Clock(now))
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="addax_ds"):
            logging.getLogger("addax_ds").propagate = True
            train.finetune([f"--{name}={value}" for name, value in given.items()])
        return caplog.text

    return run


class Clock:
    fromisoformat = datetime.fromisoformat

    def __init__(self, now: datetime) -> None:
        self._now = now

    def now(self) -> datetime:
        return self._now


def digest(output: Path, step: int) -> str:
    state = json.loads((output / f"checkpoint-{step}" / "addax_state.json").read_text())
    return state["run"]["data"]


def test_a_saved_model_stops_where_a_turn_ends(run, tmp_path):
    said = run(max_steps=1)
    for folder in ("model", "checkpoint-1"):
        generation = GenerationConfig.from_pretrained(tmp_path / "output" / folder)
        assert generation.eos_token_id == [EOS, END]
    assert "ends the assistant's turns with <|im_end|>: saved models stop there" in said


def test_a_run_goes_on_with_the_date_of_its_start(run, tmp_path):
    """The data, and with it the weights, are those of a run that was not interrupted."""
    output, model = tmp_path / "output", tmp_path / "output" / "model" / "model.safetensors"
    run()
    expected = model.read_bytes()
    model.unlink()
    run(TOMORROW, resume_from_checkpoint=output / "checkpoint-1")
    assert model.read_bytes() == expected
    assert digest(output, 2) == digest(output, 1)
    run(TOMORROW, resume_from_checkpoint=output / "checkpoint-2", max_steps=3)
    assert digest(output, 3) == digest(output, 1)
    run(TOMORROW, output_dir=tmp_path / "afresh")
    assert digest(tmp_path / "afresh", 1) != digest(output, 1)


def test_all_ranks_read_the_time_of_rank_0(monkeypatch):
    """A node may be in another time zone, or start a moment later on another day."""
    monkeypatch.setattr(prepare, "all_gather_object", lambda own: [TODAY.isoformat(), own])
    monkeypatch.setattr(prepare, "datetime", Clock(TOMORROW))
    assert prepare._template_time(None) == TODAY.isoformat()
