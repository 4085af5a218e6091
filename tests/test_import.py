"""Importing the package: light, lazy, and registered with DeepSpeed in either order.

Every case is a fresh interpreter, as a module that is imported stays so.
"""

import subprocess
import sys
import textwrap

import pytest

import addax_ds
from tests.support.ranks import free_port
from tests.support.tiny import rows, write_model, write_rows

pytestmark = pytest.mark.slow

HEAVY = ("accelerate", "datasets", "deepspeed", "huggingface_hub", "transformers")
ONE_STEP = """
import torch, addax_ds
model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 1))
{shard}
before = [getattr(p, "full_tensor", p.detach)().clone() for p in model.parameters()]
optimizer = addax_ds.Addax(model.parameters(), lr=0.1, alpha=0.5)
addax_ds.attach(optimizer, model)
loss = lambda: model(torch.ones(2, 4)).square().mean()
optimizer.measure(loss, None)
loss().backward()
optimizer.step()
assert optimizer.report.g0 != 0.0
after = [getattr(p, "full_tensor", p.detach)() for p in model.parameters()]
assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))
"""
FSDP2 = """
import os, torch.distributed as dist
from addax_ds.sharding.fsdp2 import shard_model
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
from torch.distributed.device_mesh import init_device_mesh
shard_model(model, mesh=init_device_mesh("cpu", (1,)))
"""
FLAGS = {
    "method": "addax-wa",
    "learning_rate": 1e-3,
    "per_device_train_batch_size": 2,
    "max_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
}
DEEPSPEED_KNOWS = """
import torch
from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS
assert torch.optim.Addax is addax_ds.Addax
assert ZERO_SUPPORTED_OPTIMIZERS.count(addax_ds.Addax) == 1
assert not any(type(finder).__name__ == "_AfterImport" for finder in sys.meta_path)
"""


def run(code: str, without: tuple[str, ...] = (), errors: bool = False) -> str:
    """Run code in a new interpreter, some packages as if not installed; return what it wrote.

    ``errors`` asks for what went to standard error.
    """
    missing = "\n".join(f"sys.modules[{name!r}] = None" for name in without)
    code = f"import sys\n{missing}\n{textwrap.dedent(code)}"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stderr if errors else done.stdout


def test_the_optimizer_needs_torch_alone():
    code = f"""
    import addax_ds
    assert "torch" not in sys.modules
    addax_ds.Addax, addax_ds.attach, addax_ds.gaussian, addax_ds.NonFiniteError
    assert "torch" in sys.modules
    assert not set({HEAVY}) & sys.modules.keys()
    """
    run(code)


@pytest.mark.parametrize("shard", ["", FSDP2], ids=["unsharded", "fsdp2"])
def test_it_trains_without_what_the_extras_install(shard):
    extras = ("matplotlib", "numpy", "pydantic", "safetensors", "yaml")
    run(ONE_STEP.format(shard=shard), without=(*HEAVY, *extras))


def test_the_planner_needs_no_engine_and_not_the_rest_of_the_package():
    code = """
    import addax_ds.planner.memory, addax_ds.planner.report
    assert "deepspeed" not in sys.modules
    loaded = {name for name in sys.modules if name.startswith("addax_ds.")}
    assert not {n for n in loaded if n.startswith(("addax_ds.training", "addax_ds.cli"))}
    assert not loaded & {"addax_ds.sharding.zero3", "addax_ds.sharding.fsdp2"}
    """
    run(code)


def test_a_plan_without_a_json_is_made_without_deepspeed():
    code = """
    from addax_ds.cli.plan import main
    main(["--model", "facebook/opt-125m", "--sharding", "fsdp2", "--length", "64",
          "--methods", "mezo", "--json"])
    """
    assert '"sharding": "fsdp2"' in run(code, without=("deepspeed",))


@pytest.mark.parametrize(
    "order",
    [
        "import addax_ds, deepspeed",
        "import deepspeed, addax_ds",
        # A look-up, as Transformers makes it, is not an import.
        "import addax_ds, importlib.util; importlib.util.find_spec('deepspeed'); import deepspeed",
        "import addax_ds; from deepspeed.runtime import engine",
        # Both imports of the package wait for DeepSpeed.
        "import addax_ds, importlib; importlib.reload(addax_ds); import deepspeed",
    ],
)
def test_deepspeed_knows_the_optimizer(order):
    run(f"{order}\n{DEEPSPEED_KNOWS}")


def test_deepspeed_alone_is_as_it_was():
    run("import deepspeed, torch\nassert not hasattr(torch.optim, 'Addax')")


def test_a_failing_import_of_deepspeed_stays_what_it_was(tmp_path):
    package = tmp_path / "deepspeed"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('no driver')")
    code = f"""
    sys.path.insert(0, {str(tmp_path)!r})
    import addax_ds
    for _ in range(2):
        try:
            import deepspeed
        except RuntimeError as error:
            assert str(error) == "no driver"
        else:
            raise AssertionError
    """
    run(code)


def test_another_deepspeed_can_be_imported(tmp_path):
    package = tmp_path / "deepspeed"
    package.mkdir()
    (package / "__init__.py").write_text("")
    code = f"""
    sys.path.insert(0, {str(tmp_path)!r})
    import addax_ds, deepspeed, torch
    assert not hasattr(torch.optim, "Addax")
    """
    said = run(code, errors=True)
    assert "Addax cannot train under DeepSpeed" in said
    assert "No module named 'deepspeed.runtime'" in said
    assert "install deepspeed>=0.19.8,<0.20" in said


@pytest.mark.parametrize(
    ("name", "package", "extra"),
    [
        ("AddaxTrainer", "transformers", "train"),
        ("save_weights", "safetensors", "train"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(name, package, extra):
    code = f"""
    try:
        from addax_ds import {name}
    except ImportError as error:
        print(error)
    """
    said = run(code, without=(package,))
    assert said == f"{package} is not installed: pip install 'addax_ds[{extra}]'\n"


@pytest.mark.parametrize("program", ["train", "plan"])
def test_a_program_without_its_extra_says_so(program):
    code = f"""
    try:
        from addax_ds.cli.{program} import main  # as the installed script does
    except SystemExit as end:
        assert end.code == 1
    """
    said = run(code, without=("transformers",), errors=True)
    expected = "addax_ds: error: transformers is not installed: pip install 'addax_ds[train]'"
    assert said.strip() == expected


def test_a_json_needs_deepspeed():
    code = """
    import addax_ds
    try:
        addax_ds.ds_config({"zero_optimization": {"stage": 3}}, lr=1.0, micro_batch_size=1)
    except addax_ds.UserError as error:
        print(error)
    """
    said = run(code, without=("deepspeed",))
    assert said == "deepspeed is not installed: pip install 'addax_ds[deepspeed]'\n"


def test_every_public_name_is_there_and_listed():
    assert set(addax_ds.__all__) == set(addax_ds._MODULES) <= set(dir(addax_ds))
    for name in addax_ds.__all__:
        assert getattr(addax_ds, name).__module__.startswith("addax_ds.")
    with pytest.raises(AttributeError, match="no attribute 'Adax'"):
        addax_ds.Adax  # noqa: B018


@pytest.mark.parametrize("sharding", ["none", "fsdp2"])
def test_the_command_trains_without_deepspeed_and_matplotlib(sharding, tmp_path):
    model = write_model(tmp_path / "model")
    data = write_rows(tmp_path / "train.jsonl", rows(4, 4))
    flags = [f"--{name}={value}" for name, value in FLAGS.items()]
    files = [f"--model_name_or_path={model}", f"--train_file={data}", f"--output_dir={tmp_path}"]
    code = f"""
    import os
    if {sharding!r} == "fsdp2":  # as torchrun starts a rank
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1",
                          MASTER_ADDR="127.0.0.1", MASTER_PORT="{free_port()}")
    from addax_ds.cli.train import main
    main([*{[*flags, *files]}, "--sharding={sharding}"])
    """
    said = run(code, without=("deepspeed", "matplotlib"), errors=True)
    assert "Curves:  not drawn, matplotlib is not installed: pip install 'addax_ds[plots]'" in said
    assert (tmp_path / "model" / "model.safetensors").is_file()
    assert not (tmp_path / "training.png").exists()
