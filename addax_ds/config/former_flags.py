"""Flags of other programs, and of former versions of Transformers, and what to give instead."""

FORMER_FLAGS: dict[str, str] = {
    # Transformers, as it was.
    "warmup_ratio": "--warmup_steps takes a share of the steps, too: a number below 1.",
    "evaluation_strategy": "It is --eval_strategy.",
    "group_by_length": "Addax divides rows by length itself (--length_threshold); remove it.",
    "no_cuda": "It is --use_cpu.",
    "per_gpu_train_batch_size": "It is --per_device_train_batch_size.",
    "per_gpu_eval_batch_size": "It is --per_device_eval_batch_size.",
    "overwrite_output_dir": "No run overwrites another one's checkpoints: name another "
    "--output_dir, or go on with --resume_from_checkpoint True.",
    "save_safetensors": "Weights are always saved as safetensors; remove it.",
    "logging_dir": "The environment variable TENSORBOARD_LOGGING_DIR says it.",
    "push_to_hub_model_id": "It is --hub_model_id.",
    "push_to_hub_token": "It is --hub_token.",
    # TRL and the scripts of Transformers.
    "packing": "Rows are not packed: each is a sequence of its own; remove it.",
    "max_seq_length": "It is --max_length.",
    "block_size": "It is --max_length; rows are not cut into blocks.",
    "torch_dtype": "Weights are trained in fp32, or with --bf16 or --fp16 in these.",
    "dtype": "Weights are trained in fp32, or with --bf16 or --fp16 in these.",
    "load_in_4bit": "Quantised weights cannot be perturbed, not even under adapters; remove it.",
    "load_in_8bit": "Quantised weights cannot be perturbed, not even under adapters; remove it.",
    "use_peft": "--lora_r is enough.",
    "lora_dropout": "Adapters have none here; with AddaxTrainer, PEFT's own arguments hold.",
    "gguf_file": "--model_name_or_path takes the path of the .gguf file.",
    # MeZO.
    "trainer": "It is --method.",
    "task_name": "It is --task.",
    "num_eval": "It is --num_test.",
    "model_name": "It is --model_name_or_path.",
}
"""By names that no argument has."""
