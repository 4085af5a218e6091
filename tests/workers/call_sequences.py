"""Calls the public API in random orders, legal ones and others, on any back end.

A walk is a training of a few steps into which calls are put, and out of which calls are left or
swapped. It ends with the weights, or with the first error.
"""

import random
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import addax_ds
from tests.support.cases import mean_loss
from tests.support.layouts import LAYOUTS, Run, Zero3
from tests.support.models import tiny_opt, token_batches
from tests.support.reference import Hyperparameters

STEPS = 4
METHODS = {
    "addax": Hyperparameters(lr=0.02, alpha=0.1),
    "mezo": Hyperparameters(lr=1e-4, alpha=1.0),
    "ip-sgd": Hyperparameters(lr=0.02, alpha=0.0),
    "clipped": Hyperparameters(lr=0.02, alpha=0.1, max_grad_norm=0.5),
}
VOCABULARY = 67


def build() -> nn.Module:
    return tiny_opt(vocabulary=VOCABULARY, unused=True).train()


def batches() -> list[tuple[Tensor, Tensor]]:
    return [(x % VOCABULARY, y % VOCABULARY) for x, y in token_batches(STEPS, length=12)]


class Walk:
    """A training whose calls are methods, by name.

    Attributes:
        finished: number of steps that `step` has completed.
    """

    def __init__(self, run: Run, alpha: float, folder: Path) -> None:
        self.run, self.alpha, self.folder = run, alpha, folder
        self.addax = run.optimizer.sharding and getattr(run.optimizer, "optimizer", run.optimizer)
        self.finished = 0
        self.loss: Tensor | None = None

    def of_rank(self, which: int) -> Tensor:
        rows = batches()[min(self.finished, STEPS - 1)][which]
        return rows.chunk(dist.get_world_size())[dist.get_rank()]

    def zeroth(self) -> Tensor:
        return mean_loss(self.run.model, self.of_rank(0))

    def first(self) -> Tensor:
        return mean_loss(self.run.model, self.of_rank(1))

    # ---- the step ------------------------------------------------------------------------------

    def measure(self) -> None:
        self.loss = self.run.optimizer.measure(self.zeroth, self.first)

    def zeroth_order(self) -> None:
        self.run.optimizer.measure(self.zeroth, None)
        self.loss = self.first() if self.alpha < 1 else None

    def backward(self) -> None:
        if self.loss is not None:
            self.run.backward(self.loss)

    def step(self) -> None:
        self.run.step()
        self.finished += 1

    # ---- between its parts ---------------------------------------------------------------------

    def evaluate(self) -> None:
        self.run.model.eval()
        with torch.no_grad():
            self.zeroth()
        self.run.model.train()

    def evaluate_and_stay(self) -> None:
        self.run.model.eval()
        with torch.no_grad():
            self.zeroth()

    def evaluate_announced(self) -> None:
        with torch.no_grad(), self.addax.sharding.forward_only():
            self.zeroth()

    def generate(self) -> None:
        module = getattr(self.run.model, "module", self.run.model)
        with torch.no_grad():
            module.generate(self.of_rank(0)[:, :3], max_new_tokens=2, do_sample=False)

    def eval_mode(self) -> None:
        self.run.model.eval()

    def train_mode(self) -> None:
        self.run.model.train()

    def inference_mode(self) -> None:
        with torch.inference_mode():
            self.zeroth()

    def forward(self) -> None:
        self.first()

    def own_backward(self) -> None:
        self.run.backward(self.first())

    def state_of_model(self) -> None:
        self.run.model.state_dict()

    def state_of_optimizer(self) -> None:
        self.addax.load_state_dict(self.addax.state_dict())

    def save(self) -> None:
        addax_ds.save_weights(getattr(self.run.model, "module", self.run.model), self.folder)

    def zero_grad(self) -> None:
        self.run.optimizer.zero_grad()
        self.run.model.zero_grad()

    def weights(self) -> None:
        self.run.weights()

    def freeze(self) -> None:
        self._some().requires_grad_(False)

    def unfreeze(self) -> None:
        self._some().requires_grad_(True)

    def detach(self) -> None:
        self.addax.sharding.detach()

    def failing_zeroth(self) -> None:
        with suppress(KeyError):
            self.run.optimizer.measure(self._failing, self.first)

    def failing_first(self) -> None:
        with suppress(KeyError):
            self.run.optimizer.measure(self.zeroth, self._failing)

    def rehearse(self) -> None:
        self.addax.rehearse(self.zeroth, self.first)

    def step_in_closure(self) -> None:
        self.run.optimizer.measure(self._stepping, self.first)

    def backward_in_closure(self) -> None:
        self.run.optimizer.measure(self._backward, self.first)

    def _some(self) -> Any:
        module = getattr(self.run.model, "module", self.run.model)
        return module.model.decoder.layers[1].fc1.weight

    def _failing(self) -> Tensor:
        self.zeroth()
        raise KeyError("on purpose")

    def _stepping(self) -> Tensor:
        loss = self.zeroth()
        self.run.step()
        return loss

    def _backward(self) -> Tensor:
        with torch.enable_grad():
            loss = self.zeroth()
            self.run.backward(loss)
        return loss.detach()


STEP = ("measure", "backward", "step")
HELPERS = ("of_rank", "zeroth", "first")
CALLS = [name for name in vars(Walk) if not name.startswith("_") and name not in HELPERS]
HARMLESS = [
    *("evaluate", "evaluate_and_stay", "evaluate_announced", "generate", "inference_mode"),
    *("eval_mode", "train_mode", "state_of_model", "state_of_optimizer", "save", "weights"),
    *("zero_grad", "unfreeze"),
]
"""Calls that are legal everywhere."""


def is_legal(walk: list[str]) -> bool:
    """Return whether a walk is whole steps, with harmless calls in between."""
    names = [name for name in walk if name not in HARMLESS]
    return names == list(STEP) * (len(names) // len(STEP))


def calls(seed: int) -> list[str]:
    """The calls of a walk: some steps, calls in between, and mostly a slip."""
    chance = random.Random(seed)
    found = list(STEP) * chance.randint(2, STEPS)
    for _ in range(chance.randint(2, 5)):
        found.insert(chance.randrange(len(found)), chance.choice(HARMLESS))
    if chance.random() < 0.75:
        slip, place = chance.choice(("insert", "leave out", "move")), chance.randrange(len(found))
        moved = found.pop(place) if slip != "insert" else chance.choice(CALLS)
        if slip != "leave out":
            found.insert(chance.randrange(len(found)), moved)
    # Backward updates in place: weights are those of a number of steps after a step alone.
    return found[: len(found) - found[::-1].index("step")]


def run_case(layout: str, key: tuple[str, int]) -> dict[str, Any]:
    method, seed = key
    return walk(layout, method, calls(seed))


def walk(layout: str, method: str, names: list[str]) -> dict[str, Any]:
    h = METHODS[method]
    run = LAYOUTS[layout].run(build(), h)
    with tempfile.TemporaryDirectory() as folder:
        each = Walk(run, h.alpha, Path(folder))
        result: dict[str, Any] = {"calls": [], "error": None}
        for name in names:
            result["calls"].append(name)
            try:
                getattr(each, name)()
            except Exception as error:
                result["error"] = described(error)
                break
        result["finished"] = each.finished
        if result["error"] is None:
            result["weights"] = each.run.weights()
    if isinstance(run, Zero3):
        run.close()
    else:
        run.optimizer.sharding.detach()
    return result


def described(error: Exception) -> dict[str, str]:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = "" if trace is None else trace.tb_frame.f_code.co_filename
    return {"type": type(error).__name__, "said": str(error), "where": where}


def set_up() -> None:
    dist.init_process_group("gloo")
