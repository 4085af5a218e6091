#!/usr/bin/env bash
# Bits, races and speed of the kernels, and steps of OPT-1.3B; about five minutes.
. .gpukit/setup.sh
nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader
nproc
free -g | sed -n 2p
LINES_SHOWN=3 part 60 versions python3 -c "
import torch, triton, transformers, deepspeed, accelerate, datasets, addax_ds
from addax_ds.utils.versions import versions
print(versions(), triton.__version__, torch.cuda.get_device_name(), torch.cuda.nccl.version())"
part 60 kernels python3 benchmarks/gpu/kernels.py --output "$OUT/kernels.json"
part 120 bits python3 -m pytest -q -p no:cacheprovider -n 8 tests/gpu/test_kernels_gpu.py
part 90 ranks python3 -m pytest -q -p no:cacheprovider tests/gpu/test_ranks_gpu.py
for sharding in zero3 fsdp2; do
  point 45 "opt-1.3b_$sharding" --models opt-1.3b --lengths 512 --methods addax --sharding $sharding
done
keep part1
