"""What we write as GGUF, run by llama.cpp itself: models, adapters and tokenizers.

llama.cpp multiplies F16 and Q8_0 weights by activations that it rounds alike, so that its log-probabilities are near
ours and not the same; the bounds are some times what was seen.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from comparing import weights
from terminal import TEXT, isolate, run, write_model

from benchmarks import llamacpp
from mlx_impl import modeldir
from mlx_impl.config import Budget, ModelConfig
from mlx_impl.conversion import convert
from mlx_impl.learner import ContinualLearner
from mlx_impl.model import ContinualLLM
from mlx_impl.tokenizer import Tokenizer

pytest.importorskip("xllamacpp", reason="the wheel xllamacpp, which carries llama.cpp, is not there")

WORDS = "The class of  numbers\nyields 42 lambdas, naïve ones too: x's \U0001f600."


def byte_level(folder: Path, **changes: Any) -> Path:
    """A model directory with the tiny byte-level tokenizer and unit-size logits; the rows fit Q8_0's blocks."""
    shape = {"d_model": 64, "num_layers": 2, "num_query_heads": 4, "num_kv_heads": 2, "d_ff": 96, "max_seq_len": 128}
    config = ModelConfig(**{"vocab_size": 280, "bos_token_id": 1, "eos_token_id": 2, **shape, **changes})
    tokens = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    files = {"tokenizer.json": tiny_models.tokenizer_json(), "tokenizer_config.json": json.dumps(tokens)}
    return modeldir.write_model_directory(folder, config, weights(config), files, {}, {})


def prefixes(ids: list[int]) -> list[list[int]]:
    return [ids[:length] for length in range(3, len(ids), 4)]


@pytest.mark.parametrize(("to", "bound"), [("gguf-f16", 0.01), ("gguf-q8_0", 0.1)])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_embeddings": False, "attention_bias": True, "num_kv_heads": 1},
        {"rope_base": 500000.0, "rope_scaling": {
            "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192}},
    ],
    ids=["tied", "untied, biases", "llama3"],
)  # fmt: skip
def test_a_model_says_there_what_it_says_here(tmp_path: Path, to: str, bound: float, changes: dict[str, Any]) -> None:
    """Ours has the weights as the file rounds them."""
    convert(byte_level(tmp_path / "model", **changes), tmp_path / "m.gguf", to)
    convert(tmp_path / "m.gguf", tmp_path / "back")
    prompts = prefixes(Tokenizer.load(tmp_path / "back").encode(WORDS))
    found = llamacpp.answers(tmp_path / "m.gguf", prompts)
    assert sum(len(answer["likeliest"]) for answer in found) > 3 * len(prompts)
    assert llamacpp.largest_difference(ContinualLLM.from_checkpoint(tmp_path / "back"), prompts, found) < bound


@pytest.mark.parametrize("kind", ["byte-level", "ours", "SentencePiece"])
def test_a_text_has_the_same_tokens_there(tmp_path: Path, kind: str) -> None:
    if kind == "byte-level":
        base = byte_level(tmp_path / "model", max_seq_len=512)
    elif kind == "ours":
        base = write_model(tmp_path / "model", max_seq_len=512)
    else:
        base = tiny_models.write_hf(tmp_path / "model", tiny_models.weights(vocab=420), max_position_embeddings=512)
        (base / "tokenizer.json").unlink()
        (base / "tokenizer.model").write_bytes(tiny_models.sentencepiece_model())
    convert(base, tmp_path / "m.gguf")
    tokenizer = Tokenizer.load(base)
    for words in (WORDS, TEXT[:400], " two  spaces "):
        ids = tokenizer.encode(words)
        ids = [tokenizer.bos_id, *ids] if tokenizer.adds_bos and tokenizer.bos_id is not None else ids
        text, tokens = llamacpp.answers(tmp_path / "m.gguf", [words, ids], 4)
        assert text == tokens


def test_an_adapter_says_there_what_it_says_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside its base, and as one model with it."""
    isolate(monkeypatch, tmp_path / "home")
    base = byte_level(tmp_path / "model")
    learner = ContinualLearner.from_checkpoint(base)
    prompts = prefixes(learner.tokenizer.encode(WORDS))
    learner.learn_from_text(TEXT[:3000], budget=Budget(steps=12))
    for arguments in (("adapter", "--to", "gguf"), ("fused", "--fuse")):
        assert (done := run("export", "main", tmp_path / arguments[0], *arguments[1:], "-m", base)).code == 0, done.err
    convert(base, tmp_path / "base.gguf")
    convert(tmp_path / "fused", tmp_path / "fused.gguf")
    learner.set_adapter("main")

    def far(model: str, adapter: Path | None = None) -> float:
        return llamacpp.largest_difference(
            learner.model, prompts, llamacpp.answers(tmp_path / model, prompts, adapter=adapter)
        )

    assert far("base.gguf") > 0.5
    assert far("base.gguf", tmp_path / "adapter" / "adapter.gguf") < 0.01
    assert far("fused.gguf") < 0.01
