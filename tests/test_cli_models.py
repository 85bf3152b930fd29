"""How models come to be on the command line: pull, which one is used then, tokenizer, train."""

from pathlib import Path

import pytest
import tiny_models
from terminal import TEXT, as_json, isolate, run, write_model

from mlx_impl.modeldir import verify_manifest
from mlx_impl.tokenizer import Tokenizer


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


def test_pull_a_folder_then_commands_need_no_model(tmp_path: Path, model: Path) -> None:
    done = run("pull", model, "--quiet")
    pulled = tmp_path / "home" / "models" / "model"
    assert (done.code, done.out, done.err) == (0, f"{pulled} is now the default model\n", "")
    verify_manifest(pulled)
    assert as_json("doctor")["model"] == str(pulled)
    assert as_json("generate", "the", "--max-tokens", "3")["tokens"] == 3


def test_pull_a_gguf(tmp_path: Path) -> None:
    path = tiny_models.write_gguf(tmp_path / "Tiny.gguf")
    assert as_json("pull", path) == {"model": str(tmp_path / "home" / "models" / "tiny")}
    assert as_json("generate", "the 123", "--max-tokens", "2", "--domain", "none")["domain"] is None


def test_which_model_is_used(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("list").err == "error: no model yet: run `minimac-mlx pull`, or name one with --model\n"
    as_json("pull", model)
    other = write_model(tmp_path / "other", d_model=48)
    monkeypatch.setenv("MINIMAC_MODEL", str(other))
    assert as_json("doctor")["model"] == str(other)
    assert as_json("doctor", "--model", model)["model"] == str(model)
    monkeypatch.setenv("MINIMAC_MODEL", str(tmp_path / "gone"))
    done = run("generate", "x")
    assert (done.code, done.out) == (2, "")
    assert "MINIMAC_MODEL names it" in done.err


def test_tokenizer(tmp_path: Path, text: Path) -> None:
    out = tmp_path / "tok"
    arguments = ("tokenizer", text, "--out", out, "--vocab-size", "350", "--special-token", "<|user|>")
    assert as_json(*arguments) == {"tokenizer": str(out), "vocab_size": 350}
    loaded = Tokenizer.load(out)
    assert loaded.decode(loaded.encode(TEXT)) == TEXT
    assert len(loaded.special_ids) == 5
    again = run(*arguments)
    assert (again.code, again.err) == (2, f"error: {out} exists already; name another folder or remove it first\n")


def test_what_is_passed_over_in_a_folder_is_told(tmp_path: Path, text: Path) -> None:
    folder = tmp_path / "papers"
    folder.mkdir()
    (folder / "a.txt").write_bytes(text.read_bytes())
    (folder / "photo.png").write_bytes(b"\x89PNG")
    (folder / "torn.pdf").write_bytes(b"%PDF-1.4")
    told = f"passed over {folder / 'torn.pdf'} (not a readable PDF"
    done = run("tokenizer", folder, "--out", tmp_path / "tok", "--vocab-size", "350")
    assert done.err.startswith(told)
    assert done.err.endswith(f", {folder / 'photo.png'} (unknown extension '.png')\n")
    common = ("train", text, "--steps", "1", "--config", "tiny", "--seq-len", "32", "--tokenizer", tmp_path / "tok")
    assert told in run(*common, folder, "--out", tmp_path / "one").err
    assert told in run(*common, "--eval-data", folder, "--out", tmp_path / "two").err
    assert run(*common, folder, "--out", tmp_path / "three", "--quiet").err == ""


def test_train_resume_and_use(tmp_path: Path, text: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("model: {preset: tiny, d_model: 32, num_layers: 1, d_ff: 48}\ntrain: {lr: 3e-4, grad_accum: 1}\n")
    out = tmp_path / "trained"
    record = as_json(
        *("train", text, "--out", out, "--config", config, "--vocab-size", "350"),
        *("--steps", "2", "--batch-size", "2", "--seq-len", "32"),
    )
    assert (record["model"], record["step"], record["tokens"]) == (str(out), 2, 128)
    verify_manifest(out)
    done = run("train", "--out", out, "--resume", "--steps", "3", "--quiet")
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith(f"{out}: 3 steps, 192 tokens in ")
    assert (out / "loss.png").stat().st_size > 1000
    assert as_json("generate", "-m", out, "the", "--max-tokens", "2", "--temperature", "0")["tokens"] == 2
