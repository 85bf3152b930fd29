"""Invented languages and a tiny base that has read some of each: forgetting in a minute instead of hours.

Every language has words of its own and shares others; which word follows which is fixed for a language, so that a text
in one teaches nothing about the next, and a model that learns one language over another overwrites what they share.
"""

from pathlib import Path
from typing import Any

import numpy as np

from mlx_impl import files
from mlx_impl.recipe import run

NAMES = ("alpha", "beta", "gamma")
SHARED, OWN = 24, 12
FOLLOWERS = 2
SENTENCE = 12
SYLLABLES = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]


def write_texts(folder: Path, seed: int, documents: int = 400) -> Path:
    """NAME/train.txt and NAME/valid.txt of each language, and `general`, in which words follow at random."""
    random = np.random.default_rng(seed)
    words = _words(random, SHARED + OWN * len(NAMES))
    for number, name in enumerate((*NAMES, "general")):
        own = words[SHARED + OWN * number :][:OWN]
        spoken = words if name == "general" else [*words[:SHARED], *own]
        # One column a follower: whole permutations, so that no language has words that are rarer than in another.
        follows = np.stack([random.permutation(len(spoken)) for _ in range(FOLLOWERS)], axis=1)
        for part, count in (("train", documents), ("valid", documents // 8)):
            texts = [_document(spoken, None if name == "general" else follows, random) for _ in range(count)]
            path = folder / name / f"{part}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("\n\n".join(texts) + "\n", "utf-8")
    return folder


def train_base(folder: Path, texts: Path, seed: int) -> Path:
    """A model of 60,000 weights that knows the words of all languages and of none what follows what."""
    if (folder / "config.json").is_file():
        return folder
    shape = {"d_model": 48, "num_layers": 2, "num_query_heads": 4, "num_kv_heads": 2, "d_ff": 96, "max_seq_len": 128}
    folder.parent.mkdir(parents=True, exist_ok=True)
    config = folder.parent / "base.yaml"
    files.write_json(config, {"model": shape})  # JSON is YAML
    options: dict[str, Any] = {
        "steps": 150,
        "batch_size": 16,
        "grad_accum": 1,
        "seq_len": 64,
        "lr": 3e-3,
        "eval_every": 1000,
        "save_every": 1000,
        "seed": seed,
    }
    run(
        [texts / "general" / "train.txt"],
        folder,
        config=str(config),
        init=None,
        tokenizer=None,
        vocab_size=400,
        eval_data=None,
        resuming=False,
        options=options,
        report=lambda event: None,
    )
    return folder


def _words(random: np.random.Generator, count: int) -> list[str]:
    words: list[str] = []
    while len(words) < count:
        word = "".join(random.choice(SYLLABLES, random.integers(2, 4)))
        if word not in words:
            words.append(word)
    return words


def _document(words: list[str], follows: np.ndarray | None, random: np.random.Generator) -> str:
    said = int(random.integers(len(words)))
    sentences = []
    for _ in range(4):
        spoken = []
        for _ in range(SENTENCE):
            said = int(random.integers(len(words)) if follows is None else random.choice(follows[said]))
            spoken.append(words[said])
        sentences.append(" ".join(spoken).capitalize() + ".")
    return " ".join(sentences)
