"""Readers, every kind of bad input, and the division into training and held-out text.

Real text and code come from CPython itself. A PDF is written by hand, so that its bytes hide nothing.
"""

import json
import os
import re
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from pydoc_data import topics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_impl import readers
from mlx_impl.errors import DamagedFileError, InputError, MiniMacError
from mlx_impl.holdout import FEW_DOCUMENTS, SAMPLED_BLOCK, estimated_tokens, sample_documents, split_holdout
from mlx_impl.readers import Document, Exchange, pieces, read_documents, text_document

ENGLISH = [topics.topics[name] for name in sorted(topics.topics)]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def pdf(pages: list[str]) -> bytes:
    """A PDF with one line of text on each page."""
    kids = " ".join(f"{3 + 2 * i} 0 R" for i in range(len(pages)))
    objects = ["<</Type/Catalog/Pages 2 0 R>>", f"<</Type/Pages/Kids[{kids}]/Count {len(pages)}>>"]
    for i, text in enumerate(pages):
        font = "<</F1<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>>>"
        objects.append(
            f"<</Type/Page/Parent 2 0 R/MediaBox[0 0 612 792]/Contents {4 + 2 * i} 0 R/Resources<</Font{font}>>>>"
        )
        stream = f"BT /F1 12 Tf 72 700 Td ({text}) Tj ET" if text else ""
        objects.append(f"<</Length {len(stream)}>>stream\n{stream}\nendstream")
    out, offsets = "%PDF-1.4\n", []
    for number, body in enumerate(objects, 1):
        offsets.append(len(out))
        out += f"{number} 0 obj{body}endobj\n"
    table = "".join(f"{offset:010} 00000 n \n" for offset in offsets)
    size = len(objects) + 1
    trailer = f"trailer<</Size {size}/Root 1 0 R>>\nstartxref\n{len(out)}\n%%EOF"
    return f"{out}xref\n0 {size}\n0000000000 65535 f \n{table}{trailer}".encode()


# Text files


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.py", "a.rs", "a", "a.unknown"])
def test_a_named_file_is_read_as_text_whatever_its_name(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, ENGLISH[0])
    assert list(read_documents([path])) == [Document(str(path), ENGLISH[0])]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_byte_order_marks_are_dropped_and_line_ends_kept(tmp_path: Path, encoding: str) -> None:
    text = "Grüße, 世界 😀\r\nzwei\nthree\r"
    (document,) = read_documents([write(tmp_path / "a.txt", text.encode(encoding))])
    assert document.text == text


def test_utf16_big_endian(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", b"\xfe\xff" + "Grüße 😀".encode("utf-16-be"))
    assert [d.text for d in read_documents([path])] == ["Grüße 😀"]


def test_a_long_file_comes_in_pieces_of_one_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "PIECE", 1000)
    monkeypatch.setattr(readers.pieces, "__defaults__", (1000,))
    text = "".join(ENGLISH[:5]) + "é😀" * 3000
    documents = list(read_documents([write(tmp_path / "long.txt", text)]))
    assert len(documents) > 10
    assert "".join(d.text for d in documents) == text
    assert [d.ends for d in documents] == [False] * (len(documents) - 1) + [True]
    assert all(0 < len(d.text) <= 1000 for d in documents)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.text(alphabet="ab \n\r.é\u3000", max_size=40)), st.integers(1, 12))
def test_pieces_are_the_same_text(chunks: list[str], size: int) -> None:
    cut = list(pieces(chunks, size))
    assert "".join(cut) == "".join(chunks)
    assert all(0 < len(piece) <= size for piece in cut)


def test_pieces_are_cut_at_the_best_place() -> None:
    assert list(pieces(["one two.\nthree\n\nfour five"], 20)) == ["one two.\n", "three\n\nfour five"]
    assert list(pieces(["one\ntwo three"], 9)) == ["one\n", "two three"]
    assert list(pieces(["one two three"], 10)) == ["one two", " three"]
    assert list(pieces(["x" * 25], 10)) == ["x" * 10, "x" * 10, "x" * 5]


@pytest.mark.parametrize("line", ["x", "word ", "\n", "    "])
def test_a_huge_line_needs_little_memory(tmp_path: Path, line: str) -> None:
    size = 24 << 20
    path = write(tmp_path / "huge.txt", "start" + line * (size // len(line)))
    tracemalloc.start()
    characters = sum(len(document.text) for document in read_documents([path]))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert characters == path.stat().st_size
    assert peak < size / 2, f"peak {peak:,} bytes for a file of {size:,}"


# Rows


def test_jsonl_rows(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4", "weight": 1}]
    rows = [
        {"text": "plain"},
        {"prompt": "a", "completion": "b", "id": 7},
        {"messages": messages},
        {"text": ""},
    ]
    path = write(tmp_path / "a.jsonl", "\r\n\n".join(json.dumps(row) for row in rows))
    documents = list(read_documents([path]))
    assert [d.name for d in documents] == [f"{path}#1", f"{path}#3", f"{path}#5"]
    assert [d.content for d in documents] == [
        "plain",
        Exchange("a", "b"),
        ({"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}),
    ]
    assert [d.text for d in documents] == ["plain", "ab", "2+2?\n4"]


@pytest.mark.parametrize(
    ("line", "error", "says"),
    [
        ('{"text": "cut', DamagedFileError, "line 2: not JSON"),
        ("[" * 100_000, DamagedFileError, "line 2: not JSON"),
        ("1" * 5000, DamagedFileError, "line 2: not JSON"),
        ('{"texts": "a", "b": 1}', InputError, "line 2: .*this row has keys 'b', 'texts'"),
        ('"text"', InputError, "line 2: .*this row has a str"),
        ("{}", InputError, "line 2: .*this row has a dict"),
        ('{"text": 5}', InputError, "line 2: `text` must be a string, it is a int"),
        ('{"prompt": "a", "completion": null}', InputError, "`completion` must be a string"),
        ('{"prompt": "a"}', InputError, "has keys 'prompt'"),
        ('{"messages": []}', InputError, "at least one message"),
        ('{"messages": [{"role": "user"}]}', InputError, "message 1 needs `role` and `content`"),
        ('{"messages": ["hello"]}', InputError, "message 1 needs"),
        ('{"text": "\\ud800"}', InputError, "#2: half a surrogate pair at character 0"),
    ],
)
def test_a_bad_row_is_named_by_its_line(tmp_path: Path, line: str, error: type[MiniMacError], says: str) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "good"}\n' + line)
    with pytest.raises(error, match=says) as caught:
        list(read_documents([path]))
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_an_endless_row_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "LINE_LIMIT", 1 << 20)
    path = write(tmp_path / "a.jsonl", '{"text": "a"}\n{"text": "' + "x" * (4 << 20))
    with pytest.raises(InputError, match="line 2: longer than 1,048,576 characters"):
        list(read_documents([path]))


# PDF


def test_pdf(tmp_path: Path) -> None:
    path = write(tmp_path / "a.PDF", pdf(["The first page.", "The second page."]))
    assert list(read_documents([path])) == [Document(str(path), "The first page.\n\nThe second page.")]


def test_bad_pdfs(tmp_path: Path) -> None:
    import pypdf

    whole = pdf(["The first page."])
    for content in (b"", b"no PDF at all", whole[:40], b"%PDF-1.4\n" + bytes(range(256)) * 4):
        with pytest.raises(DamagedFileError, match="not a readable PDF") as caught:
            list(read_documents([write(tmp_path / "broken.pdf", content)]))
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="no text on its 2 pages"):
        list(read_documents([write(tmp_path / "scanned.pdf", pdf(["", ""]))]))
    writer = pypdf.PdfWriter(clone_from=write(tmp_path / "open.pdf", whole))
    writer.encrypt("secret", algorithm="RC4-128")
    writer.write(tmp_path / "locked.pdf")
    with pytest.raises(InputError, match="encrypted"):
        list(read_documents([tmp_path / "locked.pdf"]))


# Bad input


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "empty"),
        (b"\xef\xbb\xbf", "empty"),
        (b" \n\n", "empty"),
        (b"text\0more", r"binary, not text \(a NUL at byte 4\)"),
        (b"\x89PNG\r\n\x1a\n\0\0", "binary"),
        ("caf\xe9".encode("latin-1"), "not UTF-8 at byte 3; convert"),
        (b"\xef\xbb\xbfab\xff", "not UTF-8 at byte 5"),
        (b"x" * (readers.PIECE - 1) + "é".encode() + b"\xe9 ", "not UTF-8 at byte 1,048,577"),
        (b"x" * (readers.PIECE - 1) + b"\xc3", "not UTF-8 at byte 1,048,575"),
        (b"\xff\xfea\0\0\xd8b\0", "not UTF-16-LE at byte 4"),
        (b"\xff\xfe\0\0a\0\0\0", "binary"),
    ],
)
def test_what_is_no_text_is_refused_in_one_line(tmp_path: Path, content: bytes, says: str) -> None:
    path = write(tmp_path / "a.txt", content)
    with pytest.raises(InputError, match=says) as caught:
        list(read_documents([path]))
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_missing_and_irregular_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="no such file or folder"):
        list(read_documents([tmp_path / "missing.txt"]))
    with pytest.raises(InputError, match="`learn --text` takes a text itself") as caught:
        list(read_documents([Path("a whole text\n" * 100)]))
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="not a regular file; use -"):
        list(read_documents([Path(os.devnull)]))
    with pytest.raises(InputError, match="no path given"):
        list(read_documents([]))
    path = write(tmp_path / "a.txt", "text")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(InputError, match="no permission"):
        list(read_documents([path]))


def test_text_document() -> None:
    assert text_document("\ufeffhello", "stdin") == Document("stdin", "hello")
    for text, says in [(" \n", "empty"), ("a\0", "NUL at character 1"), ("ab\udce9", "half a surrogate")]:
        with pytest.raises(InputError, match=f"stdin: .*{says}"):
            text_document(text, "stdin")


# Folders


def test_folders_are_walked_in_order_and_say_what_they_skip(tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    (folder / "b" / "deep").mkdir(parents=True)
    (folder / ".git").mkdir()
    write(folder / ".git" / "config.txt", "hidden")
    write(folder / ".hidden.txt", "hidden")
    write(folder / "c.txt", "third")
    write(folder / "a.MD", "second")
    write(folder / "b" / "deep" / "z.py", "print()")
    write(folder / "b" / "rows.jsonl", '{"text": "row"}\n')
    write(folder / "b" / "page.pdf", pdf(["Page."]))
    write(folder / "b" / "__init__.py", "")
    write(folder / "b" / "latin.c", b"/* \xe9 */")
    write(folder / "b" / "scan.pdf", pdf([""]))
    write(folder / "b" / "torn.pdf", pdf(["Page."])[:40])
    write(folder / "photo.png", b"\x89PNG")
    (folder / "b" / "round").symlink_to(folder, target_is_directory=True)
    (folder / "gone.txt").symlink_to(folder / "nowhere")
    os.mkfifo(folder / "pipe.txt")

    skipped: dict[str, str] = {}
    documents = list(read_documents([folder], lambda path, why: skipped.update({str(path.relative_to(folder)): why})))
    assert [d.text for d in documents] == ["second", "third", "Page.", "row", "print()"]
    assert skipped.keys() == {
        ".git", ".hidden.txt", "b/__init__.py", "b/latin.c", "b/scan.pdf", "b/torn.pdf",
        "photo.png", "gone.txt", "pipe.txt"
    }  # fmt: skip
    assert skipped["b/latin.c"] == "not UTF-8 at byte 3; convert it to UTF-8 first"
    assert skipped["b/torn.pdf"].startswith("not a readable PDF")
    assert skipped["photo.png"] == "unknown extension '.png'"
    assert list(read_documents([folder])) == documents


def test_a_file_that_turns_bad_late_is_skipped_whole(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "word " * (readers.PIECE // 2) + "\0")
    write(tmp_path / "b.txt", "good")
    assert [d.text for d in read_documents([tmp_path])] == ["good"]


def test_folders_with_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no file in this folder is of a kind that is read"):
        list(read_documents([tmp_path]))
    write(tmp_path / "empty.txt", "")
    with pytest.raises(InputError, match="nothing to read"):
        list(read_documents([tmp_path]))
    write(tmp_path / "rows.jsonl", '{"text": broken')
    with pytest.raises(DamagedFileError, match="line 1"):
        list(read_documents([tmp_path]))


def test_the_standard_library_is_read_whole(tmp_path: Path) -> None:
    folder = Path(json.__file__).parent
    documents = list(read_documents([folder]))
    assert {Path(d.name).name for d in documents} >= {"decoder.py", "encoder.py"}
    assert all(Path(d.name).read_text(encoding="utf-8") == d.text for d in documents)


# Held-out text


def words(text: str) -> int:
    return len(text.split())


def tokens(documents: list[Document]) -> int:
    return sum(words(d.text) for d in documents)


def test_many_documents_are_held_out_whole() -> None:
    documents = [Document(str(i), text) for i, text in enumerate(ENGLISH)]
    train, heldout = split_holdout(documents, 0.1, 100_000, words, seed=0)
    names = [d.name for d in train], [d.name for d in heldout]
    assert names[0] == sorted(names[0], key=int)
    assert sorted(names[0] + names[1], key=int) == [d.name for d in documents]
    assert 0.09 < tokens(heldout) / tokens(documents) <= 0.1
    assert all(d in documents for d in train + heldout)


def test_of_few_documents_paragraphs_are_held_out() -> None:
    documents = [Document("a", "\n\n".join(ENGLISH[:30])), Document("b", "\n\n".join(ENGLISH[30:40]))]
    train, heldout = split_holdout(documents, 0.1, 4096, words, seed=1)
    assert [d.name for d in train] == ["a", "b"]
    assert 0.08 * tokens(documents) < tokens(heldout) <= min(4096, 0.1 * tokens(documents))
    whole = "".join(d.text for d in documents)
    assert sorted("".join(d.text for d in train + heldout)) == sorted(whole)
    for document in heldout:
        assert document.text.strip() not in "".join(d.text for d in train)
    capped = split_holdout(documents, 0.5, 300, words, seed=1)[1]
    assert 150 <= tokens(capped) <= 300


@pytest.mark.parametrize(
    "text",
    [
        "\n".join(f"line {i} " + "word " * 9 for i in range(60)),
        " ".join(f"Sentence {i} has these few words." for i in range(200)),
        " ".join(f"word{i}" for i in range(1000)),
    ],
)
def test_a_single_unit_is_cut_where_it_can_be(text: str) -> None:
    train, heldout = split_holdout([Document("a", text)], 0.2, 4096, words, seed=0)
    assert len(train) == len(heldout) == 1
    assert tokens(train) + tokens(heldout) == words(text)
    assert 0.1 * words(text) <= tokens(heldout) <= 0.2 * words(text)


def test_text_without_blanks_is_cut_anywhere() -> None:
    text = "".join(f"{i:05}" for i in range(1000))
    train, heldout = split_holdout([Document("a", text)], 0.1, 4096, len, seed=0)
    assert len(train[0].text) + len(heldout[0].text) == 5000
    assert 250 <= len(heldout[0].text) <= 500


def test_equal_paragraphs_fall_on_the_same_side() -> None:
    paragraphs = [f"Paragraph {i % 20} " + "word " * 60 for i in range(40)]
    for seed in range(5):
        train, heldout = split_holdout([Document("a", "\n\n".join(paragraphs))], 0.3, 4096, words, seed)
        sides = [{part.strip() for part in side[0].text.split("\n\n") if part} for side in (train, heldout)]
        assert len(sides[0]) + len(sides[1]) == 20
        assert not sides[0] & sides[1]


def test_long_documents_are_cut_when_none_of_them_fits() -> None:
    documents = [Document(str(i), "\n\n".join(ENGLISH[i * 10 : i * 10 + 10])) for i in range(12)]
    heldout = split_holdout(documents, 0.1, 500, words, seed=0)[1]
    assert 250 <= tokens(heldout) <= 500


def test_conversations_are_never_cut() -> None:
    chats = [Document(str(i), ({"role": "user", "content": "word " * (40 + i)},)) for i in range(4)]
    train, heldout = split_holdout(chats, 0.1, 4096, words, seed=0)
    assert heldout == chats[:1]
    assert train == chats[1:]
    assert split_holdout(chats[:1], 0.1, 4096, words, seed=0) == (chats[:1], [])


def test_the_seed_decides_and_nothing_else() -> None:
    documents = [Document(str(i), text) for i, text in enumerate(ENGLISH)]
    chosen = [split_holdout(documents, 0.1, 4096, words, seed=seed)[1] for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2]
    backwards = split_holdout(documents[::-1], 0.1, 4096, words, seed=0)[1]
    assert {d.name for d in backwards} == {d.name for d in chosen[0]}


def test_pieces_of_a_long_text_are_one_document() -> None:
    cut = [Document("a", "one two ", ends=False), Document("a", "three"), Document("b", "four")]
    assert split_holdout(cut, 0.0, 10, words, seed=0) == ([Document("a", "one two three"), cut[2]], [])


@pytest.mark.parametrize("fraction", [-0.1, 1.0, float("nan")])
def test_a_share_that_is_none_is_refused(fraction: float) -> None:
    with pytest.raises(InputError, match="--holdout"):
        split_holdout([Document("a", "b")], fraction, 10, words, seed=0)


@settings(deadline=None, max_examples=150)
@given(
    st.lists(st.lists(st.sampled_from([*ENGLISH[:8], "tiny", "x y z"]), min_size=1, max_size=4), max_size=14),
    st.floats(0, 0.9),
    st.integers(0, 2000),
    st.integers(0, 3),
)
def test_holdout_properties(texts: list[list[str]], fraction: float, most: int, seed: int) -> None:
    count: Callable[[str], int] = words
    documents = [Document(str(i), "\n\n".join(parts)) for i, parts in enumerate(texts)]
    train, heldout = split_holdout(documents, fraction, most, count, seed)
    assert tokens(heldout) <= most
    assert bool(train) == bool(documents)
    assert tokens(documents) <= tokens(train) + tokens(heldout) <= 1.1 * tokens(documents) + 1  # words may be cut
    text = [re.sub(r"\s", "", "".join(d.text for d in side)) for side in (train, heldout, documents)]
    assert sorted(text[0] + text[1]) == sorted(text[2])
    if len(documents) >= FEW_DOCUMENTS and heldout and all(d in documents for d in heldout):
        assert not {d.text.strip() for d in train} & {d.text.strip() for d in heldout}


# Samples of a long text


def estimated(documents: list[Document]) -> int:
    return sum(estimated_tokens(document.text) for document in documents)


def test_a_sample_comes_from_all_over_a_text_in_its_order() -> None:
    lines = [f"{number:06} " + "word " * 12 + "\n" for number in range(20_000)]
    cut = ["".join(lines[:9_000]), "".join(lines[9_000:])]
    documents = [Document("a", cut[0], ends=False), Document("a", cut[1])]
    (sample,) = sample_documents(documents, 40_000, seed=0)
    assert 38_000 < estimated([sample]) <= 40_000
    taken = sample.text.splitlines(keepends=True)
    assert set(taken) <= set(lines)  # whole ones
    assert taken == sorted(taken)
    places = [int(line[:6]) // 4_000 for line in taken]
    assert all(100 < places.count(fifth) < 1_000 for fifth in range(5))
    assert [sample] == sample_documents(documents, 40_000, seed=0)
    assert [sample] == sample_documents([Document("a", "".join(lines))], 40_000, seed=0)
    assert [sample] != sample_documents(documents, 40_000, seed=1)


def test_conversations_are_sampled_whole() -> None:
    chats = [Document(str(i), ({"role": "user", "content": "word " * (40 + i)},)) for i in range(200)]
    sample = sample_documents(chats, 3_000, seed=0)
    assert sample == sorted(sample, key=chats.index)
    assert 2_500 < estimated(sample) <= 3_000
    assert len(sample_documents(chats, 1, seed=0)) == 1
    assert sample_documents(chats, 10**6, seed=0) == chats
    assert sample_documents([], 10, seed=0) == []


@settings(deadline=None, max_examples=60)
@given(st.lists(st.sampled_from(["line\n" * 3_000, "x" * 9_000, "a b " * 5_000, "tiny", "🙂" * 5_000]), max_size=6))
def test_all_of_a_text_is_all_of_it(texts: list[str]) -> None:
    documents = [Document(str(i), text) for i, text in enumerate(texts)]
    assert sample_documents(documents, 10**9, seed=0) == documents
    for document in sample_documents(documents, 2_000, seed=0):
        assert len(document.text) <= max(SAMPLED_BLOCK, 4 * 2_000)
