"""LoRA from the command line: the adapters of PEFT, alike on every back end."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from addax_ds import AddaxConfig, AddaxTrainer, UserError
from addax_ds.checkpoint.atomic import verify
from addax_ds.cli import train
from addax_ds.config.arguments import ModelArguments
from addax_ds.models.adapters import Lora
from addax_ds.models.source import ModelSource
from tests.support.launcher import launch
from tests.support.tiny import examples, rows, tiny_model, tiny_tokenizer, write_model, write_rows

pytestmark = pytest.mark.usefixtures("program_alone")

R, ALPHA, STEPS = 4, 6, 4
TRAINING: dict[str, Any] = {
    "learning_rate": 0.5,
    "alpha": 0.1,
    "length_threshold": 12,
    "max_steps": STEPS,
    "seed": 3,
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "logging_steps": 1,
}
BATCHES = {"per_device_train_batch_size": 4, "per_device_zo_batch_size": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("lora")
    write_model(folder / "start")
    write_rows(folder / "train.jsonl", rows(7, 9))
    return folder


def flags(folder: Path, output: Path, ranks: int = 1, **more: Any) -> list[str]:
    values = {
        **TRAINING,
        **{name: rows // ranks for name, rows in BATCHES.items()},
        "model_name_or_path": folder / "start",
        "train_file": folder / "train.jsonl",
        "output_dir": output,
        "lora_r": R,
        "lora_alpha": ALPHA,
        "save_steps": 2,
        **more,
    }
    return [f"--{name}={value}" for name, value in values.items()]


@pytest.fixture(scope="module")
def alone(folder) -> Path:
    output = folder / "alone"
    train.main(flags(folder, output))
    return output


def adapters(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def logged(folder: Path, key: str) -> list[float]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry[key] for entry in history if key in entry]


def test_it_trains_what_peft_and_the_trainer_do(folder, alone, tmp_path, capsys):
    """From what a run at the rate 0 leaves, which are the adapters at its start."""
    verify(alone / "model")
    train.main(flags(folder, tmp_path / "start", learning_rate=0, max_steps=1))
    start = tmp_path / "start" / "model"
    for name, value in adapters(start).items():
        assert (value.abs().max() > 0) == ("lora_A" in name)
    base = AutoModelForCausalLM.from_pretrained(folder / "start", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, start, is_trainable=True)
    plain = get_peft_model(tiny_model(), LoraConfig(r=R, lora_alpha=ALPHA, task_type="CAUSAL_LM"))
    assert dict(model.named_parameters()).keys() == dict(plain.named_parameters()).keys()
    own = {"output_dir": str(tmp_path / "python"), "save_strategy": "no"}
    AddaxTrainer(
        model=model,
        args=AddaxConfig(**{**TRAINING, **BATCHES, **own}),
        train_dataset=examples(rows(7, 9)),
        processing_class=tiny_tokenizer(),
    ).train()
    model.save_pretrained(tmp_path / "trained")
    expected, found = adapters(tmp_path / "trained"), adapters(alone / "model")
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_it_goes_on_from_a_checkpoint_with_the_same_adapters(folder, alone, tmp_path, capsys):
    resumed = {"resume_from_checkpoint": alone / "checkpoint-2"}
    train.main(flags(folder, tmp_path / "again", **resumed))
    again = adapters(tmp_path / "again" / "model")
    assert all(torch.equal(again[n], value) for n, value in adapters(alone / "model").items())
    for other, said in (
        ({"lora_r": 3}, "its adapters have r 4, and those of this run 3"),
        ({"lora_alpha": 5}, "its adapters have lora_alpha 6, and those of this run 5"),
        ({"lora_target_modules": "q_proj"}, "it has adapters that this run has not, such as "),
    ):
        with pytest.raises(SystemExit):
            train.main(flags(folder, tmp_path / "other", **resumed, **other))
        assert said in capsys.readouterr().err
    without = [f for f in flags(folder, tmp_path / "other", **resumed) if "--lora" not in f]
    with pytest.raises(SystemExit):
        train.main(without)
    assert "it holds adapters of PEFT, and this run trains the whole" in capsys.readouterr().err


def test_another_base_is_said(folder, alone, tmp_path, capsys):
    """It may be the same one, in another place."""
    write_model(tmp_path / "moved")
    resumed = {"resume_from_checkpoint": alone / "checkpoint-2"}
    train.main(flags(folder, tmp_path / "again", **resumed))
    assert "its adapters were trained on" not in capsys.readouterr().err
    moved = {"model_name_or_path": tmp_path / "moved", **resumed}
    train.main(flags(folder, tmp_path / "other", **moved))
    bases = f"its adapters were trained on {folder / 'start'}, and this run has {tmp_path}/moved"
    assert bases in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["zero3", "fsdp2"])
def test_sharded_ranks_train_the_same_adapters(sharding, folder, alone, tmp_path):
    chosen = {"deepspeed": "zero3"} if sharding == "zero3" else {"sharding": sharding}
    given = flags(folder, tmp_path, ranks=2, **chosen, save_strategy="no")
    outcome = launch("launch/train.py", *given, launcher="fork")
    assert outcome.status == 0, outcome.output
    for key in ("zo_loss", "fo_loss"):
        assert logged(tmp_path, key) == pytest.approx(logged(alone, key), rel=1e-4)
    found = adapters(tmp_path / "model")
    for name, value in adapters(alone / "model").items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"lora_target_modules": "nowhere"}, "cannot add adapters: Target modules {'nowhere'}"),
        ({"lora_target_modules": "embed_tokens"}, "is not of a linear layer"),
        ({"lora_r": 0}, "--lora_r 0: it must be at least 1"),
    ],
)
def test_mistakes(more, message, folder, tmp_path, capsys):
    with pytest.raises(SystemExit):
        train.main(flags(folder, tmp_path, **more))
    assert message in capsys.readouterr().err


def test_what_is_adapted():
    def adapted(family: str, *targets: str) -> set[str]:
        model = Lora(2, 4, targets or None).add_to(tiny_model(family, torch.bfloat16))
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        assert {p.dtype for p in trained.values()} == {torch.bfloat16}
        return {name.split(".lora_")[0].rpartition(".")[2] for name in trained}

    assert adapted("llama") == {"q_proj", "v_proj"}
    assert adapted("llama", "up_proj", "o_proj") == {"up_proj", "o_proj"}
    every = {*("q_proj", "k_proj", "v_proj", "o_proj"), *("gate_proj", "up_proj", "down_proj")}
    assert adapted("llama", "all-linear") == every


def test_adapters_of_a_tied_output_projection(tmp_path):
    """Its weight stays that of the embedding, which no adapter changes."""
    write_model(tmp_path / "model", "opt")
    args = ModelArguments(model_name_or_path=str(tmp_path / "model"))
    model = ModelSource.find(args).load(torch.float32, lora=Lora(2, 4, ("q_proj", "lm_head"), 0))
    layer = model.get_base_model().lm_head
    assert layer.base_layer.weight is model.get_base_model().get_input_embeddings().weight
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    tokens = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, plain(tokens).logits)


def test_a_folder_of_adapters_is_no_model(alone):
    """Adapters are written beside no config.json, for which Transformers would ask."""
    args = ModelArguments(model_name_or_path=str(alone / "model"))
    with pytest.raises(UserError, match="the folder holds an adapter, not a model alone"):
        ModelSource.find(args)
