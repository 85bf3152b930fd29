"""Tiny Llama models for tests: the same weights as arrays, as a GGUF file and as a HF folder.

The GGUF is written the way llama.cpp's converter does it, q and k rows permuted one by one, by a loop that
shares nothing with the code under test.
"""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import tokenizers
from safetensors.numpy import save_file

LAYERS, WIDTH, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, CONTEXT = 2, 64, 96, 4, 2, 16, 128
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["1 2", "12 3", "Ġ t", "h e", "Ġt he"]
HF_CONFIG = {
    "model_type": "llama",
    "hidden_size": WIDTH,
    "intermediate_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "max_position_embeddings": CONTEXT,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
    "tie_word_embeddings": True,
}


def byte_characters() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes, sorted by byte (its bytes_to_unicode)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(256 + others.index(byte)) for byte in range(256)]


def vocabulary() -> list[str]:
    """Special tokens, the 256 bytes, and what MERGES make of them."""
    return [*SPECIAL, *byte_characters(), *(merge.replace(" ", "") for merge in MERGES)]


def tokenizer_json() -> str:
    """The same vocabulary and merges as Hugging Face's library writes them."""
    vocab = {token: number for number, token in enumerate(vocabulary())}
    merges = [(left, right) for left, right in (merge.split(" ") for merge in MERGES)]
    library = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges))
    library.add_special_tokens(SPECIAL)
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    return str(library.to_str())


def sentencepiece_model(**options: Any) -> bytes:
    """A tokenizer.model of 420 pieces as Llama's was trained, on CPython's own words; `options` are the trainer's."""
    import io
    from pydoc_data import topics

    import sentencepiece

    llama = {"model_type": "bpe", "byte_fallback": True, "split_digits": True, "allow_whitespace_only_pieces": True}
    plain = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "minloglevel": 2}
    lines = [line for name in ("lambda", "class", "numbers", "yield") for line in topics.topics[name].splitlines()]
    content = io.BytesIO()
    settings = {"vocab_size": 420, "num_threads": 1, **llama, **plain, **options}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=content, **settings)
    return content.getvalue()


def weights(seed: int = 0, vocab: int | None = None) -> dict[str, np.ndarray]:
    """Float32 weights under HF names, tied."""
    rng = np.random.default_rng(seed)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab or len(vocabulary()), WIDTH)}
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        shapes |= {
            f"{at}.input_layernorm.weight": (WIDTH,),
            f"{at}.self_attn.q_proj.weight": (HEADS * HEAD_DIM, WIDTH),
            f"{at}.self_attn.k_proj.weight": (KV_HEADS * HEAD_DIM, WIDTH),
            f"{at}.self_attn.v_proj.weight": (KV_HEADS * HEAD_DIM, WIDTH),
            f"{at}.self_attn.o_proj.weight": (WIDTH, HEADS * HEAD_DIM),
            f"{at}.post_attention_layernorm.weight": (WIDTH,),
            f"{at}.mlp.gate_proj.weight": (HIDDEN, WIDTH),
            f"{at}.mlp.up_proj.weight": (HIDDEN, WIDTH),
            f"{at}.mlp.down_proj.weight": (WIDTH, HIDDEN),
        }
    shapes["model.norm.weight"] = (WIDTH,)
    return {name: rng.standard_normal(shape, dtype=np.float32) / 8 for name, shape in shapes.items()}


def permuted(array: np.ndarray, heads: int) -> np.ndarray:
    """Row i of a head's first half goes to row 2i of the head, of its second half to row 2i + 1."""
    out, width = np.empty_like(array), array.shape[0] // heads
    for head in range(heads):
        for i in range(width // 2):
            out[head * width + 2 * i] = array[head * width + i]
            out[head * width + 2 * i + 1] = array[head * width + width // 2 + i]
    return out


def gguf_name(name: str) -> str:
    """A HF name as llama.cpp spells it."""
    for hf, short in (
        ("model.layers.", "blk."),
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
        ("lm_head", "output"),
        ("self_attn.o_proj", "attn_output"),
        ("post_attention_layernorm", "ffn_norm"),
        ("input_layernorm", "attn_norm"),
        ("self_attn.", "attn_"),
        ("mlp.", "ffn_"),
        ("_proj", ""),
    ):
        name = name.replace(hf, short)
    return name


def write_gguf(
    path: Path,
    arrays: dict[str, np.ndarray] | None = None,
    kind: str = "F32",
    extra: dict[str, np.ndarray] | None = None,
    **changes: Any,
) -> Path:
    """A GGUF file; matrices are stored as `kind`, vectors as F32.

    `extra` are tensors by GGUF name, `changes` metadata by key with `__` for a dot (None leaves a key out).
    """
    writer = gguf.GGUFWriter(path, "llama")
    metadata: dict[str, Any] = {
        "llama__block_count": LAYERS,
        "llama__context_length": CONTEXT,
        "llama__embedding_length": WIDTH,
        "llama__feed_forward_length": HIDDEN,
        "llama__attention__head_count": HEADS,
        "llama__attention__head_count_kv": KV_HEADS,
        "llama__attention__layer_norm_rms_epsilon": 1e-5,
        "llama__rope__freq_base": 100000.0,
        "llama__rope__dimension_count": HEAD_DIM,
        "tokenizer__ggml__model": "gpt2",
        "tokenizer__ggml__pre": "smollm",
        "tokenizer__ggml__tokens": vocabulary(),
        "tokenizer__ggml__token_type": [3] * len(SPECIAL) + [1] * (256 + len(MERGES)),
        "tokenizer__ggml__merges": MERGES,
        "tokenizer__ggml__bos_token_id": 1,
        "tokenizer__ggml__eos_token_id": 2,
        "tokenizer__ggml__unknown_token_id": 0,
        "tokenizer__ggml__padding_token_id": 2,
        "tokenizer__chat_template": "{{ messages }}",
    } | changes
    for key, value in metadata.items():
        _add(writer, key.replace("__", "."), value)
    for name, array in (arrays or weights()).items():
        if ".q_proj." in name or ".k_proj." in name:
            array = permuted(array, HEADS if ".q_proj." in name else KV_HEADS)
        stored = gguf.GGMLQuantizationType[kind if array.ndim == 2 else "F32"]
        writer.add_tensor(gguf_name(name), gguf.quantize(array, stored), raw_dtype=stored)
    for name, array in (extra or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    add = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    if value is not None:
        add[type(value)](key, value)


def write_hf(folder: Path, arrays: dict[str, np.ndarray] | None = None, shards: int = 1, **changes: Any) -> Path:
    """A HF Llama folder, sharded by an index if `shards` > 1; `changes` go into config.json."""
    arrays = arrays or weights()
    folder.mkdir(parents=True)
    vocab = arrays["model.embed_tokens.weight"].shape[0]
    (folder / "config.json").write_text(json.dumps(HF_CONFIG | {"vocab_size": vocab} | changes))
    (folder / "tokenizer.json").write_text(tokenizer_json())
    names = list(arrays)
    if shards == 1:
        save_file(arrays, folder / "model.safetensors", {"format": "pt"})
        return folder
    files = {name: f"model-{1 + i * shards // len(names):05d}.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        save_file({n: arrays[n] for n in names if files[n] == file}, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return folder
