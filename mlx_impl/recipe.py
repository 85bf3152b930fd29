"""From files and options to a training run: what `minimac-mlx train` does before and around the loop.

Everything that can be wrong with the input is found before the output directory is touched. The request itself is
kept in the directory, so that `--resume` needs nothing but its name.
"""

import contextlib
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import yaml

from mlx_impl import checkpoint, data, files, kernels, modeldir, readers
from mlx_impl.config import PRESETS, ModelConfig, TrainConfig, checked
from mlx_impl.device import dtype_name, memory_bytes, training_dtype, use_device
from mlx_impl.errors import DamagedFileError, InputError
from mlx_impl.memory import pretraining_bytes
from mlx_impl.model import ContinualLLM
from mlx_impl.packing import KEYS
from mlx_impl.plots import plot_losses
from mlx_impl.tokenizer import Tokenizer
from mlx_impl.train import Progress, Trainer
from mlx_impl.windows import Batches, Windows

Event = dict[str, Any]
SAMPLE_BYTES = 100_000_000
"""Text that a new tokenizer is trained on, at most: more changes the merges little and costs memory."""

HELD_OUT_SHARE = 0.02
CACHED_TEXTS = 4
"""Tokenised texts that are kept for other runs on them."""

REQUEST = "run.json"
LENGTHS = ("epochs", "steps", "minutes")
"""Settings of which one says how long a run is."""
FROM_TOKENIZER = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")
"""Fields of a model's configuration that a new model has from its tokenizer."""


@dataclass(frozen=True)
class Request:
    """What was asked for."""

    paths: tuple[Path, ...]
    out: Path
    train: TrainConfig = TrainConfig()
    model: ModelConfig = PRESETS["medium"]
    init: Path | None = None
    tokenizer: Path | None = None
    vocab_size: int = 8000
    eval_data: Path | None = None
    cache: Path | None = None
    """Where tokenised texts are kept; default MINIMAC_HOME/cache/tokens."""


def run(
    paths: Sequence[Path],
    out: Path,
    *,
    config: str | None,
    init: Path | None,
    tokenizer: Path | None,
    vocab_size: int,
    eval_data: Path | None,
    resuming: bool,
    options: dict[str, Any],
    report: Callable[[Event], None],
) -> Progress:
    """What `minimac-mlx train` does: start a run, or resume the one in `out`. `options` are fields of TrainConfig."""
    _one_length(options, "train")
    if resuming:
        other = {"PATH": paths, "--config": config, "--init": init, "--tokenizer": tokenizer, "--eval-data": eval_data}
        if named := [name for name, value in other.items() if value]:
            raise InputError(f"--resume goes on with the same data and model; leave out {', '.join(named)}")
        return resume(out, options, report)
    if not paths:
        raise InputError("nothing to train on: name files or folders")
    if config and init:
        raise InputError("--config and --init exclude each other: the model in --init has its configuration")
    model, settings = read_config(config) if config else (PRESETS["medium"], {})
    train = TrainConfig(**_longer(settings, options))
    return start(Request(tuple(paths), out, train, model, init, tokenizer, vocab_size, eval_data), report)


def read_config(name: str) -> tuple[ModelConfig, dict[str, Any]]:
    """A preset by its name, or a YAML file: `model` (with `preset` or every field of its own) and `train`.

    Returns the model's configuration and the training options in the file. Unknown keys are an InputError.
    """
    if name in PRESETS:
        return PRESETS[name], {}
    path = Path(name)
    if not path.is_file():
        raise InputError(f"--config {name}: no preset ({', '.join(PRESETS)}) and no file")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # not UTF-8, or a date that no calendar has
        raise InputError(f"{path}: no valid YAML: {' '.join(str(error).split())}") from None
    if isinstance(content, dict):
        content = {key: {} if value is None else value for key, value in content.items()}
    if not isinstance(content, dict) or not all(isinstance(v, dict) for v in content.values()):
        raise InputError(f"{path}: the mappings `model:` and `train:` were expected")
    unknown = sorted(set(content) - {"model", "train"})
    if unknown:
        raise InputError(f"{path}: {', '.join(map(str, unknown))} (unknown); known keys are model, train")
    model = dict(content.get("model", {}))
    preset = model.pop("preset", "medium")
    if not isinstance(preset, str) or preset not in PRESETS:
        raise InputError(f"{path}: preset {preset!r} is unknown; there are {', '.join(PRESETS)}")
    if named := [name for name in FROM_TOKENIZER if name in model]:
        raise InputError(f"{path}: {', '.join(named)} come from the tokenizer; see --vocab-size and --tokenizer")
    derived = {"head_dim": None} if {"d_model", "num_query_heads"} & set(model) else {}
    shape = checked(ModelConfig, {**derived, **model}, f"{path}, model", PRESETS[preset])
    train = checked(TrainConfig, content.get("train", {}), f"{path}, train")
    _one_length(content.get("train", {}), f"{path}, train")
    return shape, {name: getattr(train, name) for name in content.get("train", {})}


def _longer(settings: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Settings with changes; a length that is given takes the place of the one before, whatever it was given in."""
    dropped = LENGTHS if any(changes.get(name) is not None for name in LENGTHS) else ()
    return {**{name: value for name, value in settings.items() if name not in dropped}, **changes}


def _one_length(given: dict[str, Any], where: str) -> None:
    """InputError where a run's length is given twice."""
    named = [name for name in LENGTHS if given.get(name) is not None]
    if len(named) > 1:
        raise InputError(f"{where}: {' and '.join(named)} exclude each other; each says how long the run is")


def start(request: Request, report: Callable[[Event], None]) -> Progress:
    """Prepare and run a new training. The output directory must be new or empty."""
    refuse(request.out)
    readers.find_files([*request.paths, *([request.eval_data] if request.eval_data else [])])
    tokenizer = _tokenizer(request, report)
    if request.init is not None:
        _check_init(request.init)
    train, heldout = _data(request, tokenizer, report)
    model = _model(request, tokenizer)
    batches = _batches(request.train, model.config, train)
    existed = request.out.is_dir()
    request.out.mkdir(parents=True, exist_ok=True)
    with files.locked(request.out / ".lock", str(request.out)):
        refuse(request.out)  # again: reading the text took its time, and somebody else may have been quicker
        try:
            checkpoint.begin(request.out, model.config, tokenizer, request.init)
            (request.out / "trainer").mkdir()
            trainer = _trainer(request, model, batches, heldout, report)
            report(forecast(trainer, len(train)))
            trainer.start()
            files.write_json(request.out / "trainer" / REQUEST, _as_json(request))  # from here on it can be resumed
        except BaseException:  # nothing can be resumed yet, so nothing is to be left
            for path in request.out.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            if not existed:
                request.out.rmdir()
            raise
        return _run(trainer)


def resume(out: Path, changes: dict[str, Any], report: Callable[[Event], None]) -> Progress:
    """Go on with the run in `out`; `changes` replaces fields of its training configuration (its length)."""
    if not (out / "trainer" / REQUEST).is_file():
        raise InputError(f"{out}: no training to resume there")
    with files.locked(out / ".lock", str(out)):
        _refuse_lessons(out)
        for folder in (out, out / "trainer"):
            files.sweep(folder)
        request = _from_json(files.read_json(out / "trainer" / REQUEST), out)
        request = replace(request, train=TrainConfig(**_longer(asdict(request.train), changes)))
        tokenizer = Tokenizer.load(out)
        train, heldout = _data(request, tokenizer, report)
        config = ModelConfig.from_hf(files.read_json(out / modeldir.CONFIG), str(out / modeldir.CONFIG))
        model = ContinualLLM(config, request.train.seed)
        trainer = _trainer(request, model, _batches(request.train, config, train), heldout, report)
        trainer.resume()
        files.write_json(out / "trainer" / REQUEST, _as_json(request))  # its length may be another one now
        report(forecast(trainer, len(train)))
        return _run(trainer)


def _run(trainer: Trainer) -> Progress:
    """Train, and draw the losses however that ends; that the picture cannot be written is no reason to fail."""
    use_device("default")
    try:
        return trainer.run()
    finally:
        with contextlib.suppress(OSError):
            plot_losses(checkpoint.read_metrics(trainer.metrics), trainer.directory / modeldir.LOSS_PLOT)


def _refuse_lessons(out: Path) -> None:
    if (out / "learner" / "learner.sqlite").exists():
        raise InputError(f"{out} holds lessons, which belong to its weights; train into another directory")


def refuse(out: Path) -> None:
    """InputError for an output directory that a new run must not write to."""
    _refuse_lessons(out)
    if (out / "trainer" / REQUEST).is_file():
        raise InputError(f"{out} holds a training run; go on with --resume or name another directory")
    if (out / "trainer").is_dir():
        raise InputError(f"{out} holds a training run that was cut off before its first step; remove it")
    if out.is_file() or (out.is_dir() and any(path.name not in (".lock", ".DS_Store") for path in out.iterdir())):
        raise InputError(f"{out} exists already; name another directory or remove it first")


def forecast(trainer: Trainer, tokens: int) -> Event:
    """What the run, or the rest of it, will cost: bytes, and seconds from two short measurements of this machine."""
    config, model = trainer.config, trainer.model.config
    batches = trainer.batches
    rows, length = batches.rows, batches.windows.seq_len
    per_step = rows * length * config.grad_accum
    parameters = model.num_parameters()
    per = predicted_step_seconds(model, per_step, length)
    return {
        "event": "plan",
        "parameters": parameters,
        "tokens": tokens,
        "tokens_per_parameter": tokens / parameters,
        "steps": None if config.minutes is not None else trainer.total,
        "tokens_per_step": per_step,
        "predicted_memory": pretraining_bytes(model, rows, length, config.grad_accum > 1, config.recompute),
        "predicted_seconds": max(0.0, _seconds_left(trainer, per)),
        "dtype": dtype_name(trainer.dtype),
    }


def _seconds_left(trainer: Trainer, per_step: float) -> float:
    """Of the clock, where it ends the run, or of the steps that are left."""
    if trainer.config.minutes is not None:
        return 60 * trainer.config.minutes - trainer.progress.seconds
    return (trainer.total - trainer.progress.step) * per_step


def predicted_step_seconds(config: ModelConfig, tokens: int, length: int) -> float:
    """Seconds of one optimizer step: multiplications, exponentials (which MLX's CPU backend is slow at), AdamW.

    6 floating-point operations a token for each weight that multiplies (Kaplan et al. 2020); the time of two
    exponentials, forward and backward, for each logit, attention score and SwiGLU unit; for each weight's update about
    that of one.
    """
    unused = 0 if config.tie_embeddings else config.vocab_size * config.d_model
    products = 6 * tokens * (config.num_parameters() - unused)
    layer = config.num_query_heads * length + config.d_ff
    exponentials = 2 * tokens * (config.vocab_size + config.num_layers * layer) + config.num_parameters()
    a = mx.random.normal((512, 512), key=mx.random.key(0))
    return products / _rate(lambda: a @ a, 2 * 512**3) + exponentials / _rate(lambda: kernels.exp(a), a.size)


def _rate(compute: Callable[[], mx.array], work: int) -> float:
    """Work a second of a computation, measured over about a twentieth of a second."""
    mx.eval(compute())
    started, done = time.perf_counter(), 0
    while time.perf_counter() - started < 0.05:
        mx.eval(compute())
        done += work
    return done / (time.perf_counter() - started)


def _tokenizer(request: Request, report: Callable[[Event], None]) -> Tokenizer:
    folder = request.tokenizer or request.init
    if folder is not None:
        return Tokenizer.load(folder)
    report({"event": "note", "text": f"training a tokenizer of {request.vocab_size:,} tokens on the text"})

    def sample() -> Any:
        left = SAMPLE_BYTES
        for document in readers.read_documents(request.paths):
            if left <= 0:
                return
            left -= len(document.text.encode())
            yield document.text

    return Tokenizer.train(sample(), request.vocab_size)


def _data(
    request: Request, tokenizer: Tokenizer, report: Callable[[Event], None]
) -> tuple[data.TokenFile, data.Tokens | None]:
    """Training and held-out tokens. Without --eval-data the end of the text is held out."""
    cache = request.cache or files.home() / "cache" / "tokens"
    cache.mkdir(parents=True, exist_ok=True)
    files.sweep(cache)
    for old in sorted(cache.glob("tokens-*"), key=lambda path: path.stat().st_mtime)[:-CACHED_TEXTS]:
        shutil.rmtree(old, ignore_errors=True)

    def progress(done: int, total: int) -> None:
        report({"event": "tokenizing", "done": done, "total": total})

    loss_on, most = request.train.loss_on, request.train.eval_tokens
    skipped = readers.PassedOver()
    everything = data.tokenize_files(request.paths, tokenizer, cache, loss_on, progress, skipped)
    other = None
    if request.eval_data is not None:
        other = data.tokenize_files([request.eval_data], tokenizer, cache, loss_on, skipped=skipped)
    if skipped.files:
        report({"event": "note", "text": str(skipped)})
    if other is not None:
        named = _stretch(other, 0, min(most, len(other)))
        if not data.teaches(named):
            raise InputError(f"--eval-data {request.eval_data}: none of its first {len(named):,} tokens counts")
        return everything, named
    length = min(int(HELD_OUT_SHARE * len(everything)), most)
    if length < 64:
        report({"event": "note", "text": "the text is too short to hold a part out; name one with --eval-data"})
        return everything, None
    kept = len(everything) - length
    end = _stretch(everything, kept, len(everything))
    if not data.teaches(end):
        report({"event": "note", "text": f"nothing of the text's end counts for --loss-on {loss_on}; name --eval-data"})
        return everything, None
    return everything.head(kept), end


def _stretch(tokens: data.TokenFile, start: int, stop: int) -> data.Tokens:
    """Some tokens of a stream, in memory."""
    ids, trained = tokens.span(start, stop)
    return data.Tokens(ids, trained if tokens.masked else None, tokens.n_documents, tokens.n_bytes)


def _check_init(folder: Path) -> None:
    """InputError for a base that lessons can be taught on but whose own weights cannot be trained here."""
    config = files.read_json(folder / modeldir.CONFIG)
    kind = config.get("model_type", "llama")
    if kind != "llama":
        raise InputError(f"--init {folder}: model_type is {kind!r:.60}; train is for llama, learn for others")
    if any(config.get(key) for key in KEYS):
        raise InputError(f"--init {folder}: its weights are quantised and cannot be trained; learn teaches it as it is")


def _model(request: Request, tokenizer: Tokenizer) -> ContinualLLM:
    if request.init is not None:
        model = ContinualLLM.from_checkpoint(request.init)
        tokenizer.check_fits(model.vocab_size)
        _require_memory(model.config, "--init")
        return model
    config = replace(
        request.model,
        vocab_size=tokenizer.vocab_size,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
        pad_token_id=tokenizer.pad_id,
    )
    _require_memory(config, "--config")
    return ContinualLLM(config, request.train.seed)


def _require_memory(config: ModelConfig, flag: str) -> None:
    """InputError where not even weights, moments, gradients and their successors fit."""
    needed, there = pretraining_bytes(config, 0, 0, False, False), memory_bytes()
    if needed > there:
        raise InputError(
            f"training {config.num_parameters():,} parameters takes at least {needed / 1e9:,.1f} GB, "
            f"this machine has {there / 1e9:,.1f}; choose a smaller {flag}"
        )


def _batches(config: TrainConfig, model: ModelConfig, tokens: data.TokenFile) -> Batches:
    length = config.seq_len or min(model.max_seq_len, 512)
    if length > model.max_seq_len:
        raise InputError(f"--seq-len {length} is longer than the model's context of {model.max_seq_len} tokens")
    return Batches(Windows(tokens, length), config.batch_size, config.seed)


def _trainer(
    request: Request,
    model: ContinualLLM,
    batches: Batches,
    heldout: data.Tokens | None,
    report: Callable[[Event], None],
) -> Trainer:
    about = {"init": str(request.init) if request.init else None, "data": batches.windows.tokens.digest}
    return Trainer(request.out, model, request.train, batches, heldout, report, training_dtype(), about)


def _as_json(request: Request) -> dict[str, Any]:
    evaluation = str(request.eval_data.resolve()) if request.eval_data else None
    paths = [str(path.resolve()) for path in request.paths]
    return {"paths": paths, "eval_data": evaluation, "train": asdict(request.train)}


def _from_json(saved: dict[str, Any], out: Path) -> Request:
    path = out / "trainer" / REQUEST
    try:
        evaluation = Path(saved["eval_data"]) if saved["eval_data"] else None
        train = checked(TrainConfig, saved["train"], str(path))
        return Request(tuple(Path(p) for p in saved["paths"]), out, train, eval_data=evaluation)
    except (KeyError, TypeError, AttributeError) as error:
        raise DamagedFileError(f"{path}: not the request of a training run ({error!r})") from None
