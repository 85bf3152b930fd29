"""What tests of lessons share: English text, a tiny model directory, and a learner opened on it with small settings."""

import dataclasses
from pathlib import Path
from pydoc_data import topics
from typing import Any

import numpy as np

from mlx_impl.config import ContinualLearningConfig, ModelConfig
from mlx_impl.learner import ContinualLearner
from mlx_impl.modeldir import expected_shapes, write_model_directory
from mlx_impl.tokenizer import Tokenizer

TEXT = "\n\n".join(topics.topics[name] for name in sorted(topics.topics))
SETTINGS = ContinualLearningConfig(seq_len=32, batch_size=2)


def text(number: int, characters: int = 1200) -> str:
    """A piece of English, another one for each number."""
    return TEXT[number * 10_000 : number * 10_000 + characters]


def tiny_tokenizer() -> Tokenizer:
    return Tokenizer.train([TEXT[:60_000]], 400)


def tiny_base(folder: Path, tokenizer: Tokenizer) -> Path:
    """A model directory in `folder`: two layers, 32 wide."""
    tokenizer.save(folder / "tokenizer")
    config = ModelConfig(
        tokenizer.vocab_size, 32, 2, 4, 2, 48, 128, eos_token_id=tokenizer.eos_id, bos_token_id=tokenizer.bos_id
    )
    rng = np.random.default_rng(3)
    arrays = {
        name: np.ones(shape, np.float32)
        if len(shape) == 1
        else rng.standard_normal(shape, np.float32) / shape[1] ** 0.5
        for name, shape in expected_shapes(config).items()
    }
    contents = {path.name: path.read_bytes() for path in (folder / "tokenizer").iterdir()}
    return write_model_directory(folder / "model", config, arrays, contents, {"eos_token_id": tokenizer.eos_id}, {})


def opened(base: Path, store: Path, **changes: Any) -> ContinualLearner:
    return ContinualLearner.from_checkpoint(base, dataclasses.replace(SETTINGS, **changes), store)
