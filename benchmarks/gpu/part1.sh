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
LINES_SHOWN=14 part 90 kernels python3 benchmarks/gpu/kernel_speed.py --output "$OUT/kernels.json"
# What is not timed runs together, and on other cores what the host takes for a step.
tests=(python3 -m pytest -q -p no:cacheprovider)
LINES_SHOWN=12 part 180 bits "${tests[@]}" -n 6 tests/gpu/test_kernels_gpu.py >"$OUT/bits" &
LINES_SHOWN=30 part 150 ranks "${tests[@]}" tests/gpu/test_ranks_gpu.py >"$OUT/ranks" &
CUDA_VISIBLE_DEVICES='' DS_ACCELERATOR=cpu LINES_SHOWN=6 part 100 host python3 benchmarks/host.py \
  --rounds 5 --output "$OUT" >"$OUT/host" &
wait
cat "$OUT"/{bits,ranks,host}
LINES_SHOWN=12 part 120 opt-1.3b deepspeed --num_gpus 1 benchmarks/step.py --shape opt-1.3b \
  --long_rows 8 --short_rows 4 --rounds 7 --no_memory --output "$OUT"
steps 60 opt-1.3b fsdp2 --batches 8x1024,4x256
keep part1
