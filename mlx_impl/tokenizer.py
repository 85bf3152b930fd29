"""Text to token ids and back, one class for our own tokenizers and for those of Hugging Face directories.

Our own are SentencePiece BPE with byte fallback, trained by `tokenizer_train`; others are read from tokenizer.json by
the `tokenizers` library (BPE, byte-level or with byte fallback: what Llama models have), or where there is none from
the tokenizer.model of older ones by SentencePiece itself.
Unusual: decoding is ours for both, a table of each id's bytes, so that streamed text is exactly the decoded
one; and text never turns into special tokens, only a chat template writes those.
"""

import codecs
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from convert import spm_model
from mlx_impl import files, tokenizer_chat, tokenizer_train
from mlx_impl.errors import DamagedFileError, InputError, printable, shown
from mlx_impl.tokenizer_train import SPACE, check_encodable

_MOST_IDS = 2**22  # largest vocabularies have 2**18; a table is made with a row for each
_LARGEST_FILE = 64 * 1024 * 1024
_LARGEST_TEMPLATE = 1024 * 1024

Message = Mapping[str, Any]


class Tokenizer:
    """`decode(encode(x)) == x` for every text, with these exceptions.

    Ours: U+2581 comes back as a space, as with any SentencePiece model. Others: what their normaliser
    changes (NFC, say) or their vocabulary lacks. Both: lone surrogates are refused (InputError). The text
    of a special token is plain text, in `encode` always and in `encode_chat` wherever a message has it.
    """

    def __init__(
        self,
        text: str,
        config: Mapping[str, Any] | None = None,
        where: str = "tokenizer.json",
        model: spm_model.SentencePieceModel | None = None,
    ) -> None:
        """From the text of tokenizer.json and the content of tokenizer_config.json; errors name `where`.

        With `model`, which then encodes, the text may lack merges; see `SentencePieceModel.described`.
        """
        state = _parsed(text, where)
        self._text = text if model is None else None
        self._config = dict(config or {})
        self._named = _named_tokens(self._config)
        self._model = tokenizer_train.sentencepiece_model(state) if model is None else model.file

        ids = {
            **state["model"]["vocab"],
            **{token["content"]: token["id"] for token in state["added_tokens"]},
        }
        _mark_special(state["added_tokens"], ids, set(self._named.values()))
        self._specials = {t["content"]: t for t in state["added_tokens"] if t["special"]}
        self._special_pattern = _special_pattern(self._specials.values())
        framed: list[int] = []
        if model is not None:
            self._encode, self._encode_later = (_sentencepiece_encoder(m, where) for m in (model.first, model.later))
        elif self._model is None:
            self._encode, self._encode_later, framed = _tokenizers_encoders(state, self._config, where)
        else:
            self._encode = self._encode_later = _sentencepiece_encoder(self._model, where)
        self._spelled, self._to_bytes, self._drops_first_space = _spelling(state, where)

        self.digest = hashlib.sha256(text.encode() + (b"" if model is None else model.first)).hexdigest()
        """Hex sha256 of tokenizer.json, the file that fixes the ids of a text, or of all that is read in its place."""
        self.vocab_size = len(self._spelled)
        """One more than the highest id; a model needs at least so many rows, and never samples beyond."""
        self.special_ids = frozenset(token["id"] for token in self._specials.values())
        self.bos_id: int | None = ids.get(self._named.get("bos_token"))
        self.eos_id: int | None = ids.get(self._named.get("eos_token"))
        self.pad_id: int | None = ids.get(self._named.get("pad_token"))
        self.unk_id: int | None = ids.get(self._named.get("unk_token"))
        asked = framed[:1] == [self.bos_id] or self._config.get("add_bos_token") is True
        self.adds_bos = asked and self.bos_id is not None
        """Whether its model expects `bos_id` before a plain text: the post-processor of tokenizer.json puts it there,
        or `add_bos_token` asks for it. `encode` never does; prompts and documents get it, chats from their template."""
        self.eos_ids = [] if self.eos_id is None else [self.eos_id]
        """Every id that ends a text; `load` adds those of generation_config.json."""
        template = self._config.get("chat_template")
        self.chat_template: str | None = template if isinstance(template, str) else None

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        vocab_size: int = 8000,
        min_frequency: int = 2,
        special_tokens: Sequence[str] = (),
    ) -> "Tokenizer":
        """Learn at most `vocab_size` ids from texts; see `tokenizer_train.learn`, also for what is refused.

        No piece is made of a pair that was seen fewer than `min_frequency` times when it was merged.
        """
        state = tokenizer_train.learn(texts, vocab_size, min_frequency, special_tokens)
        text = json.dumps(state, ensure_ascii=False, indent=2) + "\n"
        return cls(text, tokenizer_train.tokenizer_config([token["content"] for token in state["added_tokens"]]))

    @classmethod
    def load(cls, directory: Path | str) -> "Tokenizer":
        """Read a directory with tokenizer.json, else a tokenizer.model, and where there are the files that go with it.

        InputError: neither is there, or a kind of tokenizer that is not supported. DamagedFileError: a file
        that is not what it should be, or our tokenizer.json beside a tokenizer.model that disagrees with it.
        """
        directory = Path(directory).expanduser()
        path, beside = tokenizer_file(directory), directory / spm_model.NAME
        config = _optional_json(directory / "tokenizer_config.json")
        if config.get("auto_map"):
            raise InputError(
                f"{directory / 'tokenizer_config.json'}: auto_map names code to be run, which is never done"
            )
        template = _chat_template(directory, config)
        model = None
        if path == beside:
            model = spm_model.read(_read_bytes(path, _LARGEST_FILE), spm_model.read_beside(directory), str(path))
            config, text = model.config, json.dumps(model.described())
        else:
            text = _read_text(path, _LARGEST_FILE)
        if template is not None:
            config["chat_template"] = template
        tokenizer = cls(text, config, str(path), model)
        if tokenizer._model is not None and beside.exists() and not _holds(beside, tokenizer._model):
            raise DamagedFileError(f"{beside}: does not agree with tokenizer.json beside it; train or copy both again")
        more = _optional_json(directory / "generation_config.json").get("eos_token_id")
        for eos in more if isinstance(more, list) else [more]:
            if type(eos) is int and 0 <= eos < tokenizer.vocab_size and eos not in tokenizer.eos_ids:
                tokenizer.eos_ids.append(eos)
        return tokenizer

    from_pretrained = load

    def save(self, directory: Path | str) -> None:
        """Write tokenizer.json, tokenizer_config.json (chat template in it) and, if ours, tokenizer.model.

        One that was read from a tokenizer.model alone is written so again.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        if self._text is not None:
            files.write_text(directory / "tokenizer.json", self._text)
        files.write_json(directory / "tokenizer_config.json", self._config)
        if self._model is not None:
            with files.atomic_file(directory / "tokenizer.model") as temporary:
                temporary.write_bytes(self._model)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, nothing added before or after. InputError for a lone surrogate."""
        check_encodable(text)
        return self._encode(text)

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """The text of token ids; bytes that are no UTF-8 become U+FFFD. InputError for an id out of range."""
        dropped = self.special_ids if skip_special else ()
        text = b"".join([self.token_bytes(i) for i in ids if i not in dropped]).decode(errors="replace")
        return text[1:] if self._drops_first_space and text.startswith(" ") else text

    def stream(self) -> "Detokenizer":
        """A decoder that takes one id at a time."""
        return Detokenizer(self)

    def token_bytes(self, id: int) -> bytes:
        """The UTF-8 that one id stands for, often part of a character; of a special token, its name."""
        if not 0 <= id < self.vocab_size:
            raise InputError(f"token id {id} is outside this tokenizer's 0 to {self.vocab_size - 1}")
        spelled = self._spelled[id]
        return spelled if isinstance(spelled, bytes) else self._to_bytes(spelled)

    def check_fits(self, vocab_size: int) -> None:
        """InputError if a model with `vocab_size` rows in its embedding table lacks one for some id."""
        if self.vocab_size > vocab_size:
            raise InputError(
                f"the tokenizer has {self.vocab_size} ids and the model only {vocab_size} rows: they do not "
                "belong together; give the tokenizer that the model was trained with"
            )

    @property
    def has_chat_template(self) -> bool:
        """Whether `render_chat` and `encode_chat` can be used."""
        return self.chat_template is not None

    @property
    def chat_digest(self) -> str | None:
        """Hex digest of the chat template and the special tokens that it may write; None without one."""
        if self.chat_template is None:
            return None
        return hashlib.sha256(json.dumps([self.chat_template, self._named]).encode()).hexdigest()

    def render_chat(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """The text of a conversation of {"role": ..., "content": ...}. InputError without a chat template."""
        if self.chat_template is None:
            raise InputError("this tokenizer has no chat template; give the prompt as plain text")
        return tokenizer_chat.render(self.chat_template, messages, add_generation_prompt, self._named)

    def encode_chat(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> list[int]:
        """Token ids of a conversation: special tokens where the template writes them, text where messages do.

        A special token spelled half by the template and half by a message is taken for the template's.
        """
        safe, replaced = tokenizer_chat.stand_ins(messages, self._specials, self.chat_template or "")
        rendered = self.render_chat(safe, add_generation_prompt)
        back = str.maketrans(replaced)
        ids: list[int] = []
        position = 0
        for found in [*self._special_pattern.finditer(rendered), None]:
            part = rendered[position : found.start() if found else None].translate(back)
            check_encodable(part)
            ids += (self._encode_later if position else self._encode)(part) if part else []
            if found:
                ids.append(int(str(found.lastgroup)[1:]))
                position = found.end()
        return ids


BPETokenizer = Tokenizer


def tokenizer_file(directory: Path) -> Path:
    """The file that fixes the ids of a text: tokenizer.json, else tokenizer.model. InputError where neither is."""
    for path in (directory / "tokenizer.json", directory / spm_model.NAME):
        if path.is_file():
            return path
    raise InputError(
        f"{directory}: no tokenizer.json there, and no {spm_model.NAME}; name a model directory or one written by "
        "`tokenizer`"
    )


class Detokenizer:
    """Turns ids into text: `add` for each, then `finish`; put together, `decode(ids, skip_special=True)`.

    Each call returns the text that no later id can change, so never part of a character.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._drops_space = tokenizer._drops_first_space

    def add(self, id: int) -> str:
        """The text that became certain with this id, maybe empty. InputError for an id out of range."""
        token = self._tokenizer.token_bytes(id)
        return "" if id in self._tokenizer.special_ids else self._certain(token)

    def finish(self) -> str:
        """U+FFFD if the ids ended within a character, else nothing."""
        return self._certain(b"", final=True)

    def _certain(self, more: bytes, final: bool = False) -> str:
        text = self._decoder.decode(more, final)
        if text and self._drops_space:
            self._drops_space = False
            return text.removeprefix(" ")
        return text


def _sentencepiece_encoder(model: bytes, where: str) -> Callable[[str], list[int]]:
    from sentencepiece import SentencePieceProcessor

    try:
        processor = SentencePieceProcessor(model_proto=model)
    except RuntimeError as error:  # a piece too long for it, or with a NUL
        raise DamagedFileError(f"{where}: no SentencePiece model ({printable(str(error), 200)})") from None
    return lambda text: list(processor.encode(text, out_type=int))


def _tokenizers_encoders(
    state: dict[str, Any], config: Mapping[str, Any], where: str
) -> tuple[Callable[[str], list[int]], Callable[[str], list[int]], list[int]]:
    """Encoders for the beginning of a text and for what follows a special token; "a" with all that is put round it."""
    from tokenizers import Tokenizer as Library

    def read(text: str) -> Library:
        try:
            library = Library.from_str(text)
        except BaseException as error:  # the library raises nothing more specific, and panics
            if not isinstance(error, Exception) and not _is_panic(error):
                raise
            raise DamagedFileError(
                f"{where}: not a tokenizer.json that can be read ({printable(str(error), 200)})"
            ) from None
        library.no_truncation()
        library.no_padding()
        library.encode_special_tokens = True  # their text is encoded like any other
        return library

    def encoder(library: Library) -> Callable[[str], list[int]]:
        return lambda text: encoded(library, text, False)

    def encoded(library: Library, text: str, framed: bool) -> list[int]:
        try:
            return list(library.encode(text, add_special_tokens=framed).ids)
        except BaseException as error:
            if not _is_panic(error):
                raise
            raise DamagedFileError(f"{where}: fails on a text ({printable(str(error), 200)})") from None

    text = json.dumps(state, ensure_ascii=False)  # not what the file says: twice the same key, and both would differ
    whole = read(text)
    first = encoder(whole)
    # Metaspace with this scheme puts a space before the beginning of a text only.
    inner = re.sub(r'("prepend_scheme": )"first"', r'\1"never"', text)
    if config.get("legacy") is False and str(config.get("tokenizer_class")).startswith("LlamaTokenizer"):
        inner = inner.replace(_PREPENDED, "")  # so does transformers' class with this setting
    return first, encoder(read(inner)) if inner != text else first, encoded(whole, "a", True)


def _is_panic(error: BaseException) -> bool:
    """Whether Rust gave up; its bindings raise that past `Exception`, under a name that cannot be imported."""
    return type(error).__name__ == "PanicException"


_PREPENDED = json.dumps({"type": "Prepend", "prepend": SPACE}, ensure_ascii=False) + ", "


def _parsed(text: str, where: str) -> dict[str, Any]:
    """The content of a tokenizer.json, as far checked as this module relies on it."""
    try:
        state = json.loads(text)
        model, added = state["model"], state["added_tokens"]
        kind, vocab = model.get("type", "BPE"), model["vocab"]
        if kind != "BPE":
            raise InputError(
                f"{where}: a {printable(str(kind), 40)} tokenizer; only BPE is supported, as Llama models have it"
            )
        tokens = [(token["content"], token["id"]) for token in added if type(token["special"]) is bool]
        tokens += vocab.items()
        whole = len(tokens) == len(added) + len(vocab) > 0 and all(
            type(content) is str and type(i) is int and 0 <= i < _MOST_IDS for content, i in tokens
        )
        whole &= len({token["id"] for token in added}) == len(added)
        whole &= all(type(side) is str for pair in model["merges"] for side in pair)
        "".join(content for content, _ in tokens).encode()
    except InputError:
        raise
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
        raise DamagedFileError(f"{where}: not a tokenizer.json ({type(error).__name__}: {error})") from None
    if not whole:
        raise DamagedFileError(
            f"{where}: no tokenizer.json (a token has no text, an id comes twice or exceeds {_MOST_IDS - 1})"
        )
    return dict(state)


def _named_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """bos_token and the like of a tokenizer_config.json, where a token is a text or {"content": text}."""
    named = {}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        token = config.get(name)
        content = token.get("content") if isinstance(token, dict) else token
        if isinstance(content, str) and content:
            named[name] = content
    return named


def _mark_special(added: list[dict[str, Any]], ids: Mapping[str, int], named: set[str]) -> None:
    """Make the tokens special that tokenizer_config.json names; tokenizer.json does not always say so."""
    for token in added:
        token["special"] = token["special"] or token["content"] in named
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    taken = {token["id"] for token in added}
    for content in sorted(named.intersection(ids) - {token["content"] for token in added}):
        if ids[content] not in taken:  # an added token is what its id stands for
            added.append({"id": ids[content], "content": content, **flags})


def _special_pattern(specials: Iterable[Mapping[str, Any]]) -> re.Pattern[str]:
    """Finds special tokens, in a group named `i` and the id; some take the white space beside them along."""
    alternatives = []
    for token in sorted(specials, key=lambda token: len(token["content"]), reverse=True):
        before, after = (r"\s*" if token.get(side) else "" for side in ("lstrip", "rstrip"))
        alternatives.append(f"(?P<i{token['id']}>{before}{re.escape(token['content'])}{after})")
    return re.compile("|".join(alternatives) or r"(?!)")


def _spelling(state: dict[str, Any], where: str) -> tuple[list[str | bytes], Callable[[str], bytes], bool]:
    """Each id's bytes or how the vocabulary spells them, what turns a spelling into bytes, and whether decoding drops a
    space at the beginning. A gap has no bytes; to turn all spellings would take a tenth of opening a model."""
    try:
        decoder = state.get("decoder") or {}
        steps = decoder.get("decoders") if decoder.get("type") == "Sequence" else [decoder]
        kinds = {step.get("type"): step for step in steps or []}
    except (AttributeError, TypeError):
        raise DamagedFileError(f"{where}: the decoder is not what a tokenizer.json has there") from None
    if "ByteLevel" in kinds:
        to_bytes = _byte_level
    elif "ByteFallback" in kinds or "Metaspace" in kinds:
        to_bytes = _byte_fallback
    else:
        raise InputError(
            f"{where}: decoder {shown(decoder.get('type'))} is not supported; ByteLevel and ByteFallback are"
        )
    added = {token["id"]: token["content"].encode() for token in state["added_tokens"]}
    vocab = state["model"]["vocab"]
    table: list[str | bytes] = [b""] * (max([*vocab.values(), *added]) + 1)
    for token, i in vocab.items():
        table[i] = token
    for i, content in added.items():
        table[i] = content
    scheme = kinds.get("Metaspace", {}).get("prepend_scheme", "always")
    return table, to_bytes, "Strip" in kinds or ("Metaspace" in kinds and scheme != "never")


def _byte_fallback(token: str) -> bytes:
    byte = re.fullmatch("<0x([0-9A-F]{2})>", token)
    return bytes.fromhex(byte[1]) if byte else token.replace(SPACE, " ").encode()


# GPT-2's spelling of bytes: printable ones of Latin-1 as they are, the others from U+0100 on, in order.
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_SPELLED = {byte: byte for byte in _PRINTABLE} | {
    0x100 + n: byte for n, byte in enumerate(sorted(set(range(256)) - set(_PRINTABLE)))
}
_SPELLING = frozenset(map(chr, _SPELLED))


def _byte_level(token: str) -> bytes:
    return token.translate(_SPELLED).encode("latin-1") if _SPELLING.issuperset(token) else token.encode()


def _chat_template(directory: Path, config: Mapping[str, Any]) -> str | None:
    """chat_template.jinja, else chat_template in tokenizer_config.json: a text, or a list with a default."""
    path = directory / "chat_template.jinja"
    if path.exists():
        return _read_text(path, _LARGEST_TEMPLATE)
    template = config.get("chat_template")
    if isinstance(template, list):
        template = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}.get("default")
    if template is not None and not isinstance(template, str):
        raise DamagedFileError(f"{directory / 'tokenizer_config.json'}: chat_template is no text")
    return template


def _optional_json(path: Path) -> dict[str, Any]:
    return files.read_json(path) if path.exists() else {}


def _read_bytes(path: Path, limit: int) -> bytes:
    if path.stat().st_size > limit:
        raise DamagedFileError(f"{path}: {path.stat().st_size:,} bytes, at most {limit:,} expected of this file")
    return path.read_bytes()


def _read_text(path: Path, limit: int) -> str:
    """A file's text as it stands, line ends included."""
    try:
        return _read_bytes(path, limit).decode()
    except UnicodeDecodeError as error:
        raise DamagedFileError(f"{path}: not UTF-8 ({error})") from None


def _holds(path: Path, content: bytes) -> bool:
    return path.stat().st_size == len(content) and path.read_bytes() == content
