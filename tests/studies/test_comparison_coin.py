"""The control whose zeroth-order update has the length of Addax's and any sign."""

import math
from collections.abc import Callable
from typing import Any

import torch
from safetensors.torch import load_file

from addax_ds.cli import train
from addax_ds.optim.estimator import TwoSidedDifference
from studies.comparison import coin
from studies.comparison.coin import CoinToss
from studies.comparison.runner import Comparison, _command
from studies.comparison.study import STUDIES
from tests.support.tiny import rows, write_model, write_rows

Weights = dict[str, torch.Tensor]
ALPHA = 0.1


def test_the_sign_is_a_fair_coins_and_the_size_is_kept():
    usual, tosses = TwoSidedDifference(2), CoinToss(2, seed=3)
    assert tosses.passes == usual.passes
    heads, trials = 0, 2000
    for number in range(trials):
        losses = (1.0, 1.0 + 0.01 * (-1) ** (number // 7) * (number + 1), 2.0, 3.0)
        wanted, found = (each.estimate(losses, 1e-3) for each in (usual, tosses))
        assert found.projected_gradients == wanted.projected_gradients
        for one, other in zip(found.coefficients, wanted.coefficients, strict=True):
            assert abs(one) == abs(other)
            heads += one == other
    assert abs(heads - trials) < 5 * math.sqrt(2 * trials) / 2


def test_a_step_has_addaxs_zeroth_order_part_or_its_opposite(tmp_path, launched):
    model, file = write_model(tmp_path / "start"), write_rows(tmp_path / "x.jsonl", rows(4, 4))
    values = {
        **{"model_name_or_path": model, "train_file": file, "max_steps": 1, "learning_rate": 0.05},
        **{"per_device_train_batch_size": 2, "lr_scheduler_type": "constant", "sharding": "none"},
        **{"report_to": "none", "disable_tqdm": True, "save_strategy": "no"},
    }

    def trained(name: str, run: Callable[..., Any] = train.finetune, **more: Any) -> Weights:
        given = {**values, "output_dir": tmp_path / name, **more}
        run([f"--{key}={value}" for key, value in given.items()])
        return load_file(tmp_path / name / "model" / "model.safetensors")

    start = load_file(model / "model.safetensors")
    rows_of_addax = {"method": "addax", "per_device_zo_batch_size": 2, "alpha": ALPHA}
    addax, tossed = trained("addax", **rows_of_addax), trained("coin", coin.main, **rows_of_addax)
    short = trained("short", method="ip-sgd", length_threshold="median")
    first = {name: w + (1 - ALPHA) * (short[name] - w) for name, w in start.items()}
    ours, coins = (
        torch.cat([(weights[name] - first[name]).flatten() for name in start])
        for weights in (addax, tossed)
    )
    assert ours.norm() > 1e-3 * torch.cat([w.flatten() for w in start.values()]).norm()
    assert min((coins - ours).norm(), (coins + ours).norm()) < 1e-3 * ours.norm()


def test_the_recipe_runs_it(tmp_path):
    study = STUDIES["coqa"]
    (trial,) = (t for t in study.grid if t.contender and t.contender.name == "addax-coin")
    command = _command(Comparison([study], tmp_path, {}).training(trial))
    assert any(word.endswith("studies/comparison/coin.py") for word in command)
    assert "--method=addax" in command
