"""The original project's tokenizer folder (config.json, vocab.json, merges.json) as tokenizer.json.

It is byte-level BPE: Unicode normalisation, its own split into words, then merges by rank, leftmost first, within a
word. Special tokens are never recognised in text. `merges.json` is a list of {pair, token, rank}. An early version of
the project wrote tokenizers of whole characters with an end-of-word mark, which lose spaces: those are refused.
"""

import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from mlx_impl.errors import DamagedFileError, InputError
from mlx_impl.files import read_json

CONFIG, VOCABULARY, MERGES = FILES = "config.json", "vocab.json", "merges.json"

WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""The original's pre-tokeniser: what is not matched, nothing, would be lost, but the last two take any rest."""

_NORMALIZERS = {form: getattr(normalizers, form) for form in ("NFC", "NFD", "NFKC", "NFKD")}
_LARGEST = 64 * 1024 * 1024  # bytes of one file
_MOST_IDS = 2**22
_END_OF_WORD = "</w>"


def is_tokenizer_folder(folder: Path) -> bool:
    """Whether the three files are there and config.json is a tokenizer's: folders of adapters have one too."""
    if not all((folder / name).is_file() for name in FILES):
        return False
    return "special_tokens" in read_json(folder / CONFIG, _LARGEST)


def tokenizer_files(folder: Path, context_length: int) -> dict[str, str]:
    """File name -> content of `tokenizer.json` and `tokenizer_config.json` that give the ids of the original's folder.

    Raises InputError for the early kind of tokenizer and for what is not there, DamagedFileError for pieces that do not
    fit together, where the original would go on and give other ids than it was trained with.
    """
    config, vocabulary = read_json(folder / CONFIG, _LARGEST), read_json(folder / VOCABULARY, _LARGEST)
    specials = _specials(config, vocabulary, folder)
    _check_vocabulary(vocabulary, folder)
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, _merges(folder, vocabulary)))
    form = config.get("normalization", "NFC")
    if form is not None and (not isinstance(form, str) or form not in _NORMALIZERS):
        raise InputError(f"{folder / CONFIG}: normalization is {form!r:.60}; known are {', '.join(_NORMALIZERS)}")
    if form is not None:
        tokenizer.normalizer = _NORMALIZERS[form]()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in specials])
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,
        "model_max_length": context_length,
        # The original ends a text with the first of them, whatever its name.
        **({"eos_token": specials[0]} if specials else {}),
    }
    return {
        "tokenizer.json": tokenizer.to_str(pretty=True),
        "tokenizer_config.json": json.dumps(settings, indent=2, ensure_ascii=False) + "\n",
    }


def _specials(config: dict[str, Any], vocabulary: dict[str, Any], folder: Path) -> list[str]:
    specials = config.get("special_tokens")
    if not isinstance(specials, list) or not all(isinstance(token, str) and token for token in specials):
        raise DamagedFileError(f"{folder / CONFIG}: special_tokens is no list of texts")
    missing = [token for token in specials if token not in vocabulary]
    if missing:
        raise DamagedFileError(f"{folder / VOCABULARY}: lacks {len(missing)} special tokens, first {missing[0]!r:.60}")
    return list(dict.fromkeys(specials))


def _check_vocabulary(vocabulary: dict[str, Any], folder: Path) -> None:
    """Ids are different small numbers, and all 256 bytes have one."""
    where = folder / VOCABULARY
    if _END_OF_WORD in vocabulary:
        raise InputError(
            f"{where}: an early tokenizer of the original, of characters with {_END_OF_WORD}; it loses spaces and "
            "unknown characters, which no tokenizer.json does. Train the model again with a byte-level one"
        )
    wrong = [token for token, id in vocabulary.items() if type(id) is not int or not 0 <= id < _MOST_IDS]
    if wrong:
        raise DamagedFileError(f"{where}: {wrong[0]!r:.60} has no id from 0 to {_MOST_IDS - 1:,}")
    if len(set(vocabulary.values())) != len(vocabulary):
        raise DamagedFileError(f"{where}: {len(vocabulary):,} tokens share {len(set(vocabulary.values())):,} ids")
    missing = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - vocabulary.keys())
    if missing:
        raise DamagedFileError(f"{where}: lacks {len(missing)} of the 256 bytes, first {missing[0]!r}")
    try:
        "".join(vocabulary).encode()
    except UnicodeEncodeError as error:
        raise DamagedFileError(f"{where}: a token that is no text ({error.reason})") from None


def _merges(folder: Path, vocabulary: dict[str, Any]) -> list[tuple[str, str]]:
    """The pairs in the order of their ranks; the library makes a pair's token by writing one behind the other."""
    where = folder / MERGES
    if where.stat().st_size > _LARGEST:
        raise DamagedFileError(f"{where}: {where.stat().st_size:,} bytes, at most {_LARGEST:,} expected of this file")
    try:
        rows = json.loads(where.read_text(encoding="utf-8"))
        if not isinstance(rows, list):
            raise TypeError(f"a {type(rows).__name__}")
        ranked = sorted((_rank(row["rank"]), tuple(row["pair"]), row["token"]) for row in rows)
    except (ValueError, RecursionError, LookupError, TypeError) as error:
        raise DamagedFileError(f"{where}: no list of {{pair, token, rank}} ({type(error).__name__}: {error})") from None
    for _, pair, token in ranked:
        texts = all(isinstance(part, str) and part in vocabulary for part in (*pair, token))
        if not texts or len(pair) != 2 or "".join(pair) != token:
            raise DamagedFileError(f"{where}: {pair!r:.80} does not make the token {token!r:.40} of the vocabulary")
    pairs = [pair for _, pair, _ in ranked]
    if len(set(pairs)) != len(pairs) or len({rank for rank, _, _ in ranked}) != len(pairs):
        raise DamagedFileError(f"{where}: a pair or a rank comes twice")
    return [(left, right) for left, right in pairs]


def _rank(value: Any) -> int:
    if type(value) is not int:
        raise TypeError(f"rank {value!r:.40}")
    return value
