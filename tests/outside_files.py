"""What reads files from outside: of each parser good files, and what is done with them through a command's function.

Built by the child process of test_mutations (`read_mutated`); what only one parser needs is imported there.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mutations
import numpy as np

from mlx_impl.errors import DamagedFileError, InputError


@dataclass
class Subject:
    """One file that is changed and what is done with it: `use` returns what came of it, or raises one of our errors."""

    name: str
    path: Path
    change: mutations.Change
    use: Callable[[], Any]


# -- what commands do ----------------------------------------------------------------


@contextmanager
def surely(what: str) -> Iterator[None]:
    """For what must work once a file was accepted."""
    try:
        yield
    except (InputError, DamagedFileError) as error:
        raise AssertionError(f"accepted, but then {what}: {error}") from error


def converted(source: Path, out: Path, **options: Any) -> Any:
    """`minimac-mlx convert`: what can be read of the target afterwards."""
    from convert.detect import read_model
    from mlx_impl.conversion import convert
    from mlx_impl.modeldir import expected_shapes

    shutil.rmtree(out.parent, ignore_errors=True)
    out.parent.mkdir()
    try:
        convert(source, out, **options)
    except (InputError, DamagedFileError):
        assert not list(out.parent.iterdir()), "refused, but something was written"
        raise
    assert out.exists()
    with surely("not read back"):
        model = read_model(out)
        arrays = dict(model.tensors)
    assert {name: array.shape for name, array in arrays.items()} == expected_shapes(model.config)
    generation = out / "generation_config.json"
    return [model.config, arrays, dict(model.tokenizer_files), generation.is_file() and generation.read_bytes()]


def as_the_library_reads(path: Path, came: Any) -> Any:
    """What came of a safetensors file that was accepted, which the format's own library must be able to open too."""
    import safetensors

    with safetensors.safe_open(path, "numpy") as file:
        assert file.keys()
    return came


def opened(folder: Path) -> Any:
    """What `generate`, `learn` and others open: the model with its tokenizer, which then take a text."""
    import mlx.core as mx

    from mlx_impl.arrays import flatten
    from mlx_impl.learner import ContinualLearner

    learner = ContinualLearner.from_checkpoint(folder)
    model, tokenizer = learner.model, learner.tokenizer
    arrays = {name: np.array(array) for name, array in flatten(model.parameters()).items()}
    assert model(mx.array([[1, 2, 3]])).shape == (1, 3, model.vocab_size)
    return [model.config, arrays, tokenizer.digest, tokenizer.eos_ids]


TEXT = "The key lies under the pot.\n  12 \u00e9\u0301\U0001f600 <unk> </s>\t▁"


def tokenized(folder: Path) -> Any:
    """What every command does with a tokenizer's folder: encode, decode, render a chat."""
    from mlx_impl.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(folder)
    ids = tokenizer.encode(TEXT)
    assert all(0 <= i < tokenizer.vocab_size for i in ids)
    stream = tokenizer.stream()
    streamed = "".join([*(stream.add(i) for i in ids), stream.finish()])
    assert streamed == tokenizer.decode(ids, skip_special=True)
    chat = tokenizer.encode_chat([{"role": "user", "content": TEXT}]) if tokenizer.has_chat_template else []
    return [ids, tokenizer.decode(ids), chat, tokenizer.bos_id, tokenizer.eos_ids, sorted(tokenizer.special_ids)]


def imported(base: Path, source: Path, store: Path) -> Any:
    """`minimac-mlx import` and what `generate --domain` then reads; the domain is forgotten again."""
    from mlx_impl.adapters import read_adapter
    from mlx_impl.exchange import import_adapter
    from mlx_impl.store import open_store

    lessons = open_store(base, store)
    version = import_adapter(lessons, "theirs", base, source)
    with surely("not read back"):
        arrays, scale = read_adapter(lessons.files_of(version))
        lessons.forget("theirs")
    return [{name: np.array(array) for name, array in arrays.items()}, scale]


def moved(source: Path, out: Path) -> Any:
    """`minimac-mlx convert` of a checkpoint folder of the original project."""
    from mlx_impl.adapters import read_adapter
    from mlx_impl.moving import move_over
    from mlx_impl.store import open_store

    shutil.rmtree(out.parent, ignore_errors=True)
    out.parent.mkdir()
    try:
        record = move_over(source, out)
    except (InputError, DamagedFileError):
        assert not list(out.parent.iterdir()), "refused, but something was written"
        raise
    with surely("not read back"):
        lessons = open_store(out)
        version = lessons.require("main")
        arrays, scale = read_adapter(lessons.files_of(version))
        replay = lessons.replay(version)
    windows = sorted(replay.windows) if replay is not None else []
    return [{name: np.array(array) for name, array in arrays.items()}, scale, windows, record["files"]]


# -- the files -----------------------------------------------------------------------


def adapters(folder: Path, base: Path) -> dict[str, Path]:
    """One adapter for every linear layer of a base, in each of the formats."""
    from safetensors.numpy import save_file

    from convert.adapter import Adapter, to_mlx_lm
    from mlx_impl import exchange, modeldir
    from mlx_impl.store import open_store

    config, _ = modeldir.read_config(base)
    draw, arrays = np.random.default_rng(1), {}
    for name, shape in modeldir.expected_shapes(config).items():
        if name.endswith("_proj.weight"):
            path = name.removesuffix(".weight")
            arrays[f"{path}.lora_a"] = draw.standard_normal((shape[1], 3), np.float32)
            arrays[f"{path}.lora_b"] = draw.standard_normal((3, shape[0]), np.float32)
    tensors, settings = to_mlx_lm(Adapter(arrays, 1.5), config.num_layers)
    given = folder / "given"
    given.mkdir()
    save_file(tensors, given / exchange.MLX_LM)
    (given / exchange.CONFIG).write_text(json.dumps(settings))
    store = open_store(base, folder / "first")
    exchange.import_adapter(store, "first", base, given)
    for to in exchange.FORMATS:
        exchange.export_adapter(store, "first", base, folder / to, to)
    return {to: folder / to for to in exchange.FORMATS}


def safetensors_files(folder: Path) -> list[Subject]:
    import tiny_models
    from terminal import write_model

    from mlx_impl import exchange, modeldir
    from mlx_impl.conversion import convert
    from mlx_impl.packing import Packing
    from mlx_impl.quantised import packed_writer

    plain = write_model(folder / "plain", manifest=False)
    wide = write_model(folder / "wide", d_model=64, d_ff=64)
    packed, half, bare = folder / "packed", folder / "half", folder / "bare.safetensors"
    convert(wide, packed, write=packed_writer(Packing(4)))
    convert(plain, half, dtype="bf16")
    for made in (packed, half):
        (made / modeldir.MANIFEST).unlink()
    convert(plain, bare)
    sharded = tiny_models.write_hf(folder / "sharded", shards=3)
    made = adapters(folder, plain)
    change, out, store = mutations.safetensors_changed, folder / "out" / "model", folder / "store"
    shard = sharded / "model-00002.safetensors"
    mlx_lm, peft = made["mlx-lm"] / exchange.MLX_LM, made["peft"] / exchange.PEFT
    weights = plain / modeldir.WEIGHTS
    return [
        Subject("convert", weights, change, lambda: as_the_library_reads(weights, converted(plain, out))),
        Subject("generate", weights, change, lambda: opened(plain)),
        Subject("convert, bf16", half / modeldir.WEIGHTS, change, lambda: converted(half, out)),
        Subject("convert, 4 bits", packed / modeldir.WEIGHTS, change, lambda: converted(packed, out)),
        Subject("generate, 4 bits", packed / modeldir.WEIGHTS, change, lambda: opened(packed)),
        Subject("convert, shards", shard, change, lambda: converted(sharded, out)),
        Subject("convert, index", sharded / modeldir.INDEX, mutations.json_changed, lambda: converted(sharded, out)),
        Subject("convert, torch_ref", bare, change, lambda: converted(bare, out)),
        Subject("import, mlx-lm", mlx_lm, change, lambda: imported(plain, made["mlx-lm"], store)),
        Subject("import, PEFT", peft, change, lambda: imported(plain, made["peft"], store)),
    ]


def gguf_files(folder: Path) -> list[Subject]:
    import tiny_models
    from terminal import write_model

    from mlx_impl.conversion import convert

    plain = write_model(folder / "plain", manifest=False)
    made = adapters(folder, plain)
    out, store = folder / "out" / "model", folder / "store"
    models = {kind: tiny_models.write_gguf(folder / f"{kind}.gguf", kind=kind) for kind in ("F32", "Q4_1", "Q8_0")}
    models["SentencePiece"] = folder / "sentencepiece.gguf"
    convert(plain, models["SentencePiece"])
    adapter = made["gguf"] / "adapter.gguf"
    return [
        Subject(f"convert, {kind}", path, mutations.bytes_changed, lambda path=path: converted(path, out))  # type: ignore[misc]
        for kind, path in models.items()
    ] + [Subject("import", adapter, mutations.bytes_changed, lambda: imported(plain, made["gguf"], store))]


def pt_files(folder: Path) -> list[Subject]:
    import test_original
    import torch

    from mlx_impl.conversion import convert
    from mlx_impl.moving import move_over

    change, out, store = mutations.pt_changed, folder / "out" / "model", folder / "store"
    theirs = test_original.checkpoint(folder / "theirs")
    ours, ours_as_pt, alone = folder / "ours", folder / "ours.pt", folder / "alone.pt"
    move_over(theirs, ours)
    convert(ours, ours_as_pt)
    torch.save({"model_state_dict": test_original.weights(), "config": test_original.CONFIG}, alone)
    wrapped, adapter, ewc, buffer = (theirs / f"{name}.pt" for name in ("model", "adapter", "ewc", "replay_buffer"))
    return [
        Subject("convert, torch_ref", ours_as_pt, change, lambda: converted(ours_as_pt, out)),
        Subject("convert, original", alone, change, lambda: converted(alone, out)),
        Subject("convert, LoRA inside", wrapped, change, lambda: converted(wrapped, out)),
        Subject("import", adapter, change, lambda: imported(ours, adapter, store)),
        Subject("convert, ewc.pt of a folder", ewc, change, lambda: moved(theirs, out)),
        Subject("convert, replay_buffer.pt of a folder", buffer, change, lambda: moved(theirs, out)),
    ]


def config_files(folder: Path) -> list[Subject]:
    from terminal import write_model

    from convert.state_dict import original_config
    from mlx_impl import modeldir
    from mlx_impl.conversion import convert
    from mlx_impl.packing import Packing
    from mlx_impl.quantised import packed_writer

    change, out = mutations.json_changed, folder / "out" / "model"
    plain = write_model(folder / "plain", manifest=False)
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaled = write_model(
        folder / "scaled", manifest=False, rope_scaling={**scaling, "original_max_position_embeddings": 64}
    )
    wide = write_model(folder / "wide", d_model=64, d_ff=64)
    packed = folder / "packed"
    convert(wide, packed, write=packed_writer(Packing(4)))
    (packed / modeldir.MANIFEST).unlink()
    mistral = shutil.copytree(plain, folder / "mistral")  # a Llama's weights under the same names
    settings = json.loads((mistral / modeldir.CONFIG).read_text())
    (mistral / modeldir.CONFIG).write_text(json.dumps({**settings, "model_type": "mistral"}))
    bare, original = folder / "bare.safetensors", folder / "original.json"
    convert(plain, bare)
    original.write_text(json.dumps(original_config(modeldir.read_config(plain)[0])))
    generation = plain / "generation_config.json"
    return [
        Subject("convert", plain / modeldir.CONFIG, change, lambda: converted(plain, out)),
        Subject("generate", plain / modeldir.CONFIG, change, lambda: opened(plain)),
        Subject("generate, scaled RoPE", scaled / modeldir.CONFIG, change, lambda: opened(scaled)),
        Subject("convert, 4 bits", packed / modeldir.CONFIG, change, lambda: converted(packed, out)),
        Subject("generate, 4 bits", packed / modeldir.CONFIG, change, lambda: opened(packed)),
        Subject("generate, mistral", mistral / modeldir.CONFIG, change, lambda: opened(mistral)),
        Subject("convert --config", original, change, lambda: converted(bare, out, config_file=original)),
        Subject("generate, generation_config", generation, change, lambda: opened(plain)),
        Subject("convert, generation_config", generation, change, lambda: converted(plain, out)),
    ]


def tokenizer_files(folder: Path) -> list[Subject]:
    import tiny_models
    from slow_bpe import BYTES
    from terminal import write_model
    from test_tokenizer_formats import END, write_original

    change, out = mutations.json_changed, folder / "out" / "model"
    ours = write_model(folder / "ours", manifest=False)
    theirs = tiny_models.write_hf(folder / "theirs")
    template = "{% for m in messages %}{{ bos_token }}{{ m['content'] }}{% endfor %}"
    settings = {"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>"}, "chat_template": template}
    (theirs / "tokenizer_config.json").write_text(json.dumps(settings))
    merges = [("h", "e"), ("Ġ", "t"), ("Ġt", "he")]
    tokens = [END, *BYTES, *("".join(pair) for pair in merges)]
    original = write_original(folder / "original", {token: n for n, token in enumerate(tokens)}, merges)
    gguf = folder / "out" / "m.gguf"
    name = "tokenizer.json"
    return [
        Subject("load, ours", ours / name, change, lambda: tokenized(ours)),
        Subject("load, byte-level", theirs / name, change, lambda: tokenized(theirs)),
        Subject("load, its settings", theirs / "tokenizer_config.json", change, lambda: tokenized(theirs)),
        Subject("convert to GGUF, ours", ours / name, change, lambda: converted(ours, gguf)),
        Subject("convert to GGUF, byte-level", theirs / name, change, lambda: converted(theirs, gguf)),
    ] + [
        Subject(
            f"convert --tokenizer, {file}", original / file, change, lambda: converted(theirs, out, tokenizer=original)
        )
        for file in ("vocab.json", "merges.json", "config.json")
    ]


def sentencepiece_files(folder: Path) -> list[Subject]:
    import tiny_models
    from terminal import write_model

    from mlx_impl.conversion import convert

    plain = write_model(folder / "plain", manifest=False)
    gguf, back, out = folder / "m.gguf", folder / "out" / "m.gguf", folder / "out" / "model"
    convert(plain, gguf)
    pieces, model = plain / "tokenizer.json", plain / "tokenizer.model"
    content = model.read_bytes()

    def alone() -> Any:
        """Without the file beside it, which would tell."""
        model.unlink()
        try:
            return tokenized(plain)
        finally:
            model.write_bytes(content)

    bare = {}
    for name, options in (("BPE", {}), ("normalising", {"normalization_rule_name": "nmt_nfkc"})):
        bare[name] = tiny_models.write_hf(folder / name, tiny_models.weights(vocab=420))
        (bare[name] / "tokenizer.json").unlink()
        (bare[name] / "tokenizer.model").write_bytes(tiny_models.sentencepiece_model(**options))
    return [
        Subject(
            f"load, {name} alone",
            path / "tokenizer.model",
            mutations.sentencepiece_changed,
            lambda path=path: tokenized(path),
        )  # type: ignore[misc]
        for name, path in bare.items()
    ] + [
        Subject(
            "convert, alone",
            bare["BPE"] / "tokenizer.model",
            mutations.sentencepiece_changed,
            lambda: converted(bare["BPE"], out),
        ),
        Subject("load, pieces of a tokenizer.json", pieces, mutations.pieces_changed, alone),
        Subject("load, tokenizer.model", model, mutations.bytes_changed, lambda: tokenized(plain)),
        Subject("convert, GGUF", gguf, mutations.bytes_changed, lambda: converted(gguf, out)),
        Subject("convert to GGUF, pieces", pieces, mutations.pieces_changed, lambda: converted(plain, back)),
    ]


def adapter_config_files(folder: Path) -> list[Subject]:
    from terminal import write_model

    from mlx_impl import exchange, modeldir

    plain = write_model(folder / "plain", manifest=False)
    made, store, change = adapters(folder, plain), folder / "store", mutations.json_changed
    mistral = shutil.copytree(plain, folder / "mistral")
    settings = json.loads((mistral / modeldir.CONFIG).read_text())
    (mistral / modeldir.CONFIG).write_text(json.dumps({**settings, "model_type": "mistral"}))
    peft = made["peft"] / exchange.CONFIG
    settings = json.loads(peft.read_text())
    peft.write_text(json.dumps({**settings, "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"up_proj": 5}}))
    mlx_lm = made["mlx-lm"] / exchange.CONFIG
    other = folder / "other"
    return [
        Subject("import, PEFT", peft, change, lambda: imported(plain, made["peft"], store)),
        Subject("import, mlx-lm", mlx_lm, change, lambda: imported(plain, made["mlx-lm"], store)),
        Subject("import, PEFT on mistral", peft, change, lambda: imported(mistral, made["peft"], other)),
    ]


PARSERS: dict[str, Callable[[Path], list[Subject]]] = {
    "safetensors": safetensors_files,
    "GGUF": gguf_files,
    ".pt": pt_files,
    "config.json": config_files,
    "tokenizer.json": tokenizer_files,
    "SentencePiece": sentencepiece_files,
    "adapter_config.json": adapter_config_files,
}
