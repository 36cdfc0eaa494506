"""A tiny random model of every architecture that can be pruned: three blocks, hidden size 32, four heads."""

from __future__ import annotations

from espalier.models.anatomy import LAYOUTS

VOCABULARY = 97
# Two key/value heads; a head size that is not hidden / heads where the architecture lets one choose it.
GROUPED = ("llama", "mistral", "qwen2", "qwen3", "glm", "glm4")
WIDE_HEADS = ("mistral", "qwen3", "glm", "glm4")
WIDTHS = tuple(name for name, layout in LAYOUTS.items() if layout)


def tiny(family: str, **options):
    """Return a model in evaluation mode, float32, whose weights are large enough for its blocks to matter."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    sizes |= {"max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    sizes |= {"ffn_dim": 48, "word_embed_proj_dim": 32} if family == "opt" else {"intermediate_size": 48}
    sizes |= {"num_key_value_heads": 2} if family in GROUPED else {}
    sizes |= {"head_dim": 16} if family in WIDE_HEADS else {}
    sizes |= {"init_std": 0.2} if family == "opt" else {"initializer_range": 0.2}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes | options)).eval()
