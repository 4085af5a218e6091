"""Files of every family: what `save_pretrained` writes, whoever has loaded and saved the model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from addax_ds import UserError
from addax_ds.checkpoint import weights
from addax_ds.checkpoint.weights import save_weights
from addax_ds.config.arguments import ModelArguments
from addax_ds.models.source import ModelSource
from tests.support.families import FAMILIES

every_family = pytest.mark.parametrize("family", FAMILIES)


def model_of(family: str) -> Any:
    torch.manual_seed(7)
    return AutoModelForCausalLM.from_config(FAMILIES[family])


def loaded(folder: Path) -> Any:
    source = ModelSource.find(ModelArguments(model_name_or_path=str(folder)))
    return source.load(torch.float32)


def tensors_in(folder: Path) -> dict[str, Tensor]:
    files = [load_file(path) for path in folder.glob("*.safetensors")]
    assert sum(map(len, files)) == len({name for file in files for name in file})
    return {name: tensor for file in files for name, tensor in file.items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


@every_family
def test_a_new_model_is_written_as_save_pretrained_writes_it(family, tmp_path):
    """Over several files; the model is filled from these, and from the form of its own names."""
    model = model_of(family)
    model.save_pretrained(tmp_path / "theirs")
    model.save_pretrained(tmp_path / "as in the model", save_original_format=False)
    save_weights(model, tmp_path / "ours", max_file_size="20KB")
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 1
    assert_same(tensors_in(tmp_path / "ours"), tensors_in(tmp_path / "theirs"))
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for form in ("ours", "as in the model"):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        weights.fill(model, tmp_path / form)
        assert_same(model.state_dict(), expected)


@every_family
@pytest.mark.parametrize("form", ["published", "as in the model"])
def test_a_loaded_model_is_written_as_its_files_were(family, form, tmp_path):
    """Some families were published in two forms; each is kept."""
    start, theirs, ours = (tmp_path / name for name in ("start", "theirs", "ours"))
    model_of(family).save_pretrained(start, save_original_format=form == "published")
    model, expected = loaded(start), AutoModelForCausalLM.from_pretrained(start)
    assert_same(model.state_dict(), expected.state_dict())
    expected.save_pretrained(theirs)
    save_weights(model, ours)
    assert_same(tensors_in(ours), tensors_in(theirs))
    assert_same(tensors_in(ours), tensors_in(start))


def test_a_prefix_that_the_files_alone_have_is_kept(tmp_path):
    """Gemma 3 was published by Transformers 4, whose vision model has one module more."""
    start, ours = tmp_path / "start", tmp_path / "ours"
    model_of("gemma3").save_pretrained(start)
    published = {
        name.replace("vision_tower.", "vision_tower.vision_model."): tensor
        for name, tensor in tensors_in(start).items()
    }
    save_file(published, start / "model.safetensors", metadata={"format": "pt"})
    model = loaded(start)
    assert_same(model.state_dict(), AutoModelForCausalLM.from_pretrained(start).state_dict())
    save_weights(model, ours)
    assert_same(tensors_in(ours), published)


def test_parts_of_a_slice_of_fused_experts_are_read(tmp_path):
    """What a rank holds of a tensor is what it is filled with."""
    model = model_of("mixtral")
    model.save_pretrained(tmp_path)
    whole = model.state_dict()["model.layers.1.mlp.experts.gate_up_proj"]
    files, _ = weights.files_of(model, tmp_path)
    (part,) = (
        s for s in weights.local_slices(model) if s.names[0].endswith("1.mlp.experts.gate_up_proj")
    )
    start, end = 5000, 7777
    data = torch.empty(end - start)
    files.fill([type(part)(part.names, part.shape, start, data)])
    assert torch.equal(data, whole.flatten()[start:end])


EXPERT = "model.layers.1.block_sparse_moe.experts.11.w1.weight"
DAMAGES = {
    "missing": (lambda t: t.pop(EXPERT), "cannot be put together: Sizes of tensors must match"),
    "shape": (lambda t: t.update({EXPERT: torch.ones(5, 3)}), "cannot be put together: stack exp"),
    "all": (
        lambda t: [t.pop(name) for name in list(t) if ".11." in name],
        r"make a model.layers.0.mlp.experts.\w+ of shape \[11, .*but the model's is \[12, ",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_experts_that_do_not_fit_are_refused(damage, tmp_path):
    model_of("mixtral").save_pretrained(tmp_path)
    change, says = DAMAGES[damage]
    held = tensors_in(tmp_path)
    change(held)
    save_file(held, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=says) as raised:
        loaded(tmp_path)
    assert str(tmp_path) in str(raised.value)
