"""Tiny random models and batches, the same on every rank and in every process."""

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, OPTConfig

VOCABULARY = 1003


def tiny_opt(
    *,
    tied: bool = True,
    frozen: bool = False,
    unused: bool = False,
    shared: bool = False,
    dropout: float = 0.0,
    vocabulary: int = VOCABULARY,
    dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """OPT with 3 layers; its odd vocabulary makes the embedding's partitions uneven.

    With GELU in place of ReLU, which two devices or numbers of ranks may see on two sides of its
    kink: of twelve float64 loops with weights that differed by 1e-7, three ended 2 % of the way
    apart.
    """
    config = OPTConfig(
        hidden_size=128,
        num_hidden_layers=3,
        ffn_dim=256,
        num_attention_heads=4,
        vocab_size=vocabulary,
        max_position_embeddings=66,
        word_embed_proj_dim=128,
        dropout=dropout,
        activation_function="gelu",
        tie_word_embeddings=tied,
    )
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(config)
    if frozen:
        # The first and a middle parameter: a frozen one may lead a coalesced gather.
        model.model.decoder.embed_positions.weight.requires_grad_(False)
        model.model.decoder.layers[1].fc1.weight.requires_grad_(False)
        model.model.decoder.layers[1].self_attn.k_proj.bias.requires_grad_(False)
    if shared:  # by the first layer and the last, as Zamba2's layers share
        first, _, last = model.model.decoder.layers
        last.self_attn, last.fc1.weight = first.self_attn, first.fc1.weight
    if unused:
        model.unused = nn.Linear(17, 5)
    return model.to(dtype)


def token_batches(steps: int, rows: int = 4, length: int = 32) -> list[tuple[Tensor, Tensor]]:
    """One (zeroth-order, first-order) pair of global batches a step, without padding."""
    generator = torch.Generator().manual_seed(1)
    shape = (steps, 2, rows, length)
    tokens = torch.randint(0, VOCABULARY, shape, generator=generator)
    return [(pair[0], pair[1]) for pair in tokens]
