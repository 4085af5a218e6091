"""Looks at which shards the kernels work on under ZeRO-3, with and without offload.

Each rank writes ``offload-RANK.json`` to the folder that is given.
"""

import json
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.zero.offload_config import OffloadStateTypeEnum

import addax_ds
from addax_ds.kernels.operation import Operation, Slice
from tests.support.models import tiny_opt
from tests.workers.teardown import shut_down


def looked_at(config: str) -> dict[str, Any]:
    """Take a step and note what the kernels read and wrote, by the name of its parameter."""
    model = tiny_opt(dtype=torch.bfloat16)
    engine, optimizer, _, _ = deepspeed.initialize(
        model=model, config=addax_ds.ds_config(config, lr=0.1, micro_batch_size=2, bf16=True)
    )
    shards = {p.ds_tensor.data_ptr(): n for n, p in model.named_parameters()}
    read, written = set(), set()
    fused = addax_ds.kernels.fused

    def noted(slices: list[Slice], operation: Operation, out: Any = None, *more: Any) -> None:
        found = {shards.get(each.data.data_ptr()) for each in slices}
        read.update(found)
        if out is None:
            written.update(found)
        fused(slices, operation, out, *more)

    addax_ds.kernels.fused = noted
    tokens = torch.arange(64).view(2, 32)
    loss = optimizer.measure(*[lambda: engine(input_ids=tokens, labels=tokens).loss] * 2)
    engine.backward(loss)
    engine.step()
    addax_ds.kernels.fused = fused
    returned = None
    if not optimizer.offload_param:
        trained = [p.ds_tensor.clone() for p in model.parameters()]
        engine.offload_states(include=[OffloadStateTypeEnum.lp_params])
        engine.reload_states()
        pairs = zip(trained, model.parameters(), strict=True)
        returned = all(torch.equal(before, p.ds_tensor) for before, p in pairs)
    found = {
        "returned": returned,
        "device": str(optimizer.parameter_offload.offload_device),
        "all": sorted(shards.values()),
        "read": sorted(map(str, read)),
        "written": sorted(map(str, written)),
    }
    engine.destroy()
    return found


def main() -> None:
    torch.set_num_threads(1)
    deepspeed.init_distributed()
    found = {name: looked_at(f"ds_configs/{name}.json") for name in ("zero3", "zero3_offload")}
    Path(sys.argv[1], f"offload-{deepspeed.comm.get_rank()}.json").write_text(json.dumps(found))
    shut_down()


if __name__ == "__main__":
    main()
