"""The planner against what can be counted by hand, and against autograd on a real model."""

import math
from dataclasses import replace
from itertools import accumulate

import pytest
import torch
from deepspeed.runtime.zero.linear import zero3_linear_wrap
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from transformers import OPTConfig, OPTForCausalLM
from transformers.integrations import HfDeepSpeedConfig

from addax_ds.planner.memory import StepSpec, standing_bytes, step_memory
from addax_ds.planner.report import gpus_needed
from addax_ds.planner.shapes import OPT_FAMILY, ModelShape, find_shape, shape_of
from addax_ds.planner.tape import Tape
from addax_ds.planner.threshold import largest_threshold
from addax_ds.planner.trace import Batch, Trace, trace
from addax_ds.planner.zero3 import Zero3Settings
from addax_ds.utils.errors import UserError
from benchmarks.live import peak

SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "ffn_dim": 256,
    "word_embed_proj_dim": 64,
    "vocab_size": 501,
    "max_position_embeddings": 512,
    "dropout": 0.0,
}
SETTINGS = Zero3Settings(
    reduce_bucket_size=4096,
    stage3_prefetch_bucket_size=4096,
    stage3_param_persistence_threshold=640,
)


@pytest.fixture(scope="module")
def small() -> ModelShape:
    return shape_of(OPTConfig(**SMALL), "small")


def spec_of(shape: ModelShape, **more) -> StepSpec:
    batch = Batch(4, 128, 8)
    usual = StepSpec(shape, "addax", "zero3", 2, batch, batch, zero3=SETTINGS)
    return replace(usual, **more)


# ---- shapes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPT_FAMILY)
def test_a_built_in_model_has_the_parameters_of_its_formula(name):
    config = OPTConfig(**OPT_FAMILY[name])
    hidden, layers = config.hidden_size, config.num_hidden_layers
    embedded = config.word_embed_proj_dim
    expected = layers * (12 * hidden**2 + 13 * hidden)  # attention, feed-forward, two norms
    expected += config.vocab_size * embedded + 2050 * hidden
    expected += 2 * hidden if config.do_layer_norm_before else 0
    expected += 2 * hidden * embedded if embedded != hidden else 0
    shape = find_shape(f"facebook/{name}")
    assert shape.parameters == expected
    assert len(shape.blocks) == layers
    assert shape.tied


def test_a_folder_and_a_file_are_read(tmp_path):
    OPTConfig(**SMALL).save_pretrained(tmp_path)
    from_folder = find_shape(str(tmp_path))
    from_file = find_shape(str(tmp_path / "config.json"))
    assert from_folder.parameters == from_file.parameters == sum(from_file.numels)
    assert from_folder.vocabulary == 501


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"config\.json cannot be read as JSON"),
        ("[]", "must hold a JSON object, not list"),
        ('{"a": 1}', "has no model_type"),
        ('{"model_type": "optt"}', "knows no model_type 'optt'. Did you mean 'opt'"),
        ('{"model_type": "t5"}', "not a configuration .* AutoModelForCausalLM$"),
        ('{"model_type": "opt", "vocab_size": 1}', "not a configuration .* Padding_idx must be"),
        ('{"model_type": "opt", "quantization_config": {"bits": 4}}', "quantised weights"),
    ],
)
def test_a_file_that_describes_no_model_is_refused(tmp_path, content, message):
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        find_shape(str(path))


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"the folder has no config\.json$"):
        find_shape(str(tmp_path))


def test_an_unknown_name_is_not_looked_up(monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("asked the network"))
    with pytest.raises(UserError, match=r"Did you mean 'opt-6\.7b'"):
        find_shape("facebook/opt-6.7")


def test_a_running_zero3_training_does_not_disturb_the_planner(small):
    batch = Batch(2, 64, 8)
    expected = trace.__wrapped__(small, batch, backward=True, zero3_linear=True)
    linear = F.linear
    live = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}, "train_batch_size": 1})
    try:
        F.linear = zero3_linear_wrap  # as zero.Init leaves it
        assert shape_of(OPTConfig(**SMALL), "small") == small
        assert trace.__wrapped__(small, batch, backward=True, zero3_linear=True) == expected
        assert trace.__wrapped__(small, batch, backward=True) == trace(small, batch, backward=True)
    finally:
        F.linear = linear
        del live


def test_a_moved_private_name_is_not_the_models_fault(small, tmp_path, monkeypatch):
    OPTConfig(**SMALL).save_pretrained(tmp_path)
    attention = F.scaled_dot_product_attention
    with monkeypatch.context() as patch:
        patch.delattr("transformers.masking_utils.fast_all")
        with pytest.raises(AttributeError, match="fast_all"):
            trace.__wrapped__(small, Batch(2, 64, 8), backward=False)
    assert F.scaled_dot_product_attention is attention
    monkeypatch.delattr("transformers.modeling_utils.is_deepspeed_zero3_enabled")
    with pytest.raises(AttributeError, match="is_deepspeed_zero3_enabled"):
        find_shape(str(tmp_path))


def test_an_assertion_that_fails_is_not_the_models_fault(small, monkeypatch):
    def fail(*_) -> None:
        raise AssertionError("an invariant")

    monkeypatch.setattr("addax_ds.planner.trace._loss", fail)
    with pytest.raises(AssertionError, match="an invariant"):
        trace.__wrapped__(small, Batch(2, 64, 8), backward=False)


# ---- what a pass keeps ---------------------------------------------------------------------------


def kept(tape: Trace) -> int:
    """Bytes of activations that are alive when backward begins."""
    sizes: dict[int, int] = {}
    for kind, number, *rest in tape.events:
        if kind == "fetch" and rest == [False]:
            break
        if kind == "alloc":
            sizes[number] = rest[0]
        elif kind == "free":
            sizes.pop(number)
    return sum(size for number, size in sizes.items() if tape.categories[number] == "activations")


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_saved_activations_are_those_of_autograd(attention):
    """Storages that the graph of a real forward holds, weights left out, are on the tape."""
    model = OPTForCausalLM._from_config(
        OPTConfig(**SMALL), dtype=torch.float32, attn_implementation=attention
    )
    model.config.use_cache = False
    model.train()
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    tokens = torch.randint(0, 500, (1, 200))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = model.model(input_ids=tokens).last_hidden_state
    del hidden

    shape = shape_of(model.config, "small", "fp32")
    tape = trace(shape, Batch(1, 200, 1), backward=True, attention=attention, cuda=False)
    assert kept(tape) == pytest.approx(sum(saved.values()), rel=0.02)


def test_the_tape_counts_what_the_allocator_does():
    """The peak of a real forward and backward, against the events of torch's CPU allocator."""
    model = OPTForCausalLM._from_config(OPTConfig(**SMALL), dtype=torch.float32)
    model.config.use_cache = False
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    tokens = torch.randint(0, 500, (2, 100))

    def step() -> None:
        model(input_ids=tokens, labels=tokens).loss.backward()

    step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = profiler.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    allocated = max(accumulate(size for _, size in changes))

    tape = Tape(lambda *_: "all")
    for tensor in (*model.parameters(), *model.buffers(), tokens):
        tape.ignore(tensor)
    with tape:
        step()
    assert peak(tape)["total"] == pytest.approx(allocated, rel=1e-3)


def test_attention_scores_grow_with_the_square_of_the_length(small):
    def activations(length: int, attention: str) -> int:
        first = Batch(1, length, 1)
        spec = spec_of(small, zeroth_order=None, first_order=first, attention=attention)
        return step_memory(spec).categories["activations"]

    assert activations(512, "sdpa") == pytest.approx(2 * activations(256, "sdpa"), rel=0.01)
    assert activations(512, "eager") > 3 * activations(256, "eager")


def test_dropout_keeps_a_byte_on_a_gpu_and_two_on_a_cpu(small):
    config = OPTConfig(**{**SMALL, "dropout": 0.1})
    shape, batch = shape_of(config, "dropout"), Batch(1, 128, 1)

    def added(cuda: bool) -> int:
        dropped, whole = (trace(s, batch, backward=True, cuda=cuda) for s in (shape, small))
        return kept(dropped) - kept(whole)

    masks = 3 * 2 * 128 * 64  # elements, two in each of three layers
    assert added(cuda=True) == masks
    assert added(cuda=False) == 2 * masks


def test_checkpointing_keeps_inputs_of_blocks_alone(small):
    first = Batch(8, 256, 1)
    spec = spec_of(small, zeroth_order=None, first_order=first)
    plain = step_memory(spec).categories["activations"]
    checkpointed = step_memory(replace(spec, checkpointing=True)).categories["activations"]
    inputs_of_blocks = 3 * 8 * 256 * 64 * 2
    assert inputs_of_blocks < checkpointed < plain * 0.7


# ---- what is there all the time ------------------------------------------------------------------


def test_adamw_has_sixteen_bytes_a_parameter_over_the_ranks(small):
    for ranks in (1, 2, 8):
        standing = standing_bytes(spec_of(small, method="adamw", ranks=ranks))
        state = standing["weights"] + standing["optimizer"]
        assert state == 16 * sum(math.ceil(numel / ranks) for numel in small.numels)


def test_addax_has_the_weights_and_a_bucket(small):
    """The bucket holds a layer, if two of them may be live."""
    layer = 12 * 64**2 + 13 * 64
    for limit, bucket in ((10**9, layer), (2 * layer, layer), (2 * layer - 1, 4096)):
        zero3 = replace(SETTINGS, stage3_max_live_parameters=limit)
        assert standing_bytes(spec_of(small, ranks=1, zero3=zero3)) == {
            "weights": 2 * small.parameters,
            "buckets": 2 * bucket,
        }


def test_micro_batches_are_summed_in_fp32(small):
    standing = standing_bytes(spec_of(small, ranks=1, accumulation=2))
    assert standing["gradients"] == 4 * small.parameters


def test_offloaded_shards_are_in_host_memory(small):
    spec = spec_of(small, zero3=replace(SETTINGS, offload=True))
    memory = step_memory(spec)
    assert memory.categories["weights"] == 0
    assert memory.host >= small.parameters  # 2 bytes over 2 ranks
    assert step_memory(spec_of(small)).host == 0


def test_sums_over_micro_batches_lie_where_the_shards_do(small):
    offloaded = spec_of(small, zeroth_order=None, zero3=replace(SETTINGS, offload=True))
    summed = replace(offloaded, accumulation=2)
    assert standing_bytes(summed) == standing_bytes(offloaded)
    elements = sum(math.ceil(numel / 2) for numel in small.numels)
    assert step_memory(summed).host - step_memory(offloaded).host == 4 * elements
    passes = Batch(2, 128, 1)
    both = replace(summed, zeroth_order=passes)
    assert step_memory(both).host == step_memory(summed).host  # the copies were there before
    forward_alone = replace(both, method="mezo", first_order=None)
    assert step_memory(forward_alone) == step_memory(replace(forward_alone, accumulation=1))


def test_pinned_shards_are_rounded_up_to_a_power_of_two(small):
    pageable = replace(SETTINGS, offload=True)
    spec = spec_of(small, zero3=pageable, ranks=1, zeroth_order=None, cuda=True)
    pinned = replace(spec, zero3=replace(pageable, pin_memory=True))
    expected = sum(2 ** math.ceil(math.log2(2 * numel)) for numel in small.numels)
    assert step_memory(pinned).host == expected > step_memory(spec).host
    assert step_memory(replace(pinned, cuda=False)).host == step_memory(spec).host


# ---- L_T -----------------------------------------------------------------------------------------


def test_the_threshold_is_the_largest_that_fits(small):
    spec = spec_of(small, zeroth_order=None, first_order=Batch(4, 2, 1))
    lengths = [20, 60, 60, 100, 140, 200, 260]

    def total(length: int) -> int:
        return step_memory(replace(spec, first_order=Batch(4, length, length - 1))).total

    for budget in (total(100), total(140) - 1, total(140), 10**12):
        found = largest_threshold(spec, lengths, budget)
        expected = max(length for length in lengths[:-1] if total(length) <= budget)
        assert found == expected
    assert largest_threshold(spec, lengths, total(20) - 1) is None


def test_no_threshold_helps_if_the_zeroth_order_pass_does_not_fit(small):
    spec = spec_of(small, zeroth_order=Batch(64, 2, 1), first_order=Batch(1, 2, 1))
    budget = step_memory(replace(spec, zeroth_order=Batch(64, 512, 511), first_order=None)).total
    assert largest_threshold(spec, [16, 512], budget - 1) is None
    assert largest_threshold(spec, [16, 512], budget) is not None


# ---- GPUs needed ---------------------------------------------------------------------------------


def test_one_gpu_is_enough_though_two_need_more(small):
    one_by_one = replace(SETTINGS, stage3_max_live_parameters=0)
    spec = spec_of(small, first_order=Batch(1, 16, 8), zeroth_order=None, zero3=one_by_one)
    totals = {ranks: step_memory(replace(spec, ranks=ranks)).total for ranks in (1, 2, 4, 8, 64)}
    assert totals[64] < totals[8] < totals[1] < totals[4] < totals[2]
    assert gpus_needed(spec, totals[1]) == 1
    assert gpus_needed(spec, totals[8]) == 8
    assert gpus_needed(spec, totals[64] - 10**5) is None
    assert gpus_needed(replace(spec, sharding="none"), 1000) is None


@pytest.mark.parametrize(
    ("share", "gpus_per_node", "needed"),
    [
        (1.1, 2, 1),
        (0.7, 2, 3),
        (0.55, 2, 4),
        (0.55, 1, 2),
        (0.3, 1, 4),
        (0.3, 8, 32),
        (0.0, 8, None),
    ],
)
def test_gpus_of_a_node_share_its_host(small, share, gpus_per_node, needed):
    """Of three GPUs in nodes of two, one node has two thirds of the weights."""
    offload = replace(SETTINGS, offload=True)
    spec = spec_of(small, method="ip-sgd", zeroth_order=None, zero3=offload)
    host = int(share * 2 * small.parameters)
    assert gpus_needed(spec, 10**12, host, gpus_per_node) == needed
