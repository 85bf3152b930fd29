"""One table of parameter names: a row is one module, a column one format; every inverse is derived from it.

`{n}` stands for a layer number. A name that is None in one column is dropped on the way there, on purpose.
Keys outside the table are an error that lists all of them. A further format is a further column.
"""

import re
from collections.abc import Iterable
from typing import Literal, NamedTuple

from mlx_impl.errors import DamagedFileError, listed

Format = Literal["hf", "gguf", "original"]


class Row(NamedTuple):
    """The names of one module; its parameters add `.weight` or `.bias`, the same in all formats.

    `original` is the PyTorch project that this one continues.
    """

    hf: str | None
    gguf: str | None
    original: str | None = None


TABLE = (
    Row("model.embed_tokens", "token_embd", "token_embedding"),
    Row("model.norm", "output_norm", "norm"),
    Row("lm_head", "output", "lm_head"),
    Row("model.layers.{n}.input_layernorm", "blk.{n}.attn_norm", "layers.{n}.attention_norm"),
    Row("model.layers.{n}.self_attn.q_proj", "blk.{n}.attn_q", "layers.{n}.attention.q_proj"),
    Row("model.layers.{n}.self_attn.k_proj", "blk.{n}.attn_k", "layers.{n}.attention.k_proj"),
    Row("model.layers.{n}.self_attn.v_proj", "blk.{n}.attn_v", "layers.{n}.attention.v_proj"),
    Row("model.layers.{n}.self_attn.o_proj", "blk.{n}.attn_output", "layers.{n}.attention.o_proj"),
    Row("model.layers.{n}.post_attention_layernorm", "blk.{n}.ffn_norm", "layers.{n}.ffn_norm"),
    Row("model.layers.{n}.mlp.gate_proj", "blk.{n}.ffn_gate", "layers.{n}.feed_forward.w1"),
    Row("model.layers.{n}.mlp.up_proj", "blk.{n}.ffn_up", "layers.{n}.feed_forward.w3"),
    Row("model.layers.{n}.mlp.down_proj", "blk.{n}.ffn_down", "layers.{n}.feed_forward.w2"),
    # Buffers of old checkpoints, computed from the configuration instead.
    Row("model.layers.{n}.self_attn.rotary_emb.inv_freq", None),
    Row("model.rotary_emb.inv_freq", None),
    # Scaling of the rotary frequencies: becomes `rope_scaling` in config.json.
    Row(None, "rope_freqs"),
)

_LAYER = re.compile(r"(?<=\.)(0|[1-9][0-9]*)(?=\.)")
_PARAMETER = re.compile(r"\.(?:weight|bias)$")


def is_dropped(key: str, source: Format) -> bool:
    """Whether the table drops `key` on purpose, on the way to any other format."""
    row = _rows(source).get(_split(key)[0])
    return row is not None and [name for name in row if name is not None] == [getattr(row, source)]


def rename(keys: Iterable[str], source: Format, target: Format, where: str) -> dict[str, str | None]:
    """Map each key of `source` to its name in `target`, None where it is dropped on purpose.

    Raises DamagedFileError naming the keys that the table does not know; `where` is the file they came from.
    """
    rows = _rows(source)
    renamed: dict[str, str | None] = {}
    unknown = []
    for key in keys:
        module, layer, parameter = _split(key)
        if module not in rows:
            unknown.append(key)
            continue
        name = getattr(rows[module], target)
        renamed[key] = None if name is None else name.replace("{n}", layer) + parameter
    if unknown:
        raise DamagedFileError(f"{where}: unknown tensors for a Llama model: {listed(unknown)}")
    return renamed


def _rows(source: Format) -> dict[str, Row]:
    return {getattr(row, source): row for row in TABLE if getattr(row, source) is not None}


def _split(key: str) -> tuple[str, str, str]:
    """`blk.7.attn_q.bias` -> (`blk.{n}.attn_q`, `7`, `.bias`)."""
    parameter = _PARAMETER.search(key)
    module = key[: parameter.start()] if parameter else key
    layer = _LAYER.search(module)
    return _LAYER.sub("{n}", module, count=1), layer[0] if layer else "", parameter[0] if parameter else ""
