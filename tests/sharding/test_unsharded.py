"""Addax on one plain model against the float64 loop, and what a user of the bare API relies on."""

from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import chain

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, OPTConfig

import addax_ds
from addax_ds import kernels
from addax_ds.optim.loss_scale import LossScale
from addax_ds.optim.report import MAX_NON_FINITE_STEPS
from tests.support.cases import CASES, Case, batches, mean_loss, trainable
from tests.support.models import tiny_opt, token_batches
from tests.support.passes import measured_g0
from tests.support.reference import distance, norm


def build(case: Case) -> tuple[torch.nn.Module, addax_ds.Addax]:
    model = case.build()
    h = case.hyperparameters
    optimizer = addax_ds.Addax(model.parameters(), **asdict(h))
    addax_ds.attach(optimizer, model)
    return model, optimizer


def train(case: Case) -> tuple[torch.nn.Module, list[float]]:
    model, optimizer = build(case)
    history = []
    for long, short in batches():
        history.append(measured_g0(optimizer, lambda x=long: mean_loss(model, x)))
        if case.hyperparameters.alpha < 1:
            mean_loss(model, short).backward()
        optimizer.step()
    return model, history


@pytest.mark.parametrize("name", [n for n in CASES if "persistence" not in n and n != "offload"])
@pytest.mark.slow
def test_ten_steps_equal_the_float64_loop(name, float64_results):
    reference = float64_results[name]
    model, history = train(CASES[name])
    moved = distance(reference["start"], reference["end"])
    assert moved >= 3e-3 * norm(reference["start"])
    assert distance(trainable(model), reference["end"]) <= 5e-4 * moved
    assert history == pytest.approx(reference["g0"], rel=2e-3, abs=2e-3)


def test_alpha_0_is_sgd():
    case = CASES["ip-sgd"]
    model, _ = train(case)
    reference = case.build()
    sgd = torch.optim.SGD(reference.parameters(), lr=case.hyperparameters.lr)
    for _, short in batches():
        sgd.zero_grad()
        mean_loss(reference, short).backward()
        sgd.step()
    moved = distance(trainable(case.build()), trainable(reference))
    assert distance(trainable(model), trainable(reference)) <= 1e-5 * moved


def test_alpha_1_is_mezo():
    """MeZO as published: perturb the weights in place by +eps, -2 eps, +eps, in fp64 here."""
    case = CASES["mezo"]
    h = case.hyperparameters
    model, _ = train(case)
    reference = case.build().eval().double()
    parameters = dict(reference.named_parameters())

    def shift(step: int, scale: float) -> None:
        for name, p in parameters.items():
            z = addax_ds.gaussian(h.seed, step, name, 0, p.numel()).view(p.shape)
            p.data.add_(z.double(), alpha=scale)

    with torch.no_grad():
        for step, (long, _) in enumerate(batches()):
            shift(step, h.zo_eps)
            plus = mean_loss(reference, long)
            shift(step, -2 * h.zo_eps)
            minus = mean_loss(reference, long)
            shift(step, h.zo_eps)
            shift(step, -h.lr * ((plus - minus) / (2 * h.zo_eps)).item())
    moved = distance(trainable(case.build()), trainable(reference))
    assert distance(trainable(model), trainable(reference)) <= 5e-4 * moved


@pytest.mark.parametrize(("name", "passes", "backwards"), [("ip-sgd", 1, 1), ("mezo", 2, 0)])
def test_limits_run_no_superfluous_pass(name, passes, backwards):
    model, optimizer = build(CASES[name])
    counts = {"forward": 0, "backward": 0}
    model.register_forward_pre_hook(lambda *_: counts.update(forward=counts["forward"] + 1))
    parameter = model.model.decoder.layers[0].fc1.weight
    parameter.register_hook(lambda *_: counts.update(backward=counts["backward"] + 1))
    long, short = batches()[0]
    optimizer.measure(lambda: mean_loss(model, long), None)
    if CASES[name].hyperparameters.alpha < 1:
        mean_loss(model, short).backward()
    optimizer.step()
    assert counts == {"forward": passes, "backward": backwards}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"tied": False}, {"frozen": True}, {"dropout": 0.2}])
def test_passes_see_perturbed_weights_and_the_stored_ones_stay(dtype, options):
    model = tiny_opt(dtype=dtype, **options).train()
    optimizer = addax_ds.Addax(model.parameters(), lr=1.0, alpha=1.0, zo_eps=1e-2, seed=5)
    addax_ds.attach(optimizer, model)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    x = token_batches(1)[0][0]
    seen = []

    def closure():
        loss = mean_loss(model, x).float()
        seen.append(loss.item())
        return loss

    g0 = measured_g0(optimizer, closure)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]), name
    assert all(module.training for module in model.modules())

    explicit = tiny_opt(dtype=dtype, **options).eval()
    for sign, loss in zip((1, -1), seen, strict=True):
        with torch.no_grad():
            for name, p in explicit.named_parameters():
                if p.requires_grad:
                    z = addax_ds.gaussian(5, 0, name, 0, p.numel()).view(p.shape)
                    p.copy_(before[name].float() + sign * 1e-2 * z)
        assert loss == mean_loss(explicit, x).float().item()
    assert g0 == pytest.approx((seen[0] - seen[1]) / 2e-2, rel=1e-9)


def test_weights_and_modes_survive_a_closure_that_raises():
    model, optimizer = build(CASES["tied"])
    model.model.decoder.layers[0].eval()
    modes = {n: module.training for n, module in model.named_modules()}
    before = trainable(model)

    def closure():
        mean_loss(model, batches()[0][0])
        raise KeyError("on purpose")

    with pytest.raises(KeyError, match="on purpose"):
        optimizer.measure(closure, None)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert modes == {n: module.training for n, module in model.named_modules()}
    # and inside a block, while its parameters are swapped
    hook = model.model.decoder.layers[1].fc2.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        optimizer.measure(lambda: mean_loss(model, batches()[0][0]), None)
    hook.remove()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert measured_g0(optimizer, lambda: mean_loss(model, batches()[0][0])) != 0.0


def test_perturbation_needs_one_block_more_not_a_second_model():
    model, optimizer = build(CASES["untied"])
    parameters = list(model.parameters())  # to go through them in a pass would be to read them
    stored = {p.data_ptr() for p in parameters}
    peak = 0

    def measure(*_):
        nonlocal peak
        extra = sum(p.numel() for p in parameters if p.data_ptr() not in stored)
        peak = max(peak, extra)

    handles = [m.register_forward_pre_hook(measure) for m in model.modules()]
    optimizer.measure(lambda: mean_loss(model, batches()[0][0]), None)
    for handle in handles:
        handle.remove()
    layers = [sum(p.numel() for p in la.parameters()) for la in model.model.decoder.layers]
    outside = sum(p.numel() for p in model.parameters()) - sum(layers)
    assert 0 < peak <= outside + max(layers)


@pytest.mark.parametrize(
    ("dtype", "alpha", "zo_eps", "warns"),
    [
        (torch.bfloat16, 0.5, 4e-4, True),
        (torch.bfloat16, 0.5, 5e-4, False),
        (torch.bfloat16, 0.0, 1e-4, False),
        (torch.float32, 0.5, 1e-5, False),
    ],
)
def test_small_zo_eps_with_bf16_weights_warns(caplog, dtype, alpha, zo_eps, warns):
    model = tiny_opt(dtype=dtype)
    optimizer = addax_ds.Addax(model.parameters(), lr=0.1, alpha=alpha, zo_eps=zo_eps)
    addax_ds.attach(optimizer, model)
    assert ("zo_eps" in caplog.text) == warns


@pytest.mark.parametrize("options", [{"max_grad_norm": 1.0}, {"dtype": torch.float16}])
def test_clipping_and_scaling_need_the_first_order_loss(options):
    model = tiny_opt(dtype=options.pop("dtype", torch.float32))
    optimizer = addax_ds.Addax(model.parameters(), lr=0.1, alpha=0.5, **options)
    addax_ds.attach(optimizer, model)
    ((long, short),) = token_batches(1)
    with pytest.raises(RuntimeError, match="measure"):
        optimizer.measure(lambda: mean_loss(model, long).float(), None)
    loss = optimizer.measure(
        lambda: mean_loss(model, long).float(), lambda: mean_loss(model, short).float()
    )
    loss.backward()
    optimizer.step()
    optimizer.alpha = 0.0
    with pytest.raises(RuntimeError, match="measure"):
        mean_loss(model, short).backward()


def test_overflows_without_a_scaled_loss_are_counted_like_any_other():
    model = tiny_opt(dtype=torch.float16)
    optimizer = addax_ds.Addax(model.parameters(), lr=1e9, alpha=1.0)
    addax_ds.attach(optimizer, model)

    x = token_batches(1)[0][0]

    def losses(values: Iterator[float]) -> Callable[[], Tensor]:
        return lambda: 0 * mean_loss(model, x).float() + next(values)

    for _ in range(MAX_NON_FINITE_STEPS - 1):
        optimizer.measure(losses(iter([1e4, -1e4])), None)
        optimizer.step()
        assert optimizer.report.has_nonfinite
    optimizer.measure(losses(iter([1e4, -1e4])), None)
    with pytest.raises(addax_ds.NonFiniteError, match=r"an update of .* that is not"):
        optimizer.step()
    assert optimizer.loss_scale.value == 2.0**16
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_loss_scale_of_one_that_was_asked_for_stays():
    model = tiny_opt(dtype=torch.float16)
    fixed = LossScale(1.0, growth_interval=0)
    optimizer = addax_ds.Addax(model.parameters(), lr=0.1, alpha=0.5, loss_scale=fixed)
    addax_ds.attach(optimizer, model)
    assert optimizer.loss_scale == fixed


class Nested(torch.nn.Module):
    """Its lists hold a list, and a module that is read without being called."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.experts = torch.nn.ModuleList([torch.nn.ModuleList([torch.nn.Linear(8, 8)])])
        self.tables = torch.nn.ModuleList([torch.nn.Embedding(4, 8)])

    def forward(self, x: torch.Tensor, read_table: bool) -> torch.Tensor:
        x = self.experts[0][0](x)
        return (x + self.tables[0].weight[0] if read_table else x).square().mean()


@pytest.mark.parametrize("read_table", [False, True])
def test_blocks_that_are_read_without_being_called_are_perturbed_too(read_table, caplog):
    model, x = Nested(), torch.randn(3, 8)
    optimizer = addax_ds.Addax(model.parameters(), lr=0.1, alpha=1.0, zo_eps=1e-2, seed=3)
    addax_ds.attach(optimizer, model)
    g0 = measured_g0(optimizer, lambda: model(x, read_table))
    optimizer.step()
    assert torch.equal(model.tables[0].weight, Nested().tables[0].weight) is not read_table
    explicit = []
    for sign in (1, -1):
        other = Nested()
        with torch.no_grad():
            for n, p in other.named_parameters():
                z = addax_ds.gaussian(3, 0, n, 0, p.numel()).view(p.shape)
                p.add_(z, alpha=sign * 1e-2)
            explicit.append(other(x, read_table).item())
    assert g0 == pytest.approx((explicit[0] - explicit[1]) / 2e-2, rel=1e-4)
    optimizer.measure(lambda: model(x, read_table), None)
    assert caplog.text.count("while no pass reads them: tables") == (0 if read_table else 1)


def test_detach_gives_the_model_back():
    model = tiny_opt()
    optimizer = addax_ds.Addax(model.parameters(), lr=0.1, alpha=0.0)
    addax_ds.attach(optimizer, model)
    sharding = addax_ds.attach(optimizer, model)  # a second time: no hook is left twice
    before = trainable(model)
    mean_loss(model, batches()[0][1]).backward()
    optimizer.step()
    assert distance(trainable(model), before) > 0
    sharding.detach()
    before = trainable(model)
    mean_loss(model, batches()[0][1]).backward()
    assert distance(trainable(model), before) == 0
    assert all(p.grad is not None for p in model.parameters())


def test_freezing_after_attaching_is_an_error():
    model, optimizer = build(CASES["tied"])
    model.model.decoder.embed_tokens.weight.requires_grad_(False)
    with pytest.raises(addax_ds.UserError, match="requires_grad"):
        optimizer.measure(lambda: mean_loss(model, batches()[0][0]), None)


def test_groups_are_added_before_attaching():
    model, optimizer = build(CASES["tied"])
    with pytest.raises(addax_ds.UserError, match="before the optimizer is attached"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))]})
    with pytest.raises(addax_ds.UserError, match=r"lr = -1\.0: it must be a number of at least 0"):
        addax_ds.Addax([{"params": list(model.parameters()), "lr": -1.0}], lr=0.1)


def test_norms_of_a_step_weigh_each_group_with_its_own_rate():
    model = tiny_opt()
    first, *others = model.parameters()
    groups = [{"params": [first], "lr": 0.0}, {"params": others, "lr": 0.5}]
    optimizer = addax_ds.Addax(groups, lr=0.1, alpha=0.25, zo_eps=1e-3, seed=1)
    addax_ds.attach(optimizer, model)
    optimizer.track_norm = True
    long, short = batches()[0]
    plain = tiny_opt()
    mean_loss(plain, short).backward()
    g0 = measured_g0(optimizer, lambda: mean_loss(model, long))
    mean_loss(model, short).backward()
    optimizer.step()
    squares = [p.grad.double().square().sum().item() for p in plain.parameters()]
    elements = sum(p.numel() for p in others)
    assert optimizer.report.gradient_norm == pytest.approx(sum(squares) ** 0.5, rel=1e-4)
    assert optimizer.report.first_order_norm == pytest.approx(
        0.5 * 0.75 * sum(squares[1:]) ** 0.5, rel=1e-4
    )
    assert optimizer.report.zeroth_order_norm == pytest.approx(0.5 * 0.25 * abs(g0) * elements**0.5)


def test_float64_weights_are_refused():
    model = tiny_opt().double()
    with pytest.raises(addax_ds.UserError, match="float64"):
        addax_ds.attach(addax_ds.Addax(model.parameters(), lr=0.1), model)


def test_weights_of_a_kind_of_their_own_are_refused():
    class Quantised(torch.Tensor):
        pass

    model = torch.nn.Linear(3, 3)
    model.weight = torch.nn.Parameter(model.weight.detach().as_subclass(Quantised))
    with pytest.raises(addax_ds.UserError, match=r"weight is a tensor of a kind .*Quantised"):
        addax_ds.attach(addax_ds.Addax(model.parameters(), lr=0.1), model)


class Borrowing(torch.nn.Module):
    """Reads weights in every way but its own module's forward."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = torch.nn.MultiheadAttention(8, 2)
        self.lstm = torch.nn.LSTM(8, 8)
        self.scripted = torch.jit.script(torch.nn.Linear(8, 8))
        self.tied = torch.nn.Linear(8, 8, bias=False)
        self.tied.weight = self.scripted.weight
        self.listed = torch.nn.ParameterList([torch.nn.Parameter(torch.randn(8))])
        self.held = [torch.nn.Parameter(torch.randn(8))]
        self.register_parameter("holder", self.held[0])
        self.looped = torch.nn.ModuleList([torch.nn.Linear(8, 8)])
        self.unused = torch.nn.ModuleList([torch.nn.Linear(8, 8), torch.nn.Embedding(2, 8)])

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(next(self.unused.parameters()).dtype)
        x = self.lstm(self.attention(x, x, x)[0])[0] + self.listed[0] * self.held[0]
        penalty = sum(p.square().sum() for p in self.looped.parameters())
        return self.scripted(x).square().mean() + penalty


def test_reads_in_passing_count_as_reads(caplog):
    model, x = Borrowing(), torch.randn(3, 2, 8)
    optimizer = addax_ds.Addax(model.parameters(), lr=0.1, alpha=1.0, zo_eps=1e-2, seed=3)
    addax_ds.attach(optimizer, model)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    g0 = measured_g0(optimizer, lambda: model(x))
    explicit = []
    for sign in (1, -1):
        other = Borrowing().eval()
        with torch.no_grad():
            for n, p in other.named_parameters():
                p.add_(addax_ds.gaussian(3, 0, n, 0, p.numel()).view(p.shape), alpha=sign * 1e-2)
            explicit.append(other(x).item())
    assert g0 == pytest.approx((explicit[0] - explicit[1]) / 2e-2, rel=1e-3)
    optimizer.step()
    still = {n for n, p in model.named_parameters() if torch.equal(p, before[n])}
    assert still == {"unused.0.weight", "unused.0.bias", "unused.1.weight"}
    assert "read 14 of 17 trainable parameters" in caplog.text
    assert caplog.text.rstrip().endswith("while no pass reads them: unused")


def test_a_vision_tower_is_left_alone_by_training_on_text():
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    torch.manual_seed(0)
    text = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 8}
    text |= {"num_key_value_heads": 1, "intermediate_size": 32, "vocab_size": 64}
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"intermediate_size": 16, "image_size": 28, "patch_size": 14}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    model = Gemma3ForConditionalGeneration(config)
    optimizer = addax_ds.Addax(model.parameters(), lr=1e-3, alpha=1.0)
    addax_ds.attach(optimizer, model)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    ids = torch.arange(12).view(2, 6)
    for _ in range(2):
        optimizer.measure(lambda: mean_loss(model, ids), None)
        optimizer.step()
    still = {n for n, p in model.named_parameters() if torch.equal(p, before[n])}
    assert still == {n for n in before if "vision_tower" in n or "multi_modal_projector" in n}
    assert still
    assert len(still) < len(before)


def test_kernels_are_called_for_many_parameters_at_once(monkeypatch):
    """On a GPU each call is a launch; a step of a block's 16 parameters would take 48 of them."""
    config = OPTConfig(
        hidden_size=16,
        ffn_dim=64,
        word_embed_proj_dim=16,
        num_hidden_layers=40,
        num_attention_heads=2,
        vocab_size=50,
        max_position_embeddings=20,
    )
    model = AutoModelForCausalLM.from_config(config).bfloat16()
    optimizer = addax_ds.Addax(model.parameters(), lr=1e-3)
    addax_ds.attach(optimizer, model)
    perturbed, updated = [], []
    fused = kernels.fused

    def noted(slices, operation, out=None, *more) -> None:
        (updated if out is None else perturbed).append([each.parameter_id for each in slices])
        fused(slices, operation, out, *more)

    monkeypatch.setattr(kernels, "fused", noted)
    tokens = torch.arange(8)[None]

    def loss() -> Tensor:
        return model(input_ids=tokens, labels=tokens).loss.float()

    optimizer.measure(loss, loss).backward()
    optimizer.step()
    every = sorted(info.parameter_id for info in optimizer.sharding.infos)
    assert len(every) == 40 * 16 + 4
    assert sorted(chain.from_iterable(updated)) == every
    assert sorted(chain.from_iterable(perturbed)) == sorted(2 * every)
    assert len(perturbed) == 2 * (40 + 1)  # the blocks, and what lies outside
    assert len(updated) <= 40 * 3 + 4
