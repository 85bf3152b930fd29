"""Tiny models of other architectures, made by mlx-lm's own classes from random weights and saved as directories."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_impl.arrays import flatten
from mlx_impl.tokenizer import Tokenizer

LLAMA_LIKE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 128,
    "rope_theta": 20000.0,
}
SLIDING = {"sliding_window": 16, "sliding_window_pattern": 2, "query_pre_attn_scalar": 8.0}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
}

CONFIGS: dict[str, dict[str, Any]] = {
    "qwen2": {**LLAMA_LIKE, "tie_word_embeddings": True},
    "qwen3": {**LLAMA_LIKE, "tie_word_embeddings": False},
    "qwen3_moe": {**LLAMA_LIKE, **EXPERTS, "tie_word_embeddings": True},
    "gemma": LLAMA_LIKE,
    "gemma2": {**LLAMA_LIKE, "query_pre_attn_scalar": 8.0},
    "gemma3_text": {**LLAMA_LIKE, **SLIDING},
    "phi3": LLAMA_LIKE,
    "mistral": LLAMA_LIKE,
    "olmo2": {**LLAMA_LIKE, "tie_word_embeddings": False},
    "cohere": {**LLAMA_LIKE, "layer_norm_eps": 1e-5},
    "starcoder2": {**LLAMA_LIKE, "norm_epsilon": 1e-5, "tie_word_embeddings": True},
    "gpt2": {"n_ctx": 128, "n_positions": 128, "n_embd": 32, "n_head": 4, "n_layer": 2, "layer_norm_epsilon": 1e-5},
    "mamba": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "state_size": 8,
        "num_hidden_layers": 2,
        "conv_kernel": 4,
        "use_bias": False,
        "use_conv_bias": True,
        "time_step_rank": 4,
    },
}


def write_foreign(folder: Path, kind: str, tokenizer: Tokenizer, **changes: Any) -> Path:
    """A model directory; `changes` go into config.json."""
    from mlx_lm import utils

    config = {"model_type": kind, "vocab_size": tokenizer.vocab_size, **CONFIGS[kind], **changes}
    model_class, arguments = utils._get_classes(config)
    mx.random.seed(0)
    network = model_class(arguments.from_dict(config))
    with contextlib.redirect_stdout(io.StringIO()):
        utils.save_model(folder, network)
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer.save(folder)
    return folder


def base_arrays(model: Any) -> dict[str, mx.array]:
    """The weights of a model by name, as if no adapter were on it."""
    arrays = flatten(model.parameters()).items()
    return {name.replace(".linear.", "."): a for name, a in arrays if not name.endswith((".lora_a", ".lora_b"))}
