"""Tokenizers between GGUF metadata and `tokenizer.json` with `tokenizer_config.json`: byte-level BPE, SentencePiece.

Of byte-level BPE GGUF keeps tokens and merges, but of the pre-tokeniser only a name (`tokenizer.ggml.pre`) that
llama.cpp knows; a name that is not in the table below is refused, because a wrong split gives plausible, wrong ids.
Where there is a chat template, whose markers other programs must recognise in rendered text, special tokens stay
special for them; where there is none, they are plain text (`split_special_tokens`). Our own class needs neither.
"""

import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from convert import spm, spm_model
from mlx_impl.config import ModelConfig
from mlx_impl.errors import DamagedFileError, InputError, printable

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6  # of tokenizer.ggml.token_type
_FILLING = re.compile(r"\[PAD[0-9]+\]")
"""What llama.cpp's converter calls the rows of the embedding that the tokenizer has no token for."""
_SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
"""Names of Hugging Face and GGUF."""

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
    sentencepiece = metadata.get("tokenizer.ggml.model") == "llama"
    pre = _Pre(add_bos=True) if sentencepiece else _pre_tokenizer(metadata, where)
    tokens = _strings(metadata, "tokens", where)
    types = metadata.get("tokenizer.ggml.token_type")
    if not isinstance(types, np.ndarray) or len(types) != len(tokens):
        count = len(types) if isinstance(types, np.ndarray) else "no"
        raise DamagedFileError(f"{where}: {len(tokens):,} tokens, but {count} token types")
    special = {name: _token(metadata, key, tokens, where) for name, key in _SPECIAL.items()}
    vocabulary = _vocabulary(tokens, types, where)
    if sentencepiece:
        tokenizer = _from_sentencepiece(metadata, vocabulary, types, where)
    else:
        tokenizer = _library(pre, vocabulary, _pairs(_strings(metadata, "merges", where), vocabulary, where))
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
        raise InputError(
            f"{where}: a tokenizer of kind {model!r:.60}; byte-level BPE ('gpt2') and SentencePiece ('llama') are "
            "read, and `convert --tokenizer DIR` takes another tokenizer"
        )
    if not isinstance(name, str) or name not in _PRE:
        raise InputError(
            f"{where}: pre-tokeniser {name!r:.60} is not known; known are {', '.join(_PRE)}, and "
            "`convert --tokenizer DIR` takes another tokenizer"
        )
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


def _vocabulary(tokens: list[str], types: np.ndarray, where: str) -> dict[str, int]:
    """Token -> id, without the rows that stand for no token."""
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise DamagedFileError(f"{where}: {len(tokens) - len(vocabulary):,} tokens appear twice in the vocabulary")
    for token, kind in zip(tokens, types.tolist(), strict=True):
        if kind == _UNUSED and _FILLING.fullmatch(token):
            del vocabulary[token]
    return vocabulary


def _pairs(merges: list[str], vocabulary: dict[str, int], where: str) -> list[tuple[str, str]]:
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    wrong = [f"{a} {b}" for a, b in pairs if not (a and b and {a, b, a + b} <= vocabulary.keys())]
    if wrong:
        raise DamagedFileError(f"{where}: {len(wrong):,} merges name no tokens, the first is {wrong[0]!r:.60}")
    return pairs


def _from_sentencepiece(
    metadata: dict[str, Any], vocabulary: dict[str, int], types: np.ndarray, where: str
) -> tokenizers.Tokenizer:
    """A SentencePiece tokenizer without its added tokens."""
    scores = metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, np.ndarray) or len(scores) != len(types) or not np.isfinite(scores).all():
        raise DamagedFileError(f"{where}: {len(types):,} tokens, but tokenizer.ggml.scores are not as many numbers")
    listed = types.tolist()
    kinds = {token: listed[index] for token, index in vocabulary.items()}
    if sum(kind == _BYTE for kind in kinds.values()) != 256 or any(
        not spm.BYTE.fullmatch(token) for token, kind in kinds.items() if kind == _BYTE
    ):
        raise InputError(f"{where}: a SentencePiece tokenizer without a token for each byte, which is not supported")
    normal = {token: float(scores[vocabulary[token]]) for token, kind in kinds.items() if kind == _NORMAL}
    unknown = next((token for token, kind in kinds.items() if kind == _UNKNOWN), None)
    space_first = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    return tokenizers.Tokenizer.from_str(
        json.dumps(spm.tokenizer_json(vocabulary, normal, unknown, space_first, where))
    )


def _library(pre: _Pre, vocabulary: dict[str, int], pairs: list[tuple[str, str]]) -> tokenizers.Tokenizer:
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


# -- into GGUF -----------------------------------------------------------------------


def gguf_metadata(files: Mapping[str, str | bytes], config: ModelConfig, where: str) -> dict[str, Any]:
    """The metadata `tokenizer.*` for a tokenizer's files, by name; one token for each row of the model's embedding.

    Special ids are those of tokenizer_config.json, else the configuration's, as llama.cpp's converter has it. Raises
    InputError for a tokenizer that is neither byte-level BPE nor SentencePiece's, or splits text in a way that
    llama.cpp has no name for, DamagedFileError for files that are not what they should be.
    """
    if "tokenizer.json" not in files:
        if spm_model.NAME in files:
            spm_model.tokenizer_files(files, where)  # raises: else it would have been made
        raise InputError(
            f"{where}: no tokenizer.json, which a GGUF file holds; --tokenizer DIR names a folder with one"
        )
    try:
        text = _text(files["tokenizer.json"])
        return _metadata(
            json.loads(text),
            json.loads(_text(files.get("tokenizer_config.json", "{}"))),
            files.get("chat_template.jinja"),
            tokenizers.Tokenizer.from_str(text),
            config,
            where,
        )
    except InputError:
        raise
    except Exception as error:  # the library raises nothing more specific
        raise DamagedFileError(
            f"{where}: not a tokenizer.json ({type(error).__name__}: {printable(str(error), 200)})"
        ) from None


def _metadata(
    state: dict[str, Any],
    settings: dict[str, Any],
    template: Any,
    library: tokenizers.Tokenizer,
    config: ModelConfig,
    where: str,
) -> dict[str, Any]:
    """`gguf_metadata` of the two JSON files, a chat template from elsewhere, and the tokenizer that they make."""
    sentencepiece = bool(state["model"].get("byte_fallback"))
    added = state["added_tokens"]
    ids = state["model"]["vocab"] | {token["content"]: token["id"] for token in added}
    if max(ids.values()) >= config.vocab_size:
        raise InputError(f"{where}: has an id {max(ids.values())}, but the model only {config.vocab_size} rows")
    special = {name: _content(settings.get(f"{name}_token")) for name in _SPECIAL}
    kinds = {token["content"]: _CONTROL if token["special"] else _USER_DEFINED for token in added}
    kinds |= {token: _CONTROL for token in special.values() if token in ids}
    tokens, types = [f"[PAD{row}]" for row in range(config.vocab_size)], [_UNUSED] * config.vocab_size
    for token, index in ids.items():
        tokens[index], types[index] = token, kinds.get(token, _NORMAL)
    if sentencepiece:
        scores = spm.scores_of(state, where)
        known = {state["model"].get("unk_token"): _UNKNOWN}
        kinds = {token: _BYTE for token in tokens if spm.BYTE.fullmatch(token)} | known
        types = [kinds.get(token, kind) for token, kind in zip(tokens, types, strict=True)]
        metadata: dict[str, Any] = {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.pre": "default",
            "tokenizer.ggml.scores": [scores.get(token, 0.0) for token in tokens],
            "tokenizer.ggml.add_space_prefix": spm.puts_space_first(state, where),
        }
    else:
        pairs = state["model"]["merges"]
        metadata = {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": _pre_name(state, where),
            "tokenizer.ggml.merges": [pair if isinstance(pair, str) else " ".join(pair) for pair in pairs],
        }
    metadata |= {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    for name, key in _SPECIAL.items():
        index = ids.get(special[name], getattr(config, f"{name}_token_id", None))
        index = index[0] if isinstance(index, list) and index else index
        if isinstance(index, int) and 0 <= index < config.vocab_size:
            metadata[f"tokenizer.ggml.{key}_token_id"] = index
    bos = metadata.get("tokenizer.ggml.bos_token_id")
    metadata["tokenizer.ggml.add_bos_token"] = bos is not None and library.encode("a").ids[:1] == [bos]
    template = settings.get("chat_template") if template is None else template
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    if template is not None:
        metadata["tokenizer.chat_template"] = _text(template)
    return metadata


def _text(content: str | bytes) -> str:
    return content.decode("utf-8") if isinstance(content, bytes) else content


def _content(token: Any) -> Any:
    """A token of tokenizer_config.json: a text, or an object with one."""
    return token.get("content") if isinstance(token, dict) else token


def _pre_name(state: dict[str, Any], where: str) -> str:
    """llama.cpp's name for how a tokenizer.json splits text before it merges."""
    model = state["model"]
    if model.get("type", "BPE") != "BPE" or "ByteLevel" not in str(state.get("decoder")):
        raise InputError(f"{where}: only byte-level BPE and SentencePiece's BPE can be written into a GGUF file")
    found = _splitting(state)
    for name, pre in _PRE.items():
        if found == _splitting(json.loads(_library(pre, {}, []).to_str())):
            return name
    raise InputError(f"{where}: splits text in a way that llama.cpp has no name for here; known are {', '.join(_PRE)}")


def _splitting(state: dict[str, Any]) -> list[Any]:
    """All that decides how a text is split, in a form in which equal ones are equal."""
    steps: list[Any] = [bool(state["model"].get("ignore_merges"))]
    for part, inner in (("normalizer", "normalizers"), ("pre_tokenizer", "pretokenizers")):
        step = state.get(part)
        whole = step.get(inner) if step and step["type"] == "Sequence" else [step] if step else []
        steps += [{"use_regex": True, **one, "trim_offsets": None} for one in whole]  # offsets change no id
    return steps
