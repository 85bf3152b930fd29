"""Which learning rate, batch and rank teach most: gains on held-out text after a lesson of a given length.

Every setting trains on the same tokens once, and is measured on training text that no lesson sees, or with --valid on
the validation text. Resumable.

    python -m benchmarks.settings --data DIR [--tokens 8192] [--text medical] [--rows 1,2,4] [--rates 1e-3,2e-3,4e-3]
    python -m benchmarks.settings --data DIR --text medical --tokens 40960 --valid --rows 1 --rates default --plain
"""

import argparse
import dataclasses
import math
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import mlx_impl  # noqa: F401  before MLX, for the fast BLAS

# isort: split
from benchmarks.common import record
from benchmarks.resume import Work, add_common_options, lesson_settings, say
from benchmarks.texts import folder_sources, lesson_texts, library_sources
from mlx_impl.base import BaseModel
from mlx_impl.config import Budget, ContinualLearningConfig
from mlx_impl.data import Tokens, tokens_of
from mlx_impl.evaluate import evaluate
from mlx_impl.hub import default_model
from mlx_impl.learner import ContinualLearner
from mlx_impl.model import ContinualLLM
from mlx_impl.readers import Document
from mlx_impl.tokenizer import Tokenizer
from mlx_impl.windows import Windows, evaluation_windows

MEASURED = 4096

PLAIN = {"lora_r": 8, "lora_alpha": 16.0, "batch_size": 4, "learning_rate": 1e-3}
"""What --plain sets the others beside: an ordinary LoRA, of the same schedule."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is missing and write the gains."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of NAME/train.txt  [default: Python's reference]")
    parser.add_argument("--text", help="which of them  [default: the first]")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens of a lesson  [default: 8192]")
    parser.add_argument("--rows", default="1,2,4", help="windows a step  [default: 1,2,4]")
    parser.add_argument(
        "--rates", default="1e-3,2e-3,4e-3", help="learning rates, numbers or default  [default: 1e-3,2e-3,4e-3]"
    )
    parser.add_argument("--plain", action="store_true", help="beside a LoRA of rank 8, four windows a step, lr 1e-3")
    parser.add_argument("--valid", action="store_true", help="measure on NAME/valid.txt: not for choosing settings")
    parser.add_argument("--name", default="settings", help="results are written under this name")
    add_common_options(parser, "settings", quick=False)
    options = parser.parse_args(arguments)
    if options.valid and options.data is None:
        parser.error("--valid needs --data DIR")
    model = options.model or default_model()
    tokenizer = Tokenizer.load(model)
    sources = library_sources() if options.data is None else folder_sources(options.data)
    name = options.text or next(iter(sources))
    taught, probe = (
        documents for _, documents in lesson_texts({name: sources[name]}, tokenizer, 2, max(options.tokens, MEASURED))
    )
    config = lesson_settings(options.settings, ContinualLearningConfig(seed=options.seed, holdout=0.0))
    if options.valid:
        probe = lesson_texts({name: folder_sources(options.data, "valid.txt")[name]}, tokenizer, 1, MEASURED)[0][1]
    unseen = tokens_of(probe, tokenizer)
    unseen = dataclasses.replace(unseen, ids=unseen.ids[:MEASURED])
    settings = {"model": model.name, "text": tokens_of(taught, tokenizer).digest, "tokens": options.tokens}
    settings["measured"] = unseen.digest
    work = Work(options.work, settings)
    base = work.once("base", lambda: loss(ContinualLLM.from_checkpoint(model), unseen))

    def measured(title: str, **changes: Any) -> dict[str, Any]:
        tried = dataclasses.replace(config, **changes)
        key = repr(sorted(dataclasses.asdict(tried).items()))
        figures = work.once(key, partial(lesson, model, taught, unseen, tried, options.tokens))
        gain = base - figures["loss"]
        say(f"{title}: gains {gain:.4f} nats per token")
        return {"gain": gain, **figures}

    gains = {}
    for rows in options.rows.split(","):
        for rate in options.rates.split(","):
            number = None if rate == "default" else float(rate)
            title = f"{rows} windows, {rate if number is None else f'{number:g}'}"
            gains[title] = measured(title, batch_size=int(rows), learning_rate=number)
    figures = {
        "model": model.name,
        "text": name,
        "tokens": options.tokens,
        "base": base,
        "config": dataclasses.asdict(config),
        "settings": gains,
    }
    if options.plain:
        plain = measured("a plain LoRA", **PLAIN)
        ratios = {title: found["gain"] / plain["gain"] for title, found in gains.items()}
        figures |= {"plain": {"changes": PLAIN, **plain}, "times_plain": ratios}
    record(options.name, figures, module="settings")


def lesson(
    model: Path, documents: list[Document], unseen: Tokens, config: ContinualLearningConfig, tokens: int
) -> dict[str, Any]:
    """Loss on unseen text, steps and seconds of one lesson."""
    with tempfile.TemporaryDirectory() as folder:
        learner = ContinualLearner.from_checkpoint(model, config, folder)
        windows = Windows(tokens_of(documents, learner.tokenizer), config.seq_len)
        wanted = min(len(windows), tokens // config.seq_len)
        budget = Budget(steps=math.ceil(wanted / config.batch_size))
        taught = learner.learn(documents, "main", "tuned", budget)
        after = loss(learner.model, unseen)
    return {"loss": after, "steps": taught.steps, "seconds": taught.training_seconds, "tokens": taught.trained_tokens}


def loss(model: BaseModel, text: Tokens) -> float:
    """Nats per token."""
    return evaluate(model, evaluation_windows(text, 256, 256, 4)).loss


if __name__ == "__main__":
    main()
