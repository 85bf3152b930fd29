"""Byte-level BPE tokenizers out of GGUF metadata, as `tokenizer.json` and `tokenizer_config.json`.

GGUF keeps tokens and merges, but of the pre-tokeniser only a name (`tokenizer.ggml.pre`) that llama.cpp
knows; a name that is not in the table below is refused, because a wrong split gives plausible, wrong ids.
Where there is a chat template, whose markers other programs must recognise in rendered text, special tokens stay
special for them; where there is none, they are plain text (`split_special_tokens`). Our own class needs neither.
"""

import json
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from mlx_impl.errors import DamagedFileError, InputError

_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4  # of tokenizer.ggml.token_type

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class _Pre(NamedTuple):
    """A pre-tokeniser by llama.cpp's name; no pattern means GPT-2's, which the library has built in."""

    digits: bool = False  # each digit by itself, before anything else
    pattern: str | None = None
    nfc: bool = False
    ignore_merges: bool = False  # a word that is a token is taken whole
    add_bos: bool = False  # where the file does not say


_PRE = {
    "gpt-2": _Pre(),
    "smollm": _Pre(digits=True),
    "starcoder": _Pre(digits=True),
    "llama-bpe": _Pre(pattern=_WORDS % "{1,3}", ignore_merges=True, add_bos=True),
    "qwen2": _Pre(pattern=_WORDS % "", nfc=True),
}


def tokenizer_files(metadata: dict[str, Any], context_length: int, where: str) -> dict[str, str]:
    """File name -> content of `tokenizer.json` and `tokenizer_config.json` for a GGUF file's metadata.

    Raises InputError for a kind of tokenizer or a pre-tokeniser that is not supported, DamagedFileError for
    pieces that do not fit together.
    """
    pre = _pre_tokenizer(metadata, where)
    tokens, merges = _strings(metadata, "tokens", where), _strings(metadata, "merges", where)
    types = metadata.get("tokenizer.ggml.token_type")
    if not isinstance(types, np.ndarray) or len(types) != len(tokens):
        count = len(types) if isinstance(types, np.ndarray) else "no"
        raise DamagedFileError(f"{where}: {len(tokens):,} tokens, but {count} token types")
    special = {
        name: _token(metadata, key, tokens, where)
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
    }
    tokenizer = _build(pre, tokens, merges, where)
    tokenizer.add_tokens(_added(tokens, types))
    if special["bos"] is not None and metadata.get("tokenizer.ggml.add_bos_token", pre.add_bos):
        bos = (special["bos"], metadata["tokenizer.ggml.bos_token_id"])
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos[0]} $A", pair=f"{bos[0]} $A {bos[0]} $B", special_tokens=[bos]
        )
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": context_length,
        **{f"{name}_token": token for name, token in special.items()},
    }
    if isinstance(template := metadata.get("tokenizer.chat_template"), str):
        config["chat_template"] = template
    else:
        config["split_special_tokens"] = True
    return {
        "tokenizer.json": tokenizer.to_str(pretty=True),
        "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False) + "\n",
    }


def _pre_tokenizer(metadata: dict[str, Any], where: str) -> _Pre:
    model, name = (metadata.get(f"tokenizer.ggml.{key}") for key in ("model", "pre"))
    if model != "gpt2":
        known = "a SentencePiece tokenizer" if model == "llama" else f"a tokenizer of kind {model!r:.60}"
        raise InputError(f"{where}: {known}, only byte-level BPE ('gpt2') is read; use the model's HF directory")
    if not isinstance(name, str) or name not in _PRE:
        raise InputError(f"{where}: pre-tokeniser {name!r:.60} is not known; known are {', '.join(_PRE)}")
    return _PRE[name]


def _strings(metadata: dict[str, Any], name: str, where: str) -> list[str]:
    value = metadata.get(f"tokenizer.ggml.{name}")
    if not isinstance(value, list):
        raise DamagedFileError(f"{where}: tokenizer.ggml.{name} is no list of strings")
    return value


def _token(metadata: dict[str, Any], name: str, tokens: list[str], where: str) -> str | None:
    """The token whose id the metadata gives under `name`, if it gives one."""
    key = f"tokenizer.ggml.{name}_token_id"
    index = metadata.get(key)
    if index is None:
        return None
    if type(index) is not int or not 0 <= index < len(tokens):
        raise DamagedFileError(f"{where}: {key} is {index!r:.60}, the vocabulary has {len(tokens):,} tokens")
    return tokens[index]


def _build(pre: _Pre, tokens: list[str], merges: list[str], where: str) -> tokenizers.Tokenizer:
    """The tokenizer without its added tokens."""
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise DamagedFileError(f"{where}: {len(tokens) - len(vocabulary):,} tokens appear twice in the vocabulary")
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    wrong = [f"{a} {b}" for a, b in pairs if not (a and b and {a, b, a + b} <= vocabulary.keys())]
    if wrong:
        raise DamagedFileError(f"{where}: {len(wrong):,} merges name no tokens, the first is {wrong[0]!r:.60}")
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, pairs, ignore_merges=pre.ignore_merges))
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if pre.digits else []
    if pre.pattern is not None:
        steps.append(pre_tokenizers.Split(Regex(pre.pattern), "isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre.pattern is None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    if pre.nfc:
        tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def _added(tokens: list[str], types: np.ndarray) -> list[AddedToken]:
    """Control tokens, special; and the user's own, found in text as they are."""
    return [
        AddedToken(token, normalized=False, special=kind != _USER_DEFINED)
        for token, kind in zip(tokens, types.tolist(), strict=True)
        if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED) and token
    ]
