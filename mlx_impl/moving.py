"""From the original project: its checkpoint folder becomes a model directory with a domain that goes on learning.

Weights, tokenizer, adapter, replay buffer and EWC state come over; what each file held and what became of it is told,
also where that is nothing. All of it is read and checked before anything is written, and the directory appears whole or
not at all. Unusual is the Fisher: the original's has no unit, so each tensor's size is measured here, on the windows
that came with it, and only the pattern within the tensor is the original's.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from convert import adapter as formats
from convert import legacy, original
from convert.model import Model, TokenizerFiles, generation_config
from convert.original import MODELS
from convert.original_tokenizer import FILES, is_tokenizer_folder
from convert.state_dict import from_pt
from mlx_impl import lora, modeldir
from mlx_impl.adapters import write_state
from mlx_impl.arrays import Arrays
from mlx_impl.config import ContinualLearningConfig
from mlx_impl.conversion import load_tokenizer, tokenizer_in
from mlx_impl.data import Tokens
from mlx_impl.errors import InputError, printable
from mlx_impl.files import atomic_folder, read_json, write_json
from mlx_impl.loss import cross_entropy
from mlx_impl.model import ContinualLLM
from mlx_impl.past import measured_fisher
from mlx_impl.replay import ReplayBuffer, Window, unpack
from mlx_impl.router import count_tokens
from mlx_impl.store import open_store
from mlx_impl.versions import Replay, Version, check_domain
from mlx_impl.windows import Batch, Windows

ADAPTER, REPLAY, EWC, TRAINING, SETTINGS = (
    "adapter.pt",
    "replay_buffer.pt",
    "ewc.pt",
    "training_state.pt",
    "config.json",
)
TOKENIZER = "tokenizer"
LONGEST_SOURCE = 200  # characters of a label
SHOWN = 20  # names of a kind that are told
SHIFTED = (
    "the original shifted its labels twice, so what it trained may predict the token after next; "
    "lessons here teach the next one"
)


@dataclass
class _Found:
    """What a folder holds, read and checked; `told` says of each file what it held and what became of it."""

    weights: Path
    model: Model
    tokenizer: TokenizerFiles
    adapter: formats.Adapter | None = None
    experiences: list[original.Experience] = field(default_factory=list)
    consolidation: original.Consolidation | None = None
    told: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def move_over(
    source: Path,
    target: Path,
    domain: str = "main",
    tokenizer: Path | None = None,
    config: Path | None = None,
    dtype: str = "float32",
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Make the model directory `target` of the original's checkpoint folder `source`; returns what `--json` prints.

    Adapter, replay windows and Fisher become the first version of `domain`, from which the next lesson goes on.
    `tokenizer` is a folder with its tokenizer or with one of ours, needed where none lies in `source`, `config` a
    config.json for weights that have none, `dtype` (float32, float16, bfloat16) how weights are stored. Raises
    InputError where `target` is there already or something is missing or of a kind that this model does not have,
    DamagedFileError for files that are not what they claim; nothing is then written.
    """
    check_domain(domain)
    if target.exists():
        raise InputError(f"{target} exists already; name another folder or remove it first")
    found = _read(source, tokenizer, config)
    name = printable(source.resolve().name)
    version = None
    with atomic_folder(target) as made:
        progress(f"writing {found.model.config.num_parameters():,} weights to {target}")
        modeldir.write_model_directory(
            made,
            found.model.config,
            found.model.tensors,
            found.tokenizer,
            generation_config(found.model.config),
            {"original": name},
            dtype,
            replace=True,  # the folder made for it
        )
        if found.adapter is not None:
            version = _commit(found, found.adapter, made, domain, name, progress)
    return {
        "source": str(source),
        "weights": str(found.weights),
        "target": str(target),
        "format": "hf",
        "dtype": dtype,
        "parameters": found.model.config.num_parameters(),
        "domain": domain if version else None,
        "version": version.name if version else None,
        "replay_windows": version.figures["replay_windows"] if version else 0,
        "files": found.told,
        "notes": found.notes or [SHIFTED],
    }


# -- reading ---------------------------------------------------------------------------------------------------------


def _read(source: Path, tokenizer: Path | None, config: Path | None) -> _Found:
    weights = next((source / name for name in MODELS if (source / name).is_file()), None)
    if weights is None:
        raise InputError(f"{source}: no {' or '.join(MODELS)} in it, so no checkpoint folder of the original project")
    model = from_pt(weights, config)
    without = ", its optimizer is left out" if weights.name == "checkpoint.pt" else ""
    told = {weights.name: f"{model.found} -> {modeldir.WEIGHTS}{without}"}
    folder = tokenizer or next((place for place in (source / TOKENIZER, source) if is_tokenizer_folder(place)), None)
    if folder is None:
        raise InputError(f"{source}: no tokenizer in it ({', '.join(FILES)}); --tokenizer DIR names its folder")
    files = tokenizer_in(folder, model.config.max_seq_len)
    ours = load_tokenizer(files, folder)
    ours.check_fits(model.config.vocab_size)
    spare = model.config.vocab_size - ours.vocab_size
    more = f", {spare:,} fewer than the model has rows" if spare else ""
    inside = tuple(files) if folder == tokenizer and not is_tokenizer_folder(folder) else FILES
    place = ", ".join(inside) if folder == source else folder.name if folder.parent == source else str(folder)
    told[place] = f"{ours.vocab_size:,} tokens{more} -> tokenizer.json"
    model = dataclasses.replace(model, config=dataclasses.replace(model.config, eos_token_id=ours.eos_id))
    found = _Found(weights, model, files, told=told)
    settings = _settings(source, found)
    _read_adapter(source, settings, found)
    _read_state(source, found)
    seen = {*found.told, *(inside if folder == source else ())}
    for name in sorted(path.name for path in source.iterdir() if path.name not in seen):
        found.told[printable(name)] = _LEFT.get(name, "not looked at")
    return found


_LEFT = {
    TRAINING: "not carried over: counters, and optimizer moments, which start afresh with each lesson here",
    **dict.fromkeys(MODELS, "not read: the weights were taken from another of these files"),
}


def _settings(source: Path, found: _Found) -> dict[str, Any]:
    """The settings of its learner, of which none is carried over: here they are options of each lesson."""
    path = source / SETTINGS
    settings = read_json(path) if path.is_file() else {}
    if "lora_r" not in settings:
        return {}
    here = {field.name for field in dataclasses.fields(ContinualLearningConfig)}
    missing = [printable(name)[:60] for name in settings if name not in here]
    strange = f"; without a counterpart: {_listed(missing)}" if missing else ""
    found.told[SETTINGS] = f"{len(settings)} settings of its learner, options of each lesson here{strange}"
    return settings


def _read_adapter(source: Path, settings: Mapping[str, Any], found: _Found) -> None:
    """The adapter of adapter.pt, else the one inside the weights."""
    shapes = modeldir.expected_shapes(found.model.config)
    path, weights = source / ADAPTER, found.weights
    if path.is_file():
        found.adapter = formats.from_original(legacy.read_pt(path), shapes, str(path))
        found.told[ADAPTER] = _described(found.adapter)
        if found.model.notes:
            found.told[weights.name] += f"; for the adapter in it {ADAPTER} is read"
    elif found.model.notes:  # the reader of the weights left an adapter out
        alpha = settings.get("lora_alpha")
        if isinstance(alpha, bool) or not isinstance(alpha, int | float):
            raise InputError(
                f"{weights}: an adapter is in it, but without {ADAPTER} or {SETTINGS} its alpha is not known; "
                "copy one of them beside it"
            )
        found.adapter = original.wrapped_adapter(legacy.read_pt(weights), alpha, shapes, str(weights))
        found.told[weights.name] += f"; the adapter in it: {_described(found.adapter)}"


def _described(adapter: formats.Adapter) -> str:
    return f"rank {adapter.rank}, scale {adapter.scale:g}, on {len(adapter.paths)} layers -> the domain's adapter"


def _read_state(source: Path, found: _Found) -> None:
    """Replay buffer and EWC state, which belong to an adapter."""
    config = found.model.config
    there = [name for name in (REPLAY, EWC) if (source / name).is_file()]
    if there and found.adapter is None:
        raise InputError(f"{source}: {' and '.join(there)} without {ADAPTER}, the adapter that they belong to")
    if REPLAY in there:
        where = source / REPLAY
        samples, left_out = original.experiences(legacy.read_pt(where), config.vocab_size, str(where))
        found.experiences = samples
        reasons = "".join(f"; {count:,} left out: {reason}" for reason, count in left_out.items())
        found.told[REPLAY] = f"{len(samples) + sum(left_out.values()):,} samples{reasons}"
    if EWC in there:
        assert found.adapter is not None
        where = source / EWC
        shapes = modeldir.expected_shapes(config)
        found.consolidation = original.consolidation(legacy.read_pt(where), found.adapter, shapes, str(where))
        found.told[EWC] = _told_of_anchor(found.consolidation, found.adapter)


def _told_of_anchor(state: original.Consolidation, adapter: formats.Adapter) -> str:
    tasks = f"Fisher of {state.tasks} consolidation{'' if state.tasks == 1 else 's'}"
    if not state.anchor:
        return tasks
    moved = max(float(np.abs(state.anchor[name] - array).max()) for name, array in adapter.arrays.items())
    if moved == 0:
        return f"{tasks}, anchored at the adapter as it is"
    return f"{tasks}; its anchor is up to {moved:.2g} away from the adapter, here the adapter itself is the anchor"


# -- writing ---------------------------------------------------------------------------------------------------------


def _commit(
    found: _Found, adapter: formats.Adapter, model: Path, domain: str, source: str, progress: Callable[[str], None]
) -> Version:
    """The first version of the domain in the model directory's own store."""
    settings = ContinualLearningConfig()
    buffer = _buffer(found, settings)
    fisher: Arrays | None = None
    if len(buffer):
        progress("measuring the Fisher on the replay windows")
        fisher = _fisher(found, adapter, model, buffer, settings)
    elif found.consolidation is not None:
        found.told[EWC] += "; not carried over: its size cannot be measured without replay windows"
    tensors, description = formats.to_mlx_lm(adapter, found.model.config.num_layers)

    def write(folder: Path) -> None:
        shapes = {name: array.shape for name, array in tensors.items()}
        modeldir.write_safetensors(folder / "adapters.safetensors", shapes, tensors)
        write_json(folder / "adapter_config.json", description)
        if fisher is not None:
            write_state(folder, fisher, count_tokens(np.concatenate([sample.ids for sample in found.experiences])))

    figures = {
        "imported": "original",
        "rank": adapter.rank,
        "scale": adapter.scale,
        "trainable_parameters": sum(array.size for array in tensors.values()),
        "replay_windows": len(buffer),
    }
    windows = {row.id: row.window for row in buffer.rows()}
    replay = Replay(**buffer.membership(), windows=windows) if windows else None
    store = open_store(model)
    with store.writing():
        return store.commit(domain, None, write, source=source, config={}, figures=figures, heldout=None, replay=replay)


def _buffer(found: _Found, settings: ContinualLearningConfig) -> ReplayBuffer:
    """The samples as windows of a lesson's length. Their domains are the sources.

    They count as lessons before the first, 0, -1 and so on, one for each importance: the next lesson estimates the
    Fisher of lesson 1, the version that they come with, and theirs is in its state already.
    """
    length = min(settings.seq_len, found.model.config.max_seq_len)
    buffer = ReplayBuffer(length, settings.replay_buffer_size, settings.replay_strategy, settings.seed)
    lessons: dict[str, dict[float, list[Batch]]] = {}
    for sample in found.experiences:
        windows = Windows(Tokens(sample.ids, sample.trained, 1, 0), length)
        tokens, mask = windows.batch(range(len(windows)))
        missing = (0, 0), (0, length - windows.seq_len)
        batch = np.pad(tokens, missing), np.pad(mask, missing)
        of_source = lessons.setdefault(printable(sample.source)[:LONGEST_SOURCE], {})
        of_source.setdefault(sample.importance, []).append(batch)
    offered = 0
    for source, by_importance in lessons.items():
        for number, (importance, batches) in enumerate(by_importance.items()):
            all_tokens, all_masks = (np.concatenate(parts) for parts in zip(*batches, strict=True))
            buffer.insert(all_tokens, all_masks, source, -number, importance)
            offered += len(all_tokens)
    if REPLAY in found.told:
        kept = f"{len(buffer):,} windows of at most {length} tokens" if offered else "nothing to replay"
        gone = f", {buffer.refused:,} there twice" if buffer.refused else ""
        full = offered - buffer.refused - len(buffer)
        gone += f", {full:,} more than a buffer of {settings.replay_buffer_size:,} holds" if full else ""
        sources = [
            f"{source} {rows:,} (importance {_listed([f'{importance:g}' for importance in sorted(lessons[source])])})"
            for source, rows in sorted(buffer.sources.items())
        ]
        found.told[REPLAY] += f" -> {kept}{gone}{f'; sources: {_listed(sources)}' if sources else ''}"
    return buffer


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    return f"{', '.join(names[:SHOWN])}{more}"


def _fisher(
    found: _Found, adapter: formats.Adapter, model: Path, buffer: ReplayBuffer, settings: ContinualLearningConfig
) -> Arrays:
    """The Fisher of the adapter on the windows, nats^2 per token; where an ewc.pt came along, with its pattern."""
    base = ContinualLLM.from_checkpoint(model, mx.float32)
    lora.attach_arrays(base, {name: mx.array(array) for name, array in adapter.arrays.items()}, adapter.scale)
    base.train(False)
    rows = list(buffer.rows())
    count = min(len(rows), settings.ewc_fisher_samples)
    chosen = [rows[number * len(rows) // count].window for number in range(count)]  # evenly, of all sources
    found.notes.append(_shifted(base, chosen))
    measured = measured_fisher(base, chosen, mx.random.key(settings.seed))
    if found.consolidation is None or not found.consolidation.fisher:
        return measured
    found.told[EWC] += f"; each tensor scaled to its mean on {count} of the windows, in nats^2 per token"
    return rescaled(found.consolidation.fisher, measured)


def _shifted(model: ContinualLLM, windows: Sequence[Window]) -> str:
    """SHIFTED with what the windows say about it: the loss on the next token and on the one after, nats per token."""
    nats, counted = np.zeros(2), np.zeros(2)
    for window in windows:
        tokens, mask = (mx.array(part)[None] for part in unpack(window))  # (1, n + 1), (1, n)
        logits = model(tokens[:, :-1])  # (1, n, V)
        for ahead in range(min(2, mask.shape[1])):
            counts = mask[:, ahead:]
            losses = cross_entropy(logits[:, : counts.shape[1]], tokens[:, 1 + ahead :])  # (1, n - ahead)
            nats[ahead] += (losses * counts).sum().item()
            counted[ahead] += counts.sum().item()
    if not counted.all():
        return SHIFTED
    one, two = nats / counted
    return f"{SHIFTED}; on the replay windows the next costs it {one:.2f} nats, the one after {two:.2f}"


def rescaled(pattern: Mapping[str, np.ndarray], measured: Mapping[str, mx.array]) -> Arrays:
    """Each tensor of `pattern` times what gives it the mean of the `measured` one; one that is all zeros is that one.

    Both have the same names and shapes, `measured` is in nats^2 per token, and so is the result.
    """
    arrays = {}
    for name, array in measured.items():
        theirs = pattern[name].astype(np.float64)
        mean = theirs.mean()
        factor = float(array.mean().item()) / mean if mean > 0 else 0.0  # type: ignore[arg-type]
        arrays[name] = mx.array((theirs * factor).astype(np.float32)) if mean > 0 else array
    mx.eval(arrays)
    return arrays
