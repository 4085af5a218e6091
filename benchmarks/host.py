"""Time that the host spends on a step: Python of this project, of the engine and of autograd.

    python benchmarks/host.py --against /path/to/another/checkout --output benchmarks/results

The model has 40 layers of 16 parameters and almost no arithmetic. One rank on one core, CPU seconds
of its process. On a GPU the same Python runs, and kernels do the arithmetic beside it.

Each back end has a process, and each checkout its own. They take turns, round after round, in the
opposite order in every other round. "parts" is what a step is made of, on the same back end: two
forwards without autograd, one forward and its backward, with gradients that are dropped. Nothing of
this project runs in it.

Launches are calls of the kernels, each of which would be one launch on a GPU.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).parent.parent
CHECKOUT = Path(os.environ.get("ADDAX_CHECKOUT", ROOT))
sys.path.insert(0, str(CHECKOUT))  # whose code this process measures; this file may be another's

BACK_ENDS = ("zero3", "fsdp2", "none")
WARM_UP_ROUNDS = 4  # DeepSpeed follows its recorded order of modules from the third step on
LAYERS, HIDDEN = 40, 64
LEARNING_RATE = 1e-4

Run = Callable[[], object]


# ---- one back end of one checkout ----------------------------------------------------------------


def model(layers: int) -> Any:
    """OPT with random bf16 weights."""
    import torch
    from transformers import AutoModelForCausalLM, OPTConfig

    torch.manual_seed(0)
    config = OPTConfig(
        hidden_size=HIDDEN,
        ffn_dim=4 * HIDDEN,
        word_embed_proj_dim=HIDDEN,
        num_hidden_layers=layers,
        num_attention_heads=4,
        vocab_size=512,
        max_position_embeddings=128,
        dropout=0.0,
        use_cache=False,
    )
    return AutoModelForCausalLM.from_config(config).bfloat16().train()


def loss_of(called: Any) -> Callable[[], Any]:
    """Return a closure that runs a model on a few tokens."""
    import torch

    tokens = torch.arange(8)[None]
    return lambda: called(input_ids=tokens, labels=tokens).loss.float()


def passes(called: Any) -> Any:
    """Run the zeroth-order passes of "parts", and return the loss of the first-order one."""
    import torch

    loss = loss_of(called)
    with torch.no_grad():
        loss()
        loss()
    return loss()


def attached(layers: int, sharding: str) -> tuple[Run, Run]:
    """Return a step and its parts, without an engine."""
    from torch import nn

    import addax_ds
    from addax_ds.sharding.fsdp2 import shard_model

    models = [model(layers) for _ in range(2)]
    if sharding == "fsdp2":
        for each in models:
            shard_model(each)
    optimizer = addax_ds.Addax(models[0].parameters(), LEARNING_RATE)
    addax_ds.attach(optimizer, models[0])

    def step() -> None:
        loss = loss_of(models[0])
        measured = optimizer.measure(loss, loss)
        assert measured is not None
        measured.backward()
        optimizer.step()

    def drop(parameter: nn.Parameter) -> None:
        parameter.grad = None

    for parameter in models[1].parameters():
        parameter.register_post_accumulate_grad_hook(drop)
    return step, lambda: passes(models[1]).backward()


def with_deepspeed(layers: int) -> tuple[Run, Run]:
    """Return a step and its parts under ZeRO-3, with timers as the checkout's JSON sets them."""
    import deepspeed
    import torch
    from torch import nn

    import addax_ds  # noqa: F401  (registers the optimizer)

    shipped = json.loads((CHECKOUT / "ds_configs" / "zero3.json").read_text())
    common = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "zero_allow_untested_optimizer": True,
        **{key: value for key, value in shipped.items() if key == "timers"},
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": True,
            "contiguous_gradients": True,
            # The arithmetic that stands for "auto", and gathers that do not outlive a module.
            "reduce_bucket_size": HIDDEN * HIDDEN,
            "stage3_prefetch_bucket_size": int(0.9 * HIDDEN * HIDDEN),
            "stage3_param_persistence_threshold": 10 * HIDDEN,
            # Two layers, and what stays.
            "stage3_max_live_parameters": 150_000,
            "stage3_max_reuse_distance": 50_000,
        },
    }

    def engine_of(kind: str) -> tuple[Any, Any]:
        optimizer = {"type": kind, "params": {"lr": LEARNING_RATE}}
        config = {**common, "optimizer": optimizer}
        engine, wrapped, _, _ = deepspeed.initialize(model=model(layers), config=config)
        return engine, wrapped

    engine, optimizer = engine_of("Addax")

    def step() -> None:
        loss = loss_of(engine)
        engine.backward(optimizer.measure(loss, loss))
        engine.step()

    # As in `contenders.parts`: an engine for each kind of pass, which updates nothing.
    forward_engine, _ = engine_of("SGD")
    forward_engine.eval()
    idle, dropping = engine_of("SGD")

    def drop(parameters: list[nn.Parameter], shards: list[Any]) -> None:
        for parameter in parameters:
            parameter.grad = None

    dropping.partition_grads = drop
    dropping.step = dropping._pre_step
    dropping._global_grad_norm = 0.0
    for master in dropping.fp32_partitioned_groups_flat:
        master.data = torch.empty(0)

    def parts() -> None:
        with torch.no_grad():
            loss_of(forward_engine)()
            loss_of(forward_engine)()
        idle.backward(loss_of(idle)())
        idle.step()

    return step, parts


class Launches:
    """Counts calls of a kernel module.

    Attributes:
        number: of the calls so far.
    """

    def __init__(self, kernels: ModuleType) -> None:
        self.number = 0
        kernels.fused = partial(self._counted, kernels.fused)  # type: ignore[attr-defined]

    def _counted(self, function: Callable[..., object], *args: Any, **kwargs: Any) -> object:
        self.number += 1
        return function(*args, **kwargs)


def set_up(sharding: str, layers: int) -> tuple[Run, Run]:
    """Make this process a rank, alone; return a step of a back end, and its parts."""
    import torch

    torch.set_num_threads(1)
    if sharding == "zero3":
        from deepspeed.accelerator import get_accelerator

        from addax_ds.distributed.startup import init_deepspeed

        init_deepspeed()
        # DeepSpeed asks a CPU for its number at each reduction, by a process that it starts.
        type(get_accelerator()).device_count = lambda self: 1
        return with_deepspeed(layers)
    if sharding == "fsdp2":
        torch.distributed.init_process_group("gloo")
    return attached(layers, sharding)


def serve(sharding: str, layers: int) -> None:
    """Take a step and its parts for each line of stdin, and say what they took."""
    reply = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what others print is not for the one who asks
    step, parts = set_up(sharding, layers)
    from addax_ds import kernels

    launches = Launches(kernels.implementation("cpu"))
    for _ in sys.stdin:
        found: dict[str, float] = {}
        before = launches.number
        for name, run in (("step", step), ("parts", parts)):
            begin = time.process_time()
            run()
            found[name] = 1e3 * (time.process_time() - begin)
        found["launches"] = launches.number - before
        print(json.dumps(found), file=reply, flush=True)
    os._exit(0)  # without the destructors of an engine


# ---- all of them in turn -------------------------------------------------------------------------


class Worker:
    """A process that measures one back end of one checkout."""

    def __init__(self, checkout: Path, sharding: str, layers: int) -> None:
        from benchmarks.common import one_thread_each
        from studies.jobs import free_port

        rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        rank |= {"MASTER_PORT": str(free_port()), "ADDAX_CHECKOUT": str(checkout)}
        path = os.pathsep.join([str(checkout), *filter(None, [os.environ.get("PYTHONPATH")])])
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--serve", sharding, "--layers", str(layers)],
            env={**one_thread_each(), **rank, "PYTHONPATH": path},
            cwd=checkout,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def round(self) -> dict[str, float]:
        """Return milliseconds of a step and of its parts, and launches."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())

    def end(self) -> None:
        """Let the process end."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)


def measure(
    checkouts: dict[str, Path], back_ends: list[str], layers: int, rounds: int
) -> list[dict[str, Any]]:
    """Return medians by back end and checkout."""
    workers = {
        (sharding, name): Worker(path, sharding, layers)
        for sharding in back_ends
        for name, path in checkouts.items()
    }
    found: dict[tuple[str, str], list[dict[str, float]]] = {key: [] for key in workers}
    for turn in range(WARM_UP_ROUNDS + rounds):
        for key in workers if turn % 2 else reversed(workers):
            sample = workers[key].round()
            if turn >= WARM_UP_ROUNDS:
                found[key].append(sample)
    for worker in workers.values():
        worker.end()
    return [
        {
            "sharding": sharding,
            "checkout": name,
            "launches": samples[0]["launches"],
            **{part: _summary([s[part] for s in samples]) for part in ("step", "parts")},
        }
        for (sharding, name), samples in found.items()
    ]


def _summary(values: list[float]) -> dict[str, Any]:
    low, median, high = statistics.quantiles(values, n=4)
    return {"median": median, "quartiles": [low, high]}


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = ["| sharding | checkout | step, ms | parts, ms | launches |", "|---|---|---|---|---|"]
    for row in rows:
        times = [
            f"{row[part]['median']:.0f} ({' to '.join(f'{q:.0f}' for q in row[part]['quartiles'])})"
            for part in ("step", "parts")
        ]
        cells = [row["sharding"], row["checkout"], *times, f"{row['launches']:.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run the benchmark; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--against", type=Path, help="another checkout, measured beside this one")
    parser.add_argument("--back_ends", nargs="+", default=list(BACK_ENDS), choices=BACK_ENDS)
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, help="folder for host.json")
    parser.add_argument("--serve", choices=BACK_ENDS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve, args.layers)
        return
    from benchmarks.common import collect_provenance

    checkouts = {"this": ROOT}
    if args.against:
        checkouts["other"] = args.against.resolve()
    rows = measure(checkouts, args.back_ends, args.layers, args.rounds)
    print(table(rows))
    if args.output:
        document = {
            "layers": args.layers,
            "hidden_size": HIDDEN,
            "rounds": args.rounds,
            "milliseconds": "CPU time of the rank's process",
            "rows": rows,
            "environment": collect_provenance(),
        }
        path = args.output / "host.json"
        args.output.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
