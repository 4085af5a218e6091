"""Misuse of `Addax` is an error that says what to do, and its state is what it promises."""

import functools
import json
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import addax_ds
from addax_ds import Addax, UserError, attach
from addax_ds.optim.loss_scale import LossScale
from addax_ds.optim.report import MAX_NON_FINITE_STEPS, NonFiniteError
from addax_ds.sharding import base
from tests.support.passes import measured_g0


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.head = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).tanh()
        return self.head(x).square().mean()


X = torch.linspace(-1, 1, 12).view(3, 4)


def toy(**options) -> tuple[Toy, Addax]:
    model = Toy()
    optimizer = Addax(model.parameters(), **{"lr": 0.1, "alpha": 0.5, "seed": 4, **options})
    attach(optimizer, model)
    return model, optimizer


def one_step(model: Toy, optimizer: Addax) -> float:
    g0 = measured_g0(optimizer, lambda: model(X))
    model(X).backward()
    optimizer.step()
    return g0


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("finish", ["backward", "step"])
def test_zeroth_order_must_come_first(finish):
    model, optimizer = toy()
    before = weights(model)
    with pytest.raises(RuntimeError, match=r"measure\(\) was not called .* set alpha to 0"):
        model(X).backward() if finish == "backward" else optimizer.step()
    assert same(weights(model), before)


def test_zeroth_order_once_a_step():
    model, optimizer = toy()
    optimizer.measure(lambda: model(X), None)
    with pytest.raises(RuntimeError, match="first in it and once"):
        optimizer.measure(lambda: model(X), None)


def test_zeroth_order_after_a_backward():
    model, optimizer = toy()
    optimizer.measure(lambda: model(X), None)
    model(X).backward()
    with pytest.raises(RuntimeError, match="first in it and once"):
        optimizer.measure(lambda: model(X), None)


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_two_backwards_in_a_step(alpha):
    model, optimizer = toy(alpha=alpha)
    optimizer.measure(lambda: model(X), None)
    model(X).backward()
    with pytest.raises(RuntimeError, match=r"give measure\(\) one closure for each"):
        model(X).backward()


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_a_step_whose_loss_was_not_run_backward(alpha):
    model, optimizer = toy(alpha=alpha)
    twin, reference = toy(alpha=alpha)
    losses = (lambda: model(X), lambda: model(X))
    loss, before = optimizer.measure(*losses), weights(model)
    with pytest.raises(RuntimeError, match=r"no backward ran in this step: call backward\(\)"):
        optimizer.step()
    assert same(weights(model), before)
    loss.backward()
    optimizer.step()
    one_step(twin, reference)
    assert same(weights(model), weights(twin))


def test_a_step_of_nothing():
    model, optimizer = toy(alpha=0.0)
    one_step(model, optimizer)
    with pytest.raises(RuntimeError, match="no backward ran"):
        optimizer.step()
    assert optimizer.index == 1
    one_step(model, optimizer)


def test_a_step_without_a_first_order_part_needs_no_backward():
    model, optimizer = toy()
    optimizer.measure(lambda: model(X), None)
    optimizer.step()
    optimizer.measure(lambda: model(X), lambda: model(X) * torch.nan)
    optimizer.step()
    assert optimizer.index == 2


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_neither_a_backward_nor_a_step_within_a_zeroth_order_pass(alpha):
    model, optimizer = toy(alpha=alpha)
    twin, reference = toy(alpha=alpha)
    before = weights(model)

    def backward():
        with torch.enable_grad():
            model(X).backward()

    for inside, message in (
        (backward, "got a gradient in a zeroth-order"),
        (optimizer.step, "within a"),
    ):
        with pytest.raises(RuntimeError, match=message):
            optimizer.measure(lambda inside=inside: inside() or model(X), None)
        optimizer.zero_grad()
        assert same(weights(model), before)
    assert one_step(model, optimizer) == one_step(twin, reference)
    assert same(weights(model), weights(twin))


def test_a_parameter_frozen_between_its_forward_and_its_backward():
    model, optimizer = toy()
    loss = optimizer.measure(lambda: model(X), lambda: model(X))
    model.head.weight.requires_grad_(False)
    with pytest.raises(UserError, match="requires_grad of a parameter has changed"):
        loss.backward()


def test_a_parameter_that_was_replaced():
    model, optimizer = toy()
    model.layers[1].weight = nn.Parameter(torch.ones(4, 4))
    with pytest.raises(UserError, match=r"layers\.1\.weight was replaced by another"):
        optimizer.measure(lambda: model(X), None)


@pytest.mark.parametrize("what", ["detached", "requires_grad"])
def test_a_change_between_backward_and_step(what):
    model, optimizer = toy()
    optimizer.measure(lambda: model(X), lambda: model(X)).backward()
    if what == "detached":
        optimizer.sharding.detach()
    else:
        model.head.weight.requires_grad_(False)
    with pytest.raises(UserError, match=what):
        optimizer.step()


def test_a_closure_that_does_not_call_the_model():
    _, optimizer = toy()
    with pytest.raises(RuntimeError, match="read no trainable parameter"):
        optimizer.measure(lambda: torch.tensor(1.0), None)


def test_half_precision_loss():
    model, optimizer = toy()
    before = weights(model)
    with pytest.raises(TypeError, match=r"torch\.bfloat16.*Compute the loss in fp32"):
        optimizer.measure(lambda: model(X).bfloat16(), None)
    assert same(weights(model), before)


@pytest.mark.parametrize("loss", [torch.ones(2), 1.0, None])
def test_closure_has_to_return_a_scalar_tensor(loss):
    _, optimizer = toy()
    with pytest.raises(TypeError, match="scalar tensor"):
        optimizer.measure(lambda: loss, None)


def test_integer_loss():
    _, optimizer = toy()
    with pytest.raises(TypeError, match=r"torch\.int64"):
        optimizer.measure(lambda: torch.tensor(1), None)


def test_a_step_can_be_taken_after_a_refused_closure():
    model, optimizer = toy()
    twin, reference = toy()
    with pytest.raises(TypeError):
        optimizer.measure(lambda: torch.ones(2), None)
    assert one_step(model, optimizer) == one_step(twin, reference)
    assert same(weights(model), weights(twin))


def test_step_takes_no_closure():
    model, optimizer = toy()
    with pytest.raises(ValueError, match="measure"):
        optimizer.step(lambda: model(X))


def test_not_attached():
    model = Toy()
    optimizer = Addax(model.parameters(), lr=0.1, alpha=0.5)
    with pytest.raises(RuntimeError, match=r"addax_ds\.attach\(optimizer, model\)"):
        optimizer.measure(lambda: model(X), None)
    sgd = Addax(model.parameters(), lr=0.1, alpha=0.0)
    with pytest.raises(RuntimeError, match=r"addax_ds\.attach\(optimizer, model\)"):
        sgd.step()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, r"lr = -1\.0: it must be a number of at least 0"),
        ({"lr": float("nan")}, "lr = nan: it must be"),
        ({"lr": np.float32("inf")}, "lr = np.float32.inf.: it must be"),
        ({"alpha": 1.5}, r"alpha = 1\.5: it must be a number from 0 to 1"),
        ({"alpha": -0.1}, "alpha = -0"),
        ({"zo_eps": 0.0}, r"zo_eps = 0\.0: it must be a number above 0"),
        ({"weight_decay": -0.1}, "weight_decay = -0"),
        ({"seed": -1}, "seed = "),
        ({"seed": 1 << 64}, "seed = "),
        ({"rounding": "up"}, "rounding = 'up': it must be 'stochastic' or 'nearest'"),
        ({"zo_directions": 0}, "zo_directions = 0: it must be an integer from 1 to 1024"),
        ({"zo_directions": 1025}, "zo_directions = 1025"),
        ({"zo_directions": 1.0}, "zo_directions = 1.0"),
        ({"zo_directions": True}, "zo_directions = True"),
    ],
)
def test_hyperparameters_out_of_range(options, message):
    with pytest.raises(UserError, match=message):
        Addax(Toy().parameters(), **{"lr": 0.1, **options})


def test_hyperparameters_of_numpy_become_those_of_python():
    values = {"lr": np.float32(0.5), "alpha": np.float64(0.25), "zo_directions": np.int64(2)}
    optimizer = Addax(Toy().parameters(), **values)
    given = [optimizer.param_groups[0]["lr"], optimizer.alpha, optimizer.zo_directions]
    assert json.loads(json.dumps(given)) == [0.5, 0.25, 2]


def test_parameters_of_another_model():
    with pytest.raises(UserError, match=r"shape \(4, 4\) that the model does not have"):
        attach(Addax(Toy().parameters(), lr=0.1), Toy())


def test_two_names_with_one_id(monkeypatch):
    monkeypatch.setattr(base, "parameter_id", lambda name: len(name))
    with pytest.raises(
        UserError, match=r"'layers\.0\.weight' and 'layers\.1\.weight' share the id"
    ):
        toy()


def test_alpha_0_never_calls_the_closure():
    model, optimizer = toy(alpha=0.0)
    assert measured_g0(optimizer, lambda: 1 / 0) == 0.0
    before = weights(model)
    model(X).backward()
    optimizer.step()
    assert optimizer.report is not None
    assert optimizer.report.g0 is None
    assert not same(weights(model), before)


def test_no_gradients_are_left():
    model, optimizer = toy()
    one_step(model, optimizer)
    assert all(p.grad is None for p in model.parameters())


def test_groups_have_their_own_learning_rate_and_decay():
    model = Toy()
    groups = [
        {"params": model.layers.parameters(), "lr": 0.0},
        {"params": model.head.parameters(), "weight_decay": 0.5},
    ]
    optimizer = Addax(groups, lr=0.1, alpha=1.0, seed=4)
    attach(optimizer, model)
    before, head = weights(model.layers), model.head.weight.detach().clone()
    g0 = measured_g0(optimizer, lambda: model(X))
    optimizer.step()
    assert same(weights(model.layers), before)
    z = addax_ds.gaussian(4, 0, "head.weight", 0, 4)
    assert torch.allclose(model.head.weight, head * (1 - 0.1 * 0.5) - 0.1 * g0 * z, atol=1e-7)


@pytest.mark.parametrize("zo_directions", [1, 2])
def test_state_continues_the_run(zo_directions):
    model, optimizer = toy(zo_directions=zo_directions)
    one_step(model, optimizer)
    state, saved = optimizer.state_dict(), {k: v.clone() for k, v in model.state_dict().items()}
    wanted = [one_step(model, optimizer) for _ in range(2)]

    other, resumed = toy(lr=0.7, zo_directions=zo_directions)
    other.load_state_dict(saved)
    resumed.load_state_dict(state)
    assert resumed.param_groups[0]["lr"] == 0.1
    assert [one_step(other, resumed) for _ in range(2)] == wanted
    assert same(weights(other), weights(model))


def test_state_holds_no_tensors():
    """The weights are all there is, so a checkpoint of the optimizer has a few numbers."""
    model, optimizer = toy()
    one_step(model, optimizer)
    assert optimizer.state_dict()["state"] == {}


def test_state_of_another_seed():
    _, optimizer = toy()
    _, other = toy(seed=5)
    with pytest.raises(UserError, match=r"written with seed 4, this run has seed 5.*--seed 4"):
        other.load_state_dict(optimizer.state_dict())


def test_non_finite_losses_skip_the_part_and_stop_after_ten_in_a_row(caplog):
    model, optimizer = toy(alpha=1.0)
    before = weights(model)

    def spoilt() -> Tensor:
        return model(X) * torch.inf

    for _ in range(MAX_NON_FINITE_STEPS - 1):
        assert measured_g0(optimizer, spoilt) == 0.0
        optimizer.step()
    assert same(weights(model), before)
    assert len(caplog.records) == MAX_NON_FINITE_STEPS - 1
    one_good = measured_g0(optimizer, lambda: model(X))
    optimizer.step()
    assert one_good != 0.0
    for _ in range(MAX_NON_FINITE_STEPS - 1):  # counted from the start again
        optimizer.measure(spoilt, None)
        optimizer.step()
    optimizer.measure(spoilt, None)
    with pytest.raises(NonFiniteError, match=r"10th step in a row.*lower the learning rate"):
        optimizer.step()


def test_one_infinite_loss_of_two_is_enough():
    model, optimizer = toy(alpha=1.0)
    losses = iter([torch.tensor(1.0), torch.tensor(torch.inf)])
    assert measured_g0(optimizer, lambda: 0 * model(X) + next(losses)) == 0.0
    optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_step_follows_one_whose_first_order_loss_raised():
    model, optimizer = toy()

    def failing():
        model(X)
        raise KeyError("on purpose")

    with pytest.raises(KeyError, match="on purpose"):
        optimizer.measure(lambda: model(X), failing)
    before = weights(model)
    loss = optimizer.measure(lambda: model(X), lambda: model(X))
    loss.backward()
    optimizer.step()
    assert not same(weights(model), before)


class NoMemory(torch.autograd.Function):
    """Runs out of memory in its backward."""

    @staticmethod
    def forward(context, x):
        return x.view_as(x)

    @staticmethod
    def backward(context, gradient):
        raise torch.OutOfMemoryError("on purpose")


def broken_in_the_middle(model: Toy) -> Tensor:
    x = NoMemory.apply(model.layers[0](X).tanh())
    return model.head(model.layers[1](x).tanh()).square().mean()


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.01}, {"alpha": 0.0}])
def test_a_step_is_as_if_a_backward_before_it_had_not_raised(options):
    """In `measure`: that of a first micro-batch, or of the one that finds the norm."""

    def trained(breaks: bool) -> list[Tensor]:
        model, optimizer = toy(**options)

        def first_order() -> list:
            count = 1 if "max_grad_norm" in options else 2
            return [lambda: model(X)] * count

        if breaks:
            with pytest.raises(torch.OutOfMemoryError):
                optimizer.measure(
                    lambda: model(X), [lambda: broken_in_the_middle(model), *first_order()[1:]]
                )
        optimizer.measure(lambda: model(X), first_order()).backward()
        optimizer.step()
        return weights(model)

    assert same(trained(True), trained(False))


def test_a_step_can_be_given_up_after_a_backward_of_the_caller_s():
    model, optimizer = toy()
    optimizer.measure(lambda: model(X), None)
    with pytest.raises(torch.OutOfMemoryError):
        NoMemory.apply(model(X)).backward()
    with pytest.raises(RuntimeError, match=r"no backward ran .*abandon\(\)"):
        optimizer.step()
    with pytest.raises(RuntimeError, match=r"have to come first .*abandon\(\)"):
        optimizer.measure(lambda: model(X), None)
    optimizer.abandon()
    plain, other = toy()
    assert one_step(model, optimizer) == one_step(plain, other)
    assert same(weights(model), weights(plain))


def test_clipping_leaves_the_gradients_of_another_optimizer_alone():
    """The backward that finds the norm runs through its parameters, too."""

    def of_the_head(**options) -> list[Tensor]:
        model = Toy()
        optimizer = Addax(model.layers.parameters(), lr=0.1, alpha=0.5, **options)
        attach(optimizer, model)
        model.head.weight.grad = torch.ones_like(model.head.weight)  # from before
        optimizer.measure(lambda: model(X), lambda: model(X)).backward()
        optimizer.step()
        return [model.head.weight.grad, model.head.bias.grad]

    assert same(of_the_head(max_grad_norm=1e9), of_the_head())


def test_a_compiled_closure_sees_perturbed_weights():
    """Its first call, which compiles, and later ones."""
    model, optimizer = toy()
    plain, other = toy()
    compiled = torch.compile(lambda: model(X), backend="eager")
    for _ in range(2):
        expected = measured_g0(other, lambda: plain(X))
        assert measured_g0(optimizer, compiled) == expected != 0.0
        for each in (optimizer, other):
            each.abandon()
    with torch.no_grad():
        compiled()
    assert measured_g0(optimizer, compiled) == expected
    optimizer.abandon()
    # What a decorator has made of it is called, as it is another loss.
    halved = functools.wraps(compiled)(lambda: 0.5 * model(X))
    assert measured_g0(optimizer, halved) == pytest.approx(expected / 2)


def test_what_a_group_cannot_have_is_refused():
    model = Toy()
    with pytest.raises(UserError, match="alpha holds for all groups"):
        Addax([{"params": model.parameters(), "alpha": 0.0}], lr=0.1)
    frozen = Toy().requires_grad_(False)
    with pytest.raises(UserError, match="none of the parameters it was given is trainable"):
        attach(Addax(frozen.parameters(), lr=0.1), frozen)


@pytest.mark.parametrize("loads_first", [True, False])
def test_the_loss_scale_is_resumed_before_or_after_attaching(loads_first):
    model, optimizer = Toy().half(), None
    optimizer = Addax(model.parameters(), lr=0.1, loss_scale=LossScale(2.0**9))
    state = optimizer.state_dict()
    again = Addax(model.parameters(), lr=0.1)
    if loads_first:
        again.load_state_dict(state)
    attach(again, model)
    if not loads_first:
        again.load_state_dict(state)
    assert again.loss_scale.value == 2.0**9


def test_a_stray_forward_is_named_once():
    model, optimizer = toy()
    model(X)
    with pytest.raises(RuntimeError, match=r"torch\.no_grad.*call again"):
        optimizer.measure(lambda: model(X), None)
    one_step(model, optimizer)


def test_a_model_has_one_optimizer_at_a_time():
    model, optimizer = toy()
    with pytest.raises(UserError, match=r"another Addax optimizer .* call detach\(\)"):
        attach(Addax(model.parameters(), lr=0.1), model)
    one_step(model, optimizer)  # the first one goes on
    optimizer.sharding.detach()
    with pytest.raises(UserError, match="was detached from the model: attach it again"):
        optimizer.measure(lambda: model(X), None)
    other = Addax(model.parameters(), lr=0.1, alpha=0.5)
    attach(other, model)
    one_step(model, other)


@pytest.mark.parametrize("place", ["around", "inside"])
def test_nor_has_a_part_of_it_another(place):
    model, optimizer = toy()
    other = nn.Sequential(model) if place == "around" else model.layers
    with pytest.raises(UserError, match="attached to this model, or to a part of it"):
        attach(Addax(other.parameters(), lr=0.1), other)
    one_step(model, optimizer)


def test_models_may_share_what_neither_trains():
    body, heads = Toy().requires_grad_(False), [nn.Linear(4, 1) for _ in range(2)]
    for head in heads:
        model = nn.Sequential(body.layers, head)
        attach(Addax([p for p in model.parameters() if p.requires_grad], lr=0.1), model)


@pytest.mark.parametrize("directions", [1, 2])
def test_what_closures_draw_is_the_same_in_all_passes_of_a_step(directions):
    """Else g0 would be the difference of two masks."""
    model, optimizer = toy(zo_directions=directions)
    drawn: list[Tensor] = []

    def noisy() -> Tensor:
        drawn.append(torch.randn_like(X))
        return model(X + drawn[-1])

    torch.manual_seed(0)
    for _ in range(2):
        optimizer.measure([noisy, noisy], lambda: model(X)).backward()
        optimizer.step()
    steps = torch.stack(drawn).view(2, 2 * directions, 2, *X.shape)
    torch.manual_seed(0)
    for passes in steps:
        expected = torch.stack([torch.randn_like(X), torch.randn_like(X)])
        for one in passes:
            assert torch.equal(one, expected)


def test_state_of_another_optimizer():
    _, optimizer = toy()
    other = torch.optim.SGD(Toy().parameters(), lr=0.1)
    with pytest.raises(UserError, match="the state of another optimizer"):
        optimizer.load_state_dict(other.state_dict())


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_norm_to_clip_by_that_is_not_finite_leaves_the_part_out(poison):
    """The loss is finite, and so is most of the gradient."""
    model = torch.nn.Linear(3, 2)
    optimizer = addax_ds.Addax(model.parameters(), lr=0.1, alpha=0.0, max_grad_norm=1.0)
    addax_ds.attach(optimizer, model)
    before = [p.detach().clone() for p in model.parameters()]

    def loss() -> torch.Tensor:
        output = model(torch.ones(1, 3))
        output.register_hook(lambda gradient: gradient * torch.tensor([poison, 1.0]))
        return output.sum()

    assert optimizer.measure(None, loss) is None
    optimizer.step()
    assert optimizer.report.has_nonfinite
    assert all(map(torch.equal, before, model.parameters()))
