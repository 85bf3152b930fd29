"""The demonstration: everything once, on text that every Python brings along, with the figures it really got.

It works in a temporary folder, so that nothing is learned into the user's own model; only the base that it pulls
stays.
"""

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from pydoc_data import topics
from typing import Any

from mlx_impl import generate, readers, recipe
from mlx_impl.config import PRESETS, Budget, ContinualLearningConfig, TrainConfig
from mlx_impl.console import Reporter
from mlx_impl.learner import ContinualLearner
from mlx_impl.model import ContinualLLM
from mlx_impl.pull import pull
from mlx_impl.results import lesson_text
from mlx_impl.store import open_store
from mlx_impl.tokenizer import Tokenizer

PROMPT = "The assert statement"
Say = Callable[[str], None]


def demo(seconds: float, model: Path | None, report: Reporter, say: Say = print) -> dict[str, Any]:
    """Pull a base unless `model` is one, train a tiny model, teach the base a file and take it back.

    Returns all figures. Raises InputError for `seconds` that are no positive number, before anything is done.
    """
    Budget(seconds)
    with tempfile.TemporaryDirectory(prefix="minimac-demo-") as folder:
        text = Path(folder) / "python-reference.txt"
        text.write_text("\n\n".join(topics.topics[name] for name in sorted(topics.topics)), encoding="utf-8")
        say("1. A base to start from")
        base = model or pull(progress=report.say)
        say(f"   {base}\n")
        trained = _train(text, Path(folder) / "tiny", seconds, report, say)
        lesson = _learn(base, text, Path(folder) / "lessons", seconds, report, say)
    return {"model": str(base), "train": trained, "learn": lesson}


def _train(text: Path, out: Path, seconds: float, report: Reporter, say: Say) -> dict[str, Any]:
    say(f"2. A tiny model from scratch, {seconds:.0f} seconds on Python's language reference")
    config = TrainConfig(minutes=seconds / 60, batch_size=4, grad_accum=1, seq_len=128, lr=3e-3, warmup=0.05)
    config = replace(config, eval_every=100, eval_tokens=4096, save_every=1000)
    request = recipe.Request((text,), out, config, PRESETS["tiny"], vocab_size=1000, cache=out.parent / "cache")
    progress = recipe.start(request, report)
    model, tokenizer = ContinualLLM.from_checkpoint(out), Tokenizer.load(out)
    untrained = ContinualLLM(model.config)
    sampling = generate.Sampling(temperature=0.0, repetition_penalty=1.3)
    before = generate.complete(untrained, tokenizer, PROMPT, 24, sampling).text
    after = generate.complete(model, tokenizer, PROMPT, 24, sampling).text
    say(f"   {progress.step} steps, {progress.tokens:,} tokens; held-out loss {progress.best_loss:.3f} nats per token")
    say(f"   untrained: {PROMPT}{_line(before)}")
    say(f"   trained:   {PROMPT}{_line(after)}\n")
    return {"steps": progress.step, "tokens": progress.tokens, "heldout_loss": progress.best_loss, "text": after}


def _learn(base: Path, text: Path, store: Path, seconds: float, report: Reporter, say: Say) -> dict[str, Any]:
    say(f"3. Teach {base.name} the same file, {seconds:.0f} seconds")
    learner = ContinualLearner.from_checkpoint(base, ContinualLearningConfig(), store)
    before = learner.generate(PROMPT, 32)
    lesson = learner.learn(list(readers.read_documents([text])), "python", text.name, Budget(seconds), report)
    after = learner.generate(PROMPT, 32)
    record = lesson.as_json()
    say("   " + lesson_text(record).replace("\n", "\n   "))
    say(f"   before: {PROMPT}{_line(before)}")
    say(f"   after:  {PROMPT}{_line(after)}\n")
    say("4. Take it back")
    learner.undo("python")
    learner.set_adapter(None)
    again = learner.generate(PROMPT, 32)
    say(f"   undone: {PROMPT}{_line(again)}")
    say(
        "   the very same answer as before\n"
        if again == before
        else "   NOT the same answer as before: this is a defect\n"
    )
    left = open_store(base, store).domains()
    return {**record, "answer_before": before, "answer_after": after, "answer_undone": again, "domains_left": left}


def _line(text: str) -> str:
    """Text on one line."""
    return " ".join(("x" + text).split())[1:]
