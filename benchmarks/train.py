"""Training: a LoRA on ragged documents beside mlx-lm's trainer, a full step beside torch_ref, and what they need.

Useful tokens are targets that are text. mlx-lm pads the documents of a batch to the longest; we pack them into windows,
as many of them as make the same number of tokens a batch. Both train in one process and take turns, after each shape of
a batch has been compiled: what compiling took is told apart. Each of mlx-lm's turns has short, middling and long ones.

    minimac-mlx bench train [--data DIR]
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import mlx_impl  # noqa: F401  before MLX, for the fast BLAS

# isort: split
import mlx.core as mx
import numpy as np
from mlx.utils import tree_map

from benchmarks import footprint, parts, sides
from benchmarks.harness import OURS, Options, Seconds, alternate, beside, peers, row, timed, version
from benchmarks.texts import Sources, folder_sources, library_sources
from mlx_impl.arrays import flatten
from mlx_impl.config import ContinualLearningConfig
from mlx_impl.data import tokens_of
from mlx_impl.device import can_compile, training_dtype
from mlx_impl.hub import default_model
from mlx_impl.loss import loss_of
from mlx_impl.model import ContinualLLM
from mlx_impl.optim import AdamW, Stepper
from mlx_impl.readers import Document
from mlx_impl.tokenizer import Tokenizer

RAGGED = ("math", "legal")
"""Folders of --data whose documents differ most in length."""

LONGEST = 512
"""Tokens that mlx-lm cuts a document at; hardly any is longer."""

LENGTH = 256
"""Tokens a row of the full step: torch_ref keeps all scores and logits."""


def measure(options: Options) -> dict[str, Any]:
    """All of it; see the rows for what is what."""
    model = options.model or default_model()
    rows: list[dict[str, Any]] = []
    found: dict[str, Any] = {"model": model.name, "peers": peers("mlx-lm", "torch"), "figures": rows}
    for name, documents in ragged(options.data).items():
        options.say(f"LoRA on {name}, beside mlx-lm")
        lora = options.once(f"LoRA on {name}", partial(lora_on, options, model, documents))
        found.setdefault("lora", {})[name] = lora
        gained = lora["useful_tokens_per_second"]["times_better"]["mlx-lm"]["median"]
        rows.append(row(f"LoRA, useful tokens/s on {name}, against mlx-lm", gained, "times", 2.0))
    cases = parts.cases(options, model)
    for case in cases:
        options.say(f"full step of {case.name}, beside torch_ref")
        full = options.once(f"full step of {case.name}", partial(full_step, options, case))
        found.setdefault("full_step", {})[case.name] = full
        for name, ratio in full["seconds"]["times_better"].items():
            rows.append(row(f"full training step, {case.name}, against {name}", ratio["median"], "times", 0.8))
        options.say(f"parts of a step, {case.name}")
        profile = options.once(f"parts, {case.name}", partial(parts.profile, case, options.repetitions))
        found.setdefault("parts", {})[case.name] = profile
        shape = f"{case.rows} x {case.length}"
        reached = profile["share_of_matmul_limit"]["median"]
        rows.append(row(f"share of the matmul limit, forward + backward, {case.name}, {shape}", reached, "share", 0.5))
    options.say(f"parts of a LoRA step, {cases[-1].name}")
    found["lora_parts"] = options.once("parts, LoRA", partial(parts.lora_profile, cases[-1], options.repetitions))
    options.say("peak memory, beside mlx-lm, each in a process of its own")
    found["memory"] = memory = options.once("peaks", partial(footprint.peaks, model, options.quick))
    what = f"peak memory of LoRA training at {memory['windows']}, against mlx-lm"
    rows.append(row(f"{what}: arrays of MLX", memory["mlx_peak"], "times", 0.6, at_most=True))
    rows.append(row(f"{what}: process, beyond the loaded weights", memory["process_growth"], "times"))
    options.say("host memory over many steps")
    found["host_memory"] = flat = options.once("host memory", partial(footprint.flat, options))
    for name, samples in flat.items():
        what = f"host memory after {samples['steps']:,} steps against after {samples['settled']:,}, {name}"
        rows.append(row(what, samples["growth"], "times", 1.02, at_most=True))
    return found


def ragged(data: Path | None) -> Sources:
    """Texts of documents of unlike length: those of a folder, or Python's own reference."""
    if data is None:
        return {"topics": library_sources()["topics"]}
    there = folder_sources(data)
    return {name: there[name] for name in RAGGED if name in there} or there


def lora_on(options: Options, model: Path, documents: list[Document]) -> dict[str, Any]:
    """Useful tokens a second of both sides on one text, at about the same number of tokens a batch."""
    windows, length, block = (1, 32, 64) if options.quick else (2, 256, 2048)
    tokenizer = Tokenizer.load(model)
    config = ContinualLearningConfig(batch_size=windows, seq_len=length)
    end = [tokenizer.eos_id] if tokenizer.eos_id is not None else []
    ids = [tokenizer.encode(document.text)[: LONGEST - 1] + end for document in documents]
    lengths = np.array([len(document) for document in ids])
    rows = max(1, round(windows * length / (lengths.mean() - 1)))
    steps = max(1, round(block / (rows * (lengths.mean() - 1))))  # of mlx-lm in a turn
    every = sides.all_batches(ids, rows, LONGEST)
    turns = sides.spaced_turns(every, steps, options.repetitions)
    batches = [batch for turn in turns for batch in turn]
    first = list({batch.shape: (batch, lengths) for batch, lengths in batches}.values())  # one of each shape

    ours = sides.OurSteps(sides.taught_model(model, config), config, tokens_of(documents, tokenizer))
    mine: list[float] = []

    def turn() -> None:
        seconds, tokens = ours.run(max(1, block // (windows * length)))
        mine.append(tokens / seconds)

    def taking_turns() -> Iterator[sides.Batch]:
        yield from first
        ours.run(1)
        for number in range(options.repetitions):
            if number % 2 == 0:
                turn()
            yield from turns[number]
            if number % 2:
                turn()

    feed = taking_turns()
    taken = sides.train_peer(sides.peer_model(model, config), feed, len(first) + len(batches), 1e-4)
    next(feed, None)  # the turn after the last of theirs
    theirs = []
    for number, part in enumerate(turns):
        start = len(first) + number * steps
        theirs.append(sum(map(sides.useful, part)) / sum(taken[start : start + steps]))
    return {
        "documents": len(ids),
        "tokens_a_document": {"mean": float(lengths.mean()), "standard_deviation": float(lengths.std())},
        "rank": config.lora_r,
        "windows": [windows, length],
        "mlx_lm_rows": rows,
        "mlx_lm_useful_share": {"measured": sides.useful_share(batches), "all": sides.useful_share(every)},
        "mlx_lm_first_steps": {"shapes": len(first), "seconds": sum(taken[: len(first)])},
        "useful_tokens_per_second": beside({OURS: mine, "mlx-lm": theirs}, rates=True),
    }


def full_step(options: Options, case: parts.Case) -> dict[str, Any]:
    """Seconds of an optimizer step over all weights, beside torch_ref from the same weights on the same batch."""
    model, shape = case.model, (case.rows, min(LENGTH, case.length) + 1)
    tokens = np.random.default_rng(0).integers(0, model.vocab_size, shape)
    weights = model.parameters()
    sides: dict[str, Seconds] = {OURS: our_step(model, tokens)}
    failed = {}
    if version("torch"):
        import torch

        for name, place in (("torch_ref", "cpu"), ("torch_ref on MPS", "mps")):
            if place == "cpu" or torch.backends.mps.is_available():
                side = torch_step(model, tokens, place)
                try:
                    side()
                except (RuntimeError, TypeError) as error:  # what MPS cannot do yet is no reason to stop
                    if place == "cpu":
                        raise
                    failed[name] = str(error).splitlines()[0]
                else:
                    sides[name] = side
    values = alternate(sides, options.repetitions)
    model.update(weights)
    return {
        "tokens": model.vocab_size,
        "parameters": model.config.num_parameters(),
        "windows": [shape[0], shape[1] - 1],
        "compiled": can_compile(),
        "seconds": beside(values, rates=False),
        "failed": failed,
    }


def our_step(model: ContinualLLM, tokens: np.ndarray) -> Seconds:
    """An optimizer step over all weights, as pretraining takes it: compiled where that works."""
    parameters = tree_map(lambda p: p.astype(mx.float32), model.parameters())
    stepper = Stepper(parameters, AdamW(1e-4), loss_of(model, training_dtype()), 1.0, can_compile())
    batch = mx.array(tokens.astype(np.int32)), mx.ones((tokens.shape[0], tokens.shape[1] - 1))

    def step() -> None:
        stepper.step([batch], 1e-4)
        mx.eval(stepper.parameters, stepper.optimizer.state)

    return timed(step)


def torch_step(model: ContinualLLM, tokens: np.ndarray, place: str) -> Seconds:
    """The same step by the reference, from the same weights, on a device of PyTorch's."""
    import torch

    from torch_ref.model import ContinualLLM as Reference
    from torch_ref.optim import AdamW as ReferenceAdamW
    from torch_ref.train import train_steps

    reference = Reference(model.config)
    weights = {name: np.array(array.astype(mx.float32)) for name, array in flatten(model.parameters()).items()}
    reference.load_state_dict({name: torch.tensor(array) for name, array in weights.items()})
    reference.to(place)
    settings: dict[str, Any] = {"weight_decay": 0.1, "betas": (0.9, 0.95), "eps": 1e-8}
    optimizer = ReferenceAdamW(list(reference.parameters()), 1e-4, **settings)
    batch = torch.tensor(tokens, device=place), torch.ones(tokens.shape[0], tokens.shape[1] - 1, device=place)

    def step() -> None:
        train_steps(reference, [[batch]], [1e-4], max_grad_norm=1.0, optimizer=optimizer, **settings)
        if place == "mps":
            torch.mps.synchronize()

    return timed(step)
