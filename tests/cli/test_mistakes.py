"""Mistakes that would be silent are errors with a clear sentence, on every back end and rank."""

import re

import pytest
import torch

from tests.support.models import tiny_opt
from tests.support.ranks import run_ranks
from tests.workers.mistakes import MISTAKES, MISTAKES_OF_FOUR

pytestmark = pytest.mark.slow

BEFORE_ITS_BACKWARD = r"RuntimeError: a forward with autograd .* Call measure\(\) first"
SECOND_GRADIENT = "RuntimeError: model.* got a second gradient in one step"
NOT_REDUCED = "RuntimeError: model.* has a gradient that was not applied, .* not reduced"
THERE_BEFORE = "(UserError|RuntimeError): .* before the optimizer was attached"
NARROW_LOSS = r"TypeError: .* torch\.bfloat16: .*output_dtype=torch\.float32"
OTHER_PARALLELISM = "UserError: Addax serves FSDP2 over all ranks.* a mesh of all ranks"

SENTENCES = {
    "forward_before_zeroth_order": BEFORE_ITS_BACKWARD,
    "forward_before_zeroth_order_later": BEFORE_ITS_BACKWARD,
    "second_backward": SECOND_GRADIENT,
    "no_reduction": NOT_REDUCED,
    "no_reduction_over_replicas": NOT_REDUCED,
    "state_for_torch_checkpoint": "RuntimeError: .*checkpoint .* save optimizer.state_dict",
    "gradient_from_before": THERE_BEFORE,
    "narrow_output": NARROW_LOSS,
    "sharded_after_attaching": "UserError: fully_shard was applied after .* shard first",
    "optimizer_made_before_sharding": "UserError: .* build Addax from the parameters of the",
    "layers_alone_sharded": r"UserError: .* call fully_shard\(model\) too, after its layers",
    "resharded_to_fewer_ranks": "UserError: .*reshard_after_forward.* use True or False",
    "mesh_of_some_ranks": OTHER_PARALLELISM,
    "tensor_parallel": OTHER_PARALLELISM,
    "sharded_along_columns": "UserError: .* call fully_shard without shard_placement_fn",
    "left_out_of_sharding": "UserError: .*final_layer_norm.weight .* ignored_params",
    "tied_after_sharding": "UserError: .*embed_tokens.weight is sharded twice.* call shard_model",
    "weights_of_two_dtypes": r"UserError: weights of torch\.bfloat16 and torch\.float32 are",
    "wrapped_in_ddp": r"UserError: .* DistributedDataParallel.* attach model\.module",
    "zero_stage_left_out": "RuntimeError: Addax is not attached .* with ZeRO stage 3",
    "zero3_attached": r"UserError: .* partitioned by DeepSpeed: use deepspeed\.initialize",
}
RANKS = dict.fromkeys(MISTAKES, 2) | dict.fromkeys(MISTAKES_OF_FOUR, 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mistakes")
    for world_size in (2, 4):
        run_ranks("mistakes", world_size, folder)
    return folder


@pytest.mark.parametrize(("name", "world_size"), RANKS.items())
def test_a_mistake_is_named(folder, name, world_size):
    for rank in range(world_size):
        said = torch.load(folder / f"said-{world_size}-rank{rank}.pt")[name]
        assert re.match(SENTENCES[name.split()[0]], said), said or "nothing was said"


def test_replicated_ranks_that_start_apart_end_together(folder):
    first, second = (torch.load(folder / f"replicas-rank{rank}.pt") for rank in (0, 1))
    for name, weight in tiny_opt().named_parameters():
        assert torch.equal(first["start"][name], weight)
        assert torch.equal(second["start"][name], weight)
        assert torch.equal(first["end"][name], second["end"][name])
        assert not torch.equal(first["end"][name], weight)
    assert second["buffer"].tolist() == [0.0, 0.0, 0.0]
