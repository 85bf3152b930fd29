"""Files damaged or made hostile, each by a `random.Random`: the same seed gives the same file.

A change takes a whole file's bytes and returns others. Most change what a format means and leave its frame whole, so
that readers get past the first check: numbers in headers, values in JSON, what a pickle builds. Plain damage to bytes
is among them everywhere.
"""

import copy
import io
import json
import math
import pickle
import pickletools
import re
import zipfile
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

Change = Callable[[bytes, Random], bytes]

NAMES = re.compile(rb"[A-Za-z_]\w+(?:\.\w+)+")
"""Dotted names: keys of metadata, tensors, modules in a pickle. What lies around them are lengths, types and counts."""

INTEGERS = (
    *(0, 1, -1, 2, 3, 7, 255, 1000, 2**31 - 1, 2**31, 2**32, 2**40, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64),
    *(-(2**31), -(2**63), 10**400, -(10**400)),
)
REALS = (0.5, -0.5, -0.0, 1e-320, 1e-30, 1e30, 1e308, math.nan, math.inf, -math.inf)
TEXTS = (
    *(
        "",
        " ",
        "0",
        "llama",
        "a\nb",
        "\0",
        "\x1b[2J",
        "\u202e",
        "\ud800",
        "\U0010ffff",
        "..",
        "../../outside",
        "/outside",
    ),
    *("os.system", "{{ x }}", "x" * 300, "x" * 200_000, "<unk>", "<0x00>"),
)
CONTAINERS = (
    "[]",
    "{}",
    "[[]]",
    "[{}]",
    '{"": {}}',
    '{"a": 1}',
    "[0]",
    json.dumps([1] * 10_000),
    '["a", "b"]',
    "[null]",
)
CODE = ('{"auto_map": {"AutoModel": "x.Y"}}', '{"model_file": "x.py"}', '{"custom_pipelines": {"x": {"impl": "x.y"}}}')

_DEEP = "\x02deep\x02"  # stands for what no JSON writer would write
_DEEP_TEXT = json.dumps(_DEEP)
_DEEPER = ("[" * 100_000 + "]" * 100_000, '{"a":' * 5_000 + "1" + "}" * 5_000, "9" * 5_000, "-")


# -- bytes ---------------------------------------------------------------------------


def bytes_changed(data: bytes, draw: Random) -> bytes:
    """Bits and bytes flipped, numbers overwritten, stretches cut out, repeated, zeroed or put in, the end cut off."""
    content = bytearray(data)
    names = [match.span() for match in NAMES.finditer(data)]
    for _ in range(draw.choice((1, 1, 2, 4))):
        size = len(content)
        at = draw.randrange(max(1, size))
        if names and draw.random() < 0.7:
            start, stop = draw.choice(names)
            at = min(max(0, draw.choice((start - draw.randrange(16), start, stop + draw.randrange(24)))), size)
        elif draw.random() < 0.3:
            at = draw.randrange(max(1, min(64, size)))
        long = draw.choice((1, 4, 40, 1000))
        match draw.choice(("bit", "byte", "number", "number", "cut", "insert", "repeat", "zero", "move", "end")):
            case "bit" if at < size:
                content[at] ^= 1 << draw.randrange(8)
            case "byte" if at < size:
                content[at] = draw.randrange(256)
            case "number":
                width = draw.choice((1, 2, 4, 8))
                content[at : at + width] = (draw.choice(INTEGERS) % 256**width).to_bytes(width, "little")
            case "cut":
                del content[at : at + long]
            case "insert":
                content[at:at] = draw.choice((draw.randbytes(long), b"9" * long, b"[" * long, b"\xff\xfe", b'"', b"\0"))
            case "repeat":
                content[at:at] = content[at : at + long] * draw.choice((1, 2, 50))
            case "zero":
                content[at : at + long] = bytes(min(long, size - at))
            case "move":
                piece = content[at : at + long]
                del content[at : at + long]
                at = draw.randrange(len(content) + 1)
                content[at:at] = piece
            case "end":
                del content[at:]
    return bytes(content)


# -- trees: JSON, and what a pickle holds --------------------------------------------


def tree_changed(tree: Any, draw: Random, more: Sequence[Any] = ()) -> Any:
    """A tree of dictionaries and lists, one to three places of it changed; `more` are further values to put there."""
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        if not isinstance(tree, dict | list) or not tree or draw.random() < 0.03:
            return _strange(tree, draw, more)
        container, key = _place(tree, draw)
        there = container[key]
        match draw.choice(("replace",) * 6 + ("remove", "rename", "copy", "swap", "wrap", "repeat", "code")):
            case "replace":
                container[key] = _strange(there, draw, more)
            case "remove":
                del container[key]
            case "rename" if isinstance(container, dict):
                names = [name for name in container if isinstance(name, str)]
                container[draw.choice((*TEXTS, *names))] = container.pop(key)
            case "copy":
                source, name = _place(tree, draw)
                container[key] = source[name] if more else copy.deepcopy(source[name])  # a pickle may hold itself
            case "swap":
                other = draw.choice(list(container) if isinstance(container, dict) else range(len(container)))
                container[key], container[other] = container[other], there
            case "wrap":
                container[key] = draw.choice(([there], {"a": there}, [there, there], {"a": [there]}))
            case "repeat" if isinstance(container, list):
                container[key:key] = [there] * draw.choice((1, 2, 5_000))
            case "code" if isinstance(container, dict):
                container |= json.loads(draw.choice(CODE))
    return tree


def _place(tree: Any, draw: Random) -> tuple[Any, Any]:
    """A container and a key in it, found by going down at random: long lists get no more than short ones."""
    container = tree
    while True:
        key = draw.choice(list(container)) if isinstance(container, dict) else draw.randrange(len(container))
        below = container[key]
        if not isinstance(below, dict | list) or not below or draw.random() < 0.25:
            return container, key
        container = below


def _strange(there: Any, draw: Random, more: Sequence[Any]) -> Any:
    """A value that does not belong there; for a number often one near it."""
    if isinstance(there, int | float) and not isinstance(there, bool) and draw.random() < 0.4:
        return draw.choice((there + 1, there - 1, there * 2, -there, there * 2**32, str(there), there / 2, [there]))
    if draw.random() < 0.15:
        return json.loads(draw.choice(CONTAINERS))
    kinds = [INTEGERS, REALS, TEXTS, (None, True, False), (_DEEP,), more]
    return draw.choice(draw.choice([kind for kind in kinds if kind]))


def json_changed(data: bytes, draw: Random) -> bytes:
    """A JSON document with values of other kinds and sizes, deep nesting, doubled keys; or damaged as bytes."""
    if draw.random() < 0.2:
        return bytes_changed(data, draw)
    text = json.dumps(tree_changed(json.loads(data), draw), indent=draw.choice((None, 2)))
    while _DEEP_TEXT in text:
        levels = draw.randrange(900, 1000)  # about as deep as Python goes
        deep = ("[" * levels + "]" * levels, '{"a":' * levels + "1" + "}" * levels)
        text = text.replace(_DEEP_TEXT, draw.choice((*_DEEPER, *deep)), 1)
    keys = re.findall(r'"\w+":', text)
    if keys and draw.random() < 0.1:  # one key twice
        text = text.replace(draw.choice(keys), draw.choice(keys), 1)
    return text.encode()


# -- formats -------------------------------------------------------------------------


def safetensors_changed(data: bytes, draw: Random) -> bytes:
    """Another header before the same values, its length right but for one in ten; or damaged as bytes."""
    if draw.random() < 0.3:
        return bytes_changed(data, draw)
    length = int.from_bytes(data[:8], "little")
    header = json_changed(data[8 : 8 + length], draw)
    said = len(header) if draw.random() < 0.9 else draw.choice(INTEGERS) % 2**64
    return said.to_bytes(8, "little") + header + data[8 + length :]


def pieces_changed(data: bytes, draw: Random) -> bytes:
    """A tokenizer.json of ours with other pieces, still of the form that a SentencePiece model is made from."""
    from mlx_impl.tokenizer_train import BYTES, tokenizer_json

    state = json.loads(data)
    specials = [token["content"] for token in state["added_tokens"]]
    merges = state["model"]["merges"]
    count = len(state["model"]["vocab"]) - len(merges)
    characters = list(state["model"]["vocab"])[len(specials) + len(BYTES) : count]
    for _ in range(draw.choice((1, 2, 20))):
        text = draw.choice((*TEXTS, *characters, chr(draw.randrange(0xD7FF)), "▁" * draw.randrange(1, 300)))
        which = draw.choice((specials, characters, characters, *merges))
        at = draw.randrange(len(which))
        if which is specials and at < 4:
            continue
        match draw.choice(("replace", "replace", "remove", "insert")):
            case "remove" if which in (specials, characters) and len(which) > 5:
                del which[at]
            case "insert" if which in (specials, characters):
                which.insert(at, text)
            case _:
                which[at] = text
    if draw.random() < 0.3:
        draw.shuffle(merges)
    return json.dumps(tokenizer_json(specials, characters, merges)).encode()


def sentencepiece_changed(data: bytes, draw: Random) -> bytes:
    """A tokenizer.model whose pieces, scores, kinds or settings are others, in sound messages; or damaged as bytes."""
    from mlx_impl.tokenizer_train import _field

    if draw.random() < 0.3:
        return bytes_changed(data, draw)
    fields = messages(data)
    for _ in range(draw.choice((1, 2, 20))):
        at = draw.choice((draw.randrange(len(fields)), len(fields) - 1, len(fields) - 2))
        number, content = fields[at]
        text = draw.choice((*TEXTS, chr(draw.randrange(0xD7FF)), "▁" * draw.randrange(1, 300))).encode(
            "utf-8", "replace"
        )
        value = draw.choice(
            (*(n % 2**64 for n in INTEGERS), text, float(draw.choice((0, 1, -1e30, math.inf, math.nan))))
        )
        match draw.choice(("add", "add", "bytes", "remove", "copy", "move")):
            case "add":  # of a field given twice the last one counts
                fields[at] = number, content + _field(draw.choice((1, 2, 3, 3, 4, 5, 24, 35, 40, 41, 46)), value)
            case "bytes":
                start = draw.randrange(max(1, len(content)))  # a part: the rules of a normaliser are long
                part = bytes_changed(content[start : start + 200], draw)
                fields[at] = number, content[:start] + part + content[start + 200 :]
            case "remove" if len(fields) > 3:
                del fields[at]
            case "copy":
                fields.insert(draw.randrange(len(fields)), fields[at])
            case _:
                fields[at] = draw.choice((1, 2, 3, 4, 5, 9)), content
    return b"".join(_field(number, content) for number, content in fields)


def messages(data: bytes) -> list[tuple[int, bytes]]:
    """Field number and content of the messages that a message consists of."""
    found, at = [], 0
    while at < len(data):
        number, size, shift = data[at] >> 3, 0, 0
        while True:
            at += 1
            size |= (data[at] & 127) << shift
            shift += 7
            if data[at] < 128:
                break
        found.append((number, data[at + 1 : at + 1 + size]))
        at += 1 + size
    return found


# -- .pt -----------------------------------------------------------------------------


class Code:
    """Makes a file where it runs, if a reader lets a pickle call."""

    def __reduce__(self) -> Any:
        return open, ("ran", "w")


GLOBALS = (
    *("os system", "builtins eval", "collections OrderedDict", "collections Counter", "torch Size", "torch device"),
    *("torch FloatStorage", "torch DoubleStorage", "torch LongStorage", "torch BoolStorage", "torch QInt8Storage"),
    *("torch.storage UntypedStorage", "torch.storage TypedStorage", "torch ComplexFloatStorage", "torch float16"),
    *("torch._utils _rebuild_parameter", "torch._utils _rebuild_sparse_tensor", "torch._utils _rebuild_qtensor"),
    *("torch._utils _rebuild_meta_tensor_no_storage", "torch._utils _rebuild_tensor", "torch.serialization load"),
    *("torch Tensor", "torch.nn.parameter Parameter", "builtins bytearray", "_codecs encode", "torch.nested _view"),
)


def pt_changed(data: bytes, draw: Random) -> bytes:
    """Other values in the same frame, another pickle in the same archive, another archive; or damaged as bytes."""
    match draw.choice(("value", "value", "pickle", "pickle", "archive", "bytes")):
        case "value":
            return _value_changed(data, draw)
        case "pickle":
            return _repacked(
                data, lambda name, content: _pickle_changed(content, draw) if _is_pickle(name) else content
            )
        case "archive":
            return _archive_changed(data, draw)
        case _:
            return bytes_changed(data, draw)


def _is_pickle(name: str) -> bool:
    return name.endswith("data.pkl")


def _value_changed(data: bytes, draw: Random) -> bytes:
    import torch

    value = torch.load(io.BytesIO(data), weights_only=True)
    one = torch.ones(3, 4)
    tensors = (
        *(torch.zeros(0), torch.ones(()), torch.ones(2, dtype=torch.long), one.double(), one.bool(), one.half() * 1e9),
        *(one * math.nan, torch.zeros(4, device="meta"), torch.zeros(1).expand(10**6, 10**6), one.T, one.to_sparse()),
        *(
            torch.zeros(2, dtype=torch.complex64),
            torch.nn.Parameter(one),
            torch.ones(2, dtype=torch.uint8),
            one[1:, ::2],
        ),
        *(torch.zeros(0, 2**40), torch.ones((1,) * 40), torch.full((2,), 2**62)),
    )
    itself: list[Any] = []
    itself.append(itself)
    others = (10**600, 1j, b"bytes", (1, 2), {1, 2}, itself, Code(), {1: 2, None: 3}, torch.Size([1]), torch.float32)
    changed = tree_changed(value, draw, (*tensors, *others, _nested(40, 2), _nested(200, 1)))
    file = io.BytesIO()
    torch.save(changed, file)
    return file.getvalue()


def _nested(levels: int, width: int, kind: type = list) -> Any:
    """Each level holds the one below it `width` times."""
    value: Any = kind([0])
    for _ in range(levels):
        value = kind([value] * width)
    return value


def _pickle_changed(data: bytes, draw: Random) -> bytes:
    """One that nests, claims or calls more than it should; or one number or name of the right one is another."""
    hostile = (
        pickle.dumps(Code(), 2),
        pickle.dumps({"state_dict": Code()}, 2),
        pickle.dumps(_nested(60, 2), 2),
        b"\x80\x02}" + pickle.dumps(_nested(60, 2, tuple), 2)[2:-1] + b"K\x01s.",  # as a key: its hash never ends
        b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
        b"\x80\x02)" + b"\x85" * 100_000 + b".",
        b"\x80\x02" + b"}" * 50_000 + b".",
        b"\x80\x02c__builtin__\nbytearray\n" + pickle.dumps((2**33,), 2)[2:-1] + b"R.",
        b"\x80\x02ctorch\nLongTensor\n" + pickle.dumps((2**28,), 2)[2:-1] + b"R.",
        b"\x80\x02\x8b" + (2**31 - 1).to_bytes(4, "little") + b".",
        b"\x80\x02\x8b" + (500_000).to_bytes(4, "little") + b"\x7f" * 500_000 + b".",
        b"\x80\x04\x8d" + (2**62).to_bytes(8, "little") + b"x.",
        b"\x80\x02]r" + (2**32 - 1).to_bytes(4, "little") + b".",
        b"\x80\x02(" * 100_000 + b".",
        b"I" + b"9" * 10_000 + b"\n.",
        b"",
        b".",
    )
    if draw.random() < 0.25:
        return draw.choice(hostile)
    if draw.random() < 0.25:
        return bytes_changed(data, draw)
    steps = list(pickletools.genops(data))
    numbers = [n for n, (step, _, _) in enumerate(steps) if step.name in ("BININT1", "BININT2", "BININT", "LONG1")]
    names = [n for n, (step, _, _) in enumerate(steps) if step.name == "GLOBAL"] * 3  # of which there are few
    places = set(draw.choices(names + numbers, k=draw.choice((1, 1, 3))))
    for at in sorted(places, reverse=True):  # what stands before keeps its place
        start, stop = steps[at][2], steps[at + 1][2]
        if at in names:
            new = f"c{draw.choice(GLOBALS).replace(' ', chr(10))}\n".encode()
        else:
            new = pickle.dumps(draw.choice((*INTEGERS, 10**600, draw.randrange(300))), 2)[2:-1]
        data = data[:start] + new + data[stop:]
    return data


def _repacked(data: bytes, change: Callable[[str, bytes], bytes], packing: int = zipfile.ZIP_STORED) -> bytes:
    """The archive with other contents and right checksums."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(file, "w", packing) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, change(entry.filename, old.read(entry)))
    return file.getvalue()


def _archive_changed(data: bytes, draw: Random) -> bytes:
    """Compressed, without a member, with members of other names, or with shorter and longer ones."""
    with zipfile.ZipFile(io.BytesIO(data)) as old:
        members = [(entry.filename, old.read(entry)) for entry in old.infolist()]
    at = draw.randrange(len(members))
    name, content = members[at]
    packing = zipfile.ZIP_STORED
    match draw.choice(("compress", "remove", "rename", "shorter", "longer", "bomb", "twice")):
        case "compress":
            packing = zipfile.ZIP_DEFLATED
        case "remove":
            del members[at]
        case "rename":
            members[at] = draw.choice(("../outside", "/outside", "", "x/data.pkl", name.upper(), "a" * 60_000)), content
        case "shorter":
            members[at] = name, content[: draw.randrange(len(content) + 1)]
        case "longer":
            members[at] = name, content * draw.choice((2, 100))
        case "bomb":
            packing, members[at] = zipfile.ZIP_DEFLATED, (name, bytes(30_000_000))
        case "twice":
            members.append((f"{name} ", content))
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", packing) as new:
        for name, content in members:
            new.writestr(name or "x", content)
    return file.getvalue()
