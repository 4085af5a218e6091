"""Tiny configurations of model families whose files differ from one another in kind."""

from transformers import (
    BloomConfig,
    DeepseekV3Config,
    FalconConfig,
    Gemma3Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoXConfig,
    JambaConfig,
    LlamaConfig,
    Mamba2Config,
    MistralConfig,
    MixtralConfig,
    OlmoeConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

HEADS = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = {**HEADS, "intermediate_size": 48, "num_key_value_heads": 2}
EXPERTS = {**GROUPED, "moe_intermediate_size": 16, "num_experts": 4}
HEADS_OF_8 = {"head_dim": 8, **GROUPED}

FAMILIES: dict[str, PreTrainedConfig] = {
    "bloom": BloomConfig(**HEADS),
    "falcon": FalconConfig(**HEADS),
    "gpt2": GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4),
    "gptj": GPTJConfig(vocab_size=64, n_embd=32, n_layer=2, n_head=4, rotary_dim=8),
    "llama": LlamaConfig(**GROUPED),
    "llama, tied": LlamaConfig(**GROUPED, tie_word_embeddings=True),
    "mamba2": Mamba2Config(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_heads=8, head_dim=8, n_groups=1
    ),
    "mistral": MistralConfig(**GROUPED),
    "opt": OPTConfig(**HEADS, ffn_dim=48, word_embed_proj_dim=32),
    "phi3": Phi3Config(**GROUPED, pad_token_id=0),
    "qwen3": Qwen3Config(**HEADS_OF_8),
    "gemma3, text": Gemma3TextConfig(**HEADS_OF_8),
    # Names in the files that are not the model's.
    "gpt_neox": GPTNeoXConfig(**HEADS, intermediate_size=48),
    "gemma3": Gemma3Config(
        text_config=HEADS_OF_8,
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "image_size": 16,
            "patch_size": 8,
        },
        mm_tokens_per_image=1,
    ),
    # Experts that are one tensor in the model; more than ten, whose names sort otherwise as text.
    "mixtral": MixtralConfig(**GROUPED, num_local_experts=12),
    "qwen2_moe": Qwen2MoeConfig(**EXPERTS, shared_expert_intermediate_size=16),
    "qwen3_moe": Qwen3MoeConfig(**EXPERTS, head_dim=8),
    "olmoe": OlmoeConfig(**GROUPED, num_experts=4, num_experts_per_tok=2),
    "deepseek_v3": DeepseekV3Config(
        **GROUPED,
        moe_intermediate_size=16,
        n_routed_experts=4,
        n_group=2,
        topk_group=1,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
    ),
    "jamba": JambaConfig(
        **GROUPED,
        num_experts=4,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        use_mamba_kernels=False,
        mamba_d_state=4,
        mamba_dt_rank=4,
    ),
}
