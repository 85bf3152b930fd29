"""What a model is used for on the command line: generate and eval. chat is in test_chat.py."""

import math
from pathlib import Path

import pytest
from terminal import TEXT, as_json, isolate, learned, run, tiny_tokenizer, write_model


@pytest.fixture(autouse=True)
def _isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    isolate(monkeypatch, tmp_path / "home")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "reference.txt"
    path.write_text(TEXT)
    return path


# -- generate ----------------------------------------------------------------------------------------------------


def test_generate_streams_what_json_says(model: Path) -> None:
    arguments = ("generate", "-m", model, "the cat", "--max-tokens", "40", "--seed", "3")
    done, record = run(*arguments), as_json(*arguments)
    assert (done.code, done.err) == (0, "")
    assert done.out == record["text"] + "\n"
    assert record["tokens"] <= 40
    assert record["domain"] is None
    assert record["tokens_per_second"] > 0
    assert record["prompt_tokens_per_second"] > 0
    assert as_json(*arguments[:-1], "4")["text"] != record["text"]
    assert as_json(*arguments)["text"] == record["text"]


def test_generate_reads_stdin_stops_and_chooses_a_domain(model: Path) -> None:
    learned(model, "--lr", "0.05", "--steps", "12")
    common = ("generate", "-m", model, "--temperature", "0", "--max-tokens", "12")
    main, none = as_json(*common, "The key lies"), as_json(*common, "The key lies", "--domain", "none")
    assert (main["domain"], none["domain"]) == ("main", None)
    assert main["text"] != none["text"]
    assert as_json(*common, "-", stdin=b"The key lies")["text"] == main["text"]
    assert as_json(*common, "-", "--domain", "main", stdin=b"The key lies")["text"] == main["text"]
    middle = main["text"][3:5]
    stopped = as_json(*common, "The key lies", "--stop", middle)
    assert (stopped["text"], stopped["finish"]) == (main["text"].partition(middle)[0], "stop")


def test_a_prompt_cache_changes_nothing_but_the_time(model: Path, tmp_path: Path) -> None:
    learned(model, "--domain", "keys")
    kept, common = tmp_path / "kept", ("generate", "-m", model, "--temperature", "0", "--max-tokens", "5")
    for prompt, domain in (("the key", "keys"), ("the key lies", "keys"), ("the key lies", "none")):
        expected = as_json(*common, prompt, "--domain", domain)["text"]
        found = as_json(*common, prompt, "--domain", domain, "--prompt-cache", kept)["text"]
        assert (found, kept.exists()) == (expected, True)
    done = run(*common, "x", "--prompt-cache", kept, "--window", "16")
    assert (done.code, done.out) == (2, "")
    assert "give one of them" in done.err
    kept.write_bytes(b"x" * 100)
    assert run(*common, "x", "--prompt-cache", kept).code == 3
    kept.write_bytes(b"")  # as mktemp leaves it
    assert as_json(*common, "the key", "--domain", "none", "--prompt-cache", kept)["tokens"] == 5
    assert kept.stat().st_size > 0
    done = run(*common, "the key", "--prompt-cache", tmp_path / "nowhere" / "kept")
    assert (done.code, done.out) == (2, "")  # before the answer takes its time
    assert f"there is no folder {tmp_path / 'nowhere'}" in done.err


def test_generate_from_nothing_and_past_the_context(tmp_path: Path) -> None:
    model = write_model(tmp_path / "short", max_seq_len=16)
    greedy = ("generate", "-m", model, "--temperature", "0")
    assert as_json(*greedy, "", "--max-tokens", "2")["tokens"] == 2
    long = run(*greedy, "the cat " * 300, "--max-tokens", "4")
    assert long.code == 0
    assert "4 tokens, the model was trained for 16: what lies beyond gets worse\n" in long.err
    assert run(*greedy, "the cat " * 300, "--max-tokens", "4", "--window", "16", "--quiet").err == ""
    assert run(*greedy, "a", "--max-tokens", "8").err == ""


# -- eval --------------------------------------------------------------------------------------------------------


def test_eval(model: Path, text: Path) -> None:
    record = as_json("eval", "-m", model, text, "--domain", "none")
    assert {"tokens", "loss", "perplexity", "bits_per_byte", "accuracy", "domain"} <= set(record)
    ids = tiny_tokenizer().encode(TEXT)
    assert record["tokens"] == len(ids)  # its end token is predicted, its first token is not
    assert math.isclose(record["perplexity"], math.exp(record["loss"]))
    unseen = len(tiny_tokenizer().token_bytes(ids[0]))
    bits = record["loss"] * record["tokens"] / math.log(2) / (len(TEXT.encode()) - unseen)
    assert math.isclose(record["bits_per_byte"], bits)
    assert 0 <= record["accuracy"] <= 1
    assert record["domain"] is None
    assert as_json("eval", "-m", model, "-", "--domain", "none", stdin=TEXT.encode()) == record
    assert as_json("eval", "-m", model, text) == {**record, "domain": "auto", "domains": {"none": 1}}
    learned(model)
    taught = as_json("eval", "-m", model, text, "--domain", "main")
    assert taught["domain"] == "main"
    assert taught["loss"] != record["loss"]
    assert as_json("eval", "-m", model, text, "--domain", "none") == record
    lines = run("eval", "-m", model, text, "--domain", "none").out.splitlines()
    assert lines[0] == f"domain none, {len(ids):,} tokens"
    assert [line.split("  ")[0] for line in lines[1:5]] == ["loss", "perplexity", "bits per byte", "accuracy"]


def test_eval_stays_within_the_models_context(tmp_path: Path, text: Path) -> None:
    model = write_model(tmp_path / "short", max_seq_len=64)
    assert as_json("eval", "-m", model, text) == as_json("eval", "-m", model, text, "--context", "64")
    done = run("eval", "-m", model, text, "--context", "65")
    assert (done.code, done.out) == (2, "")
    assert done.err == "error: --context 65 is longer than the model's context of 64 tokens\n"
