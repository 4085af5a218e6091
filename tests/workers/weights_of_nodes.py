"""Saves weights on two nodes, one with two ranks and one with one."""

import sys
from pathlib import Path

import torch.distributed as dist

from addax_ds.checkpoint.weights import save_weights
from addax_ds.sharding.fsdp2 import shard_model
from tests.support.models import tiny_opt
from tests.workers.teardown import shut_down

NODES = ((0, 1), (2,))


def main() -> None:
    dist.init_process_group("gloo")
    model = tiny_opt()
    shard_model(model)
    (number,) = (number for number, ranks in enumerate(NODES) if dist.get_rank() in ranks)
    folder = Path(sys.argv[1]) / f"node-{number}"
    save_weights(model, folder, NODES[number], max_file_size="100KB")
    shut_down()


if __name__ == "__main__":
    main()
