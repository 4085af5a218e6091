"""Effect of bf16 on a perturbation of the demo's model, and the direction that deserves the credit.

A pass on bf16 weights sees round(theta + eps z), so the weights move along the realised direction
d = (round(theta + eps z) - round(theta - eps z)) / (2 eps) instead of z. Four remedies are
compared: rounding to nearest or stochastically (with the same bits for both signs), and u = z or
u = d in the update -lr g0 u. Weights, batch (one of the demo's zeroth-order batches) and gradient G
(one backward in fp32 at the same weights) stay fixed; every probe draws another z.

    OMP_NUM_THREADS=1 python -m benchmarks.perturbation --probes 96 --output perturbation.json

By class of parameters c (all, the norm gains, the rest), with n_c elements, means over probes and
standard errors from a bootstrap over them:

- unmoved: share of elements with d = 0; square of d: its mean; cosine: between z and d;
- corr z, corr d: correlation of g0 with <z, G> and <d, G>;
- efficiency of u = z or d: (E[g0 <u, G>] / |G_c|^2)^2 |G|^2 n_c / E[g0^2 |u|^2], the progress of
  one step at its best learning rate, where 1 is that of an exact derivative along a Gaussian z;
- fitted efficiency: the same with E[g0 <u, G>] = b sum E[d u G^2] and
  E[g0^2] = b^2 sum E[d^2 G^2] + s^2 out of the regression g0 = b <d, G> + noise of variance s^2.
  It is much less noisy, but takes the loss for linear over eps d.
- d / z: ratio of the two; its error is small, as the same probes stand above and below.

This model's gains are mostly between 0.2 and 0.4. With --unit_gains each decoder layer's are folded
into the matrices that follow them and become 1, where bf16 is coarser than eps: the same function,
except for one rounding of those matrices to bf16.
"""

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import addax_ds
from addax_ds import kernels
from addax_ds.data.batches import StepBatches, StepSchedule
from addax_ds.data.encoding import encode
from addax_ds.data.partition import partition
from addax_ds.data.train_rows import EncodedRows
from addax_ds.evaluation.likelihood import scores_of_logits, targets_of
from addax_ds.kernels.operation import Draw, Operation, Slice
from addax_ds.models import demo
from addax_ds.reading.records import prompt_completion
from addax_ds.tasks import TASKS
from benchmarks.common import collect_provenance

ROUNDINGS = ("nearest", "stochastic")
CLASSES = ("all", "norm gains", "rest")
# Over the elements of a class, by probe; `zd` is the sum of z d, `zdGG` that of z d G^2, and so on.
SUMS = ("unmoved", "zz", "zd", "dd", "zG", "dG", "zdGG", "ddGG")
CHUNK = 1 << 18  # elements at a time, so that intermediates stay in the cache
RESAMPLES = 1000

Sums = dict[str, NDArray[np.float64]]


def zeroth_order_batch(folder: Path, step: int, rows: int, seed: int) -> tuple[dict, int]:
    """Return the demo's zeroth-order batch of a step, and its number of target tokens."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    train = TASKS["sst2-demo"].rows().train
    records = [prompt_completion(r.prompt, r.answer, r.origin, False) for r in train]
    examples, _ = encode(records, tokenizer, max_length=None, model_positions=None)
    streams = partition([example.length for example in examples], "addax", "median")
    schedule = StepSchedule(streams.zeroth_order, streams.first_order, rows, rows, seed)
    item = StepBatches(EncodedRows(examples, tokenizer.pad_token_id), schedule, 0, 1)[step]
    (batch,) = item["zeroth_order"]
    return batch, item["zeroth_order_targets"]


def mean_loss(model: nn.Module, batch: dict, targets: int) -> Tensor:
    """The loss that `AddaxTrainer` trains on: fp32 softmax, summed in fp64."""
    logits = model(input_ids=batch["input_ids"]).logits
    return -scores_of_logits(logits, targets_of(batch["labels"]))[:, 0].sum() / targets


@torch.no_grad()
def fold_gains(model: Any) -> None:
    """Move the norm gains of a Llama's decoder layers into the matrices that follow them."""
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for norm, followers in (
            (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        ):
            for follower in followers:
                follower.weight.mul_(norm.weight)
            norm.weight.fill_(1.0)


class Experiment:
    """The weights, two copies to be perturbed, and the gradient, all of the same batch."""

    def __init__(
        self, model: nn.Module, batch: dict, targets: int, zo_eps: float, seed: int
    ) -> None:
        self.batch, self.targets, self.zo_eps, self.seed = batch, targets, zo_eps, seed
        exact = copy.deepcopy(model).float()
        names, parameters = zip(*exact.named_parameters(), strict=True)
        gradients = torch.autograd.grad(mean_loss(exact, batch, targets), parameters)
        self.gradients = {n: g.reshape(-1) for n, g in zip(names, gradients, strict=True)}
        self.weights = {n: p.data.view(-1) for n, p in model.named_parameters()}
        self.copies = {+1: copy.deepcopy(model), -1: copy.deepcopy(model)}
        self.perturbed = {
            sign: {n: p.data.view(-1) for n, p in perturbed.named_parameters()}
            for sign, perturbed in self.copies.items()
        }
        # As in `addax_ds.optim.addax`: what has one dimension is a bias or a norm gain.
        self.gains = {n for n, p in model.named_parameters() if p.dim() == 1}

    def constants(self) -> tuple[NDArray, NDArray]:
        """Number of elements and squared norm of the gradient, by class."""
        table = np.zeros((2, 3))
        for name, gradient in self.gradients.items():
            row = [gradient.numel(), torch.linalg.vector_norm(gradient).item() ** 2]
            table[:, 1 if name in self.gains else 2] += row
        table[:, 0] = table.sum(axis=1)
        return table[0], table[1]

    def probe(self, number: int, rounding: str) -> tuple[float, NDArray]:
        """Return g0, and the `SUMS` by class, of one direction."""
        table = np.zeros((len(CLASSES), len(SUMS)))
        for name, weight in self.weights.items():
            draw = Draw(self.seed, number, addax_ds.parameter_id(name))
            plus, minus = (self.perturbed[sign][name] for sign in (+1, -1))
            for out, c2 in ((plus, -self.zo_eps), (minus, self.zo_eps)):
                operation = Operation(draw, c2=(c2,), stochastic=rounding == "stochastic")
                kernels.fused([Slice(weight, operation.draw.parameter_id, 0)], operation, out)
            z = addax_ds.gaussian(self.seed, number, name, 0, weight.numel())
            sums = self._sums(z, plus, minus, self.gradients[name])
            table[1 if name in self.gains else 2] += sums
        table[0] = table.sum(axis=0)
        with torch.no_grad():
            plus_loss, minus_loss = (
                mean_loss(self.copies[sign], self.batch, self.targets).item() for sign in (+1, -1)
            )
        return (plus_loss - minus_loss) / (2 * self.zo_eps), table

    def _sums(self, z: Tensor, plus: Tensor, minus: Tensor, gradient: Tensor) -> NDArray:
        total = np.zeros(len(SUMS))
        for z_, plus_, minus_, g in zip(
            *(t.split(CHUNK) for t in (z, plus, minus, gradient)), strict=True
        ):
            d = (plus_.float() - minus_.float()).div_(2 * self.zo_eps)
            zg, dg = z_ * g, d * g
            pairs = ((z_, z_), (z_, d), (d, d), (z_, g), (d, g), (zg, dg), (dg, dg))
            unmoved = d.numel() - int(torch.count_nonzero(d))
            total += [unmoved, *(torch.dot(a, b).item() for a, b in pairs)]
        return total


def measures(g0: NDArray, sums: Sums, n: NDArray, energy: NDArray) -> dict[str, NDArray]:
    """Return the measures that the docstring of this file lists, each by class, of a set of probes.

    Args:
        g0: ``(probes,)``.
        sums: by name in `SUMS`, ``(probes, classes)``.
        n: elements of each class.
        energy: |G|^2 of each class.
    """
    mean = {name: values.mean(axis=0) for name, values in sums.items()}
    dG = sums["dG"][:, 0]
    slope = np.mean((g0 - g0.mean()) * (dG - dG.mean())) / dG.var()
    noise = np.var(g0 - slope * dG)
    g0_square = slope**2 * mean["ddGG"][0] + noise
    result = {
        "unmoved": mean["unmoved"] / n,
        "square of d": mean["dd"] / n,
        "cosine": np.mean(sums["zd"] / np.sqrt(sums["zz"] * sums["dd"]), axis=0),
        "variance of g0": np.full(3, g0.var(ddof=1)),
        "noise of g0": np.full(3, noise),
    }
    for u, square, weighted in (("z", "zz", "zdGG"), ("d", "dd", "ddGG")):
        inner = sums[f"{u}G"]
        result[f"corr {u}"] = np.array([np.corrcoef(g0, inner[:, c])[0, 1] for c in range(3)])
        ideal = energy**2 / (energy[0] * n)
        cost = (g0[:, None] ** 2 * sums[square]).mean(axis=0)
        result[f"efficiency {u}"] = (g0[:, None] * inner).mean(axis=0) ** 2 / (ideal * cost)
        gain = (slope * mean[weighted]) ** 2
        result[f"fitted efficiency {u}"] = gain / (ideal * g0_square * mean[square])
    for kind in ("efficiency", "fitted efficiency"):
        result[f"{kind} d / z"] = result[f"{kind} d"] / result[f"{kind} z"]
    return result


def summarise(g0: NDArray, sums: Sums, n: NDArray, energy: NDArray) -> dict:
    """Each measure with its bootstrap standard error, by class."""
    found = measures(g0, sums, n, energy)
    generator = np.random.default_rng(0)
    resampled: dict[str, list[NDArray]] = {name: [] for name in found}
    for _ in range(RESAMPLES):
        index = generator.integers(len(g0), size=len(g0))
        drawn = measures(g0[index], {k: v[index] for k, v in sums.items()}, n, energy)
        for name, values in drawn.items():
            resampled[name].append(values)
    return {
        c: {
            name: {"value": values[i], "error": float(np.std(resampled[name], axis=0)[i])}
            for name, values in found.items()
        }
        for i, c in enumerate(CLASSES)
    }


def table(results: dict) -> str:
    """The summaries as Markdown."""
    names = list(results[ROUNDINGS[0]][CLASSES[0]])
    lines = ["| rounding | class | " + " | ".join(names) + " |", "|---" * (len(names) + 2) + "|"]
    for rounding, by_class in results.items():
        for c, found in by_class.items():
            cells = [f"{found[name]['value']:.3g} ± {found[name]['error']:.1g}" for name in names]
            lines.append(f"| {rounding} | {c} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print a table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--probes", type=int, default=96, help="directions, at least 8")
    parser.add_argument("--zo_eps", type=float, default=1e-3, help="perturbation scale")
    parser.add_argument("--unit_gains", action="store_true", help="fold the layers' norm gains")
    parser.add_argument("--step", type=int, default=0, help="whose zeroth-order batch to take")
    parser.add_argument("--rows", type=int, default=8, help="examples of the batch")
    parser.add_argument("--seed", type=int, default=0, help="of z and of the batches")
    parser.add_argument("--output", type=Path, help="where the JSON goes")
    arguments = parser.parse_args()
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
    if arguments.probes < 8:
        parser.error("--probes must be 8 or more")

    folder = demo.model_folder()
    batch, targets = zeroth_order_batch(folder, arguments.step, arguments.rows, arguments.seed)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    if arguments.unit_gains:
        fold_gains(model)
    experiment = Experiment(model, batch, targets, arguments.zo_eps, arguments.seed)
    n, energy = experiment.constants()
    probes: dict[str, list[tuple[float, NDArray]]] = {rounding: [] for rounding in ROUNDINGS}
    for number in range(arguments.probes):
        for rounding in ROUNDINGS:
            probes[rounding].append(experiment.probe(number, rounding))
    results = {}
    for rounding, drawn in probes.items():
        sums = np.stack([s for _, s in drawn])
        by_name = {name: sums[:, :, i] for i, name in enumerate(SUMS)}
        results[rounding] = summarise(np.array([g for g, _ in drawn]), by_name, n, energy)
    report = {
        "configuration": {k: v for k, v in vars(arguments).items() if k != "output"},
        "circumstances": collect_provenance(),
        "model": demo.MODEL_LABEL,
        "data": "re-partitioned SST-2 validation rows",
        "batch_shape": list(batch["input_ids"].shape),
        "elements": dict(zip(CLASSES, n.tolist(), strict=True)),
        "gradient_squared_norm": dict(zip(CLASSES, energy.tolist(), strict=True)),
        "results": results,
    }
    print(table(results))
    if arguments.output:
        arguments.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
