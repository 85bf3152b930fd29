"""The model opened for generation against the model itself: logits, tokens, adapters, and what is left untouched.

Both compute the same in float32 in another order, so that logits of about unit size agree within 1e-4, mostly 1e-6.
"""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from comparing import CONFIGS, adapter, assert_close, from_mlx, mlx_model, to_mlx, weights, windows
from mlx import nn

from mlx_impl import decoder, generate, kernels, lora
from mlx_impl.arrays import flatten
from mlx_impl.cache import STEP, KVCache, PromptCache, RotatingKVCache
from mlx_impl.config import ModelConfig
from mlx_impl.decoder import opened, release
from mlx_impl.errors import DamagedFileError, InputError
from mlx_impl.generate import Sampling, decode, naive
from mlx_impl.model import ContinualLLM

every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
SMALL = CONFIGS["3:1 untied biases theta 500000"]
SCALE = 2.0


def model_of(config: ModelConfig, adapted: bool = False) -> ContinualLLM:
    """A model by formula, with an adapter on every projection if asked for."""
    model = mlx_model(config, weights(config))
    if adapted:
        lora.attach_arrays(model, to_mlx(adapter(config, 3)), SCALE)
    return model


def ids_of(config: ModelConfig, length: int) -> list[int]:
    """A prompt that repeats nothing but its rule."""
    ids: list[int] = windows(config, 1, length - 1)[0][0].tolist()
    return ids


def step_by_step(reader: decoder.Reader, model: ContinualLLM, ids: list[int], window: int | None = None) -> np.ndarray:
    """Logits (T, V): the first five tokens at once, then one after the other."""
    cache = model.make_cache(window)
    parts = [reader(mx.array([ids[:5]]), cache)]
    parts += [reader(mx.array([[token]]), cache) for token in ids[5:]]
    return np.array(mx.concatenate(parts, axis=1)[0])


# -- the same numbers ----------------------------------------------------------------


@every_config
@pytest.mark.parametrize("adapted", [False, True], ids=["base", "adapted"])
@pytest.mark.parametrize("fused", [False, True], ids=["as it is", "fused"])
def test_logits_are_the_models(config: ModelConfig, adapted: bool, fused: bool) -> None:
    model, ids = model_of(config, adapted), ids_of(config, 24)
    expected = np.array(model(mx.array([ids]))[0])
    reader = opened(model)
    assert isinstance(reader, decoder.OpenedModel)
    if fused:
        reader.fuse()
    assert_close("logits", step_by_step(reader, model, ids), expected, of_largest=1e-5)
    if adapted:
        lora.detach(model)
        assert np.abs(np.array(model(mx.array([ids]))[0]) - expected).max() > 0.01, "the adapter has an effect"


@every_config
def test_what_a_gpu_would_run_is_the_same(config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLX's own kernels for one token, as on Metal, with all else as it is."""
    model, ids = model_of(config, adapted=True), ids_of(config, 12)
    expected = np.array(model(mx.array([ids]))[0])
    monkeypatch.setattr(kernels, "on_cpu", lambda: False)
    monkeypatch.setattr(decoder, "_compiled_gated", lambda gate, up: nn.silu(gate) * up)
    reader = opened(model)
    assert isinstance(reader, decoder.OpenedModel)
    reader.fuse()
    assert_close("logits", step_by_step(reader, model, ids), expected, of_largest=1e-5)


def test_ctrl_c_while_a_layer_is_fused_leaves_no_half_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = model_of(SMALL), ids_of(SMALL, 12)
    expected = np.array(model(mx.array([ids]))[0])
    reader = opened(model)
    assert isinstance(reader, decoder.OpenedModel)

    def interrupted(self: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        # After query, key and value are one matrix already, which has taken the norm's weights.
        patched.setattr(decoder._Joined, "fuse", first_of(decoder._Joined.fuse, interrupted))
        with pytest.raises(KeyboardInterrupt):
            reader.fuse(1)
    again = opened(model)
    assert isinstance(again, decoder.OpenedModel)
    again.fuse()
    assert_close("logits", step_by_step(again, model, ids), expected, of_largest=1e-5)


def first_of(function: Any, then: Any) -> Any:
    """`function` the first time it is called, `then` ever after."""
    calls: list[None] = []

    def either(self: Any, *arguments: Any, **named: Any) -> Any:
        calls.append(None)
        return function(self, *arguments, **named) if len(calls) == 1 else then(self)

    return either


def test_a_long_context_takes_the_other_softmax(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = model_of(SMALL), ids_of(SMALL, 40)
    expected = np.array(model(mx.array([ids]))[0])
    seen, power = [], mx.power

    def spied(base: mx.array, x: mx.array) -> mx.array:
        seen.append(x.shape)
        return power(base, x)

    monkeypatch.setattr(mx, "power", spied)
    monkeypatch.setattr(decoder, "SHORT", 20)
    assert_close("logits", step_by_step(opened(model), model, ids), expected, of_largest=1e-5)
    assert (1, 1, 3, 40) in seen, "scores of the last token"


def test_large_scores_and_gates_do_not_overflow() -> None:
    arrays = weights(SMALL)
    for name in arrays:
        if name.endswith(("q_proj.weight", "gate_proj.weight")):
            arrays[name] = arrays[name] * 300
    model, ids = mlx_model(SMALL, arrays), ids_of(SMALL, 16)
    expected = np.array(model(mx.array([ids]))[0])
    assert_close("logits", step_by_step(opened(model), model, ids), expected, of_largest=1e-3)


@every_config
def test_a_window_gives_the_models_logits(config: ModelConfig) -> None:
    model, ids = model_of(config), ids_of(config, 40)
    reader = opened(model)
    assert isinstance(reader, decoder.OpenedModel)
    reader.fuse()
    assert_close("logits", step_by_step(reader, model, ids, 12), step_by_step(model, model, ids, 12), of_largest=1e-5)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.9, top_p=0.9, repetition_penalty=1.3, seed=4)], ids=str)
@pytest.mark.parametrize("adapted", [False, True], ids=["base", "adapted"])
def test_tokens_stay_the_naive_ones_while_layers_are_fused(
    sampling: Sampling, adapted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoder, "FUSE_AFTER", 3)
    config = CONFIGS["4:2 untied linear scaling, heads wider than D/H"]
    model, prompt = model_of(config, adapted), ids_of(config, 9)
    assert list(decode(model, prompt, 20, sampling)) == list(naive(model, prompt, 20, sampling))
    assert fused_layers(model) == config.num_layers


def fused_layers(model: ContinualLLM) -> int:
    """How many layers of the model opened for generation are fused."""
    layers: Iterator = (joined._weight is not None for layer in model.reader._layers for joined in [layer._qkv])
    return sum(layers)


def test_packed_layers_are_run_as_they_are() -> None:
    config = ModelConfig(64, 64, 2, 4, 2, 64)
    model, ids = model_of(config), ids_of(config, 12)
    nn.quantize(model, group_size=32, bits=8)
    expected = np.array(model(mx.array([ids]))[0])
    reader = opened(model)
    assert isinstance(reader, decoder.OpenedModel)
    reader.fuse()
    assert_close("logits", step_by_step(reader, model, ids), expected, of_largest=1e-5)


def test_half_precision_takes_the_models_own_operations() -> None:
    model, ids = model_of(SMALL, adapted=True), ids_of(SMALL, 12)
    lora.detach(model)
    model.set_dtype(mx.bfloat16)
    lora.attach_arrays(model, to_mlx(adapter(SMALL, 3)), SCALE)
    expected = np.array(model(mx.array([ids])).astype(mx.float32)[0])
    reader, cache = opened(model), model.make_cache()
    logits = mx.concatenate([reader(mx.array([[token]]), cache) for token in ids], axis=1)
    assert logits.dtype == mx.bfloat16
    assert_close("logits", logits.astype(mx.float32)[0], expected, of_largest=0.05)  # 2^-8 a rounding, many of them


# -- what stays, and what goes -------------------------------------------------------


def test_the_base_is_bit_identical_after_merging_and_detaching() -> None:
    model, prompt = model_of(SMALL), ids_of(SMALL, 9)
    before, arrays = from_mlx(model.parameters()), flatten(model.parameters())
    lora.attach_arrays(model, to_mlx(adapter(SMALL, 3)), SCALE)
    opened(model).fuse()  # type: ignore[attr-defined]
    list(decode(model, prompt, 5, Sampling()))
    lora.detach(model)
    after = from_mlx(model.parameters())
    assert all(np.array_equal(after[name], array) for name, array in before.items())
    assert all(array is arrays[name] for name, array in flatten(model.parameters()).items())
    bare = model_of(SMALL)
    assert list(decode(model, prompt, 9, Sampling())) == list(naive(bare, prompt, 9, Sampling()))


def test_the_twin_is_kept_until_the_model_changes() -> None:
    model, one, other = model_of(SMALL), to_mlx(adapter(SMALL, 3)), to_mlx(adapter(SMALL, 3))
    first = opened(model)
    assert opened(model) is first
    lora.attach_arrays(model, one, SCALE)
    adapted = opened(model)
    assert adapted is not first
    assert opened(model) is adapted
    lora.detach(model)
    lora.attach_arrays(model, one, SCALE)  # what routing does between two answers of a domain
    assert opened(model) is adapted
    lora.attach_arrays(model, one, 2 * SCALE)
    assert opened(model) is not adapted
    lora.attach_arrays(model, other, SCALE)
    again = opened(model)
    model.update({"model": {"norm": {"weight": mx.zeros(SMALL.d_model)}}})
    assert opened(model) is not again
    release(model)
    assert model.reader is None


def test_switching_back_and_forth_gives_each_domains_tokens() -> None:
    model, prompt = model_of(SMALL), ids_of(SMALL, 9)
    first = to_mlx(adapter(SMALL, 3))
    domains = [first]
    domains += [{n: array * (by if n.endswith("a") else 1) for n, array in first.items()} for by in (-1, 2)]
    expected = []
    for arrays in domains:
        fresh = model_of(SMALL)
        lora.attach_arrays(fresh, arrays, SCALE)
        expected.append(list(naive(fresh, prompt, 24, Sampling())))
    assert len({tuple(tokens) for tokens in expected}) == 3
    for turn in range(6):
        lora.attach_arrays(model, domains[turn % 3], SCALE)
        assert list(decode(model, prompt, 24, Sampling())) == expected[turn % 3], turn


def test_nothing_is_fused_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompt = model_of(SMALL), ids_of(SMALL, 5)
    bytes_ = sum(array.nbytes for _, array in flatten(model.parameters()).items())
    for memory, fused in ((4 * bytes_ - 1, 0), (4 * bytes_, SMALL.num_layers)):
        release(model)
        monkeypatch.setattr(decoder, "memory_bytes", lambda memory=memory: memory)
        list(decode(model, prompt, 24, Sampling()))
        assert fused_layers(model) == fused


def test_a_step_has_fewer_operations_than_the_models() -> None:
    model = model_of(SMALL)
    opened(model).fuse()  # type: ignore[attr-defined]
    counts = [operations(reader, model) for reader in (opened(model), model)]
    assert counts[0] <= 0.75 * counts[1], counts


def operations(reader: decoder.Reader, model: ContinualLLM) -> int:
    """Primitives in the graph of one step after ten tokens."""
    cache = model.make_cache()
    mx.eval(reader.hidden(mx.array([list(range(10))]), cache), [layer.state for layer in cache])
    return graph_size(reader(mx.array([[1]]), cache))


def graph_size(array: mx.array) -> int:
    """Boxes of `mx.export_to_dot`: one a primitive."""
    file = io.StringIO()
    mx.export_to_dot(file, array)
    return file.getvalue().count("shape=rectangle")


# -- the cache -----------------------------------------------------------------------


def test_room_is_made_once() -> None:
    model, prompt = model_of(SMALL), ids_of(SMALL, 30)
    for cache, rows in ((model.make_cache(), 2 * STEP), (model.make_cache(40), 40)):
        shapes = set()
        for _ in decode(model, prompt, STEP, Sampling(), cache=cache):
            shapes |= {array.shape[2] for array in cache[0].state}
        assert shapes == {rows} if rows > STEP else shapes == {STEP, rows}
    assert KVCache().state == ()
    assert isinstance(model.make_cache(40)[0], RotatingKVCache)


def test_decoding_in_chunks_reads_only_what_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "PREFILL", 4)
    model, prompt = model_of(SMALL), ids_of(SMALL, 23)
    assert list(decode(model, prompt, 6, Sampling())) == list(naive(model, prompt, 6, Sampling()))


# -- the prompt cache ----------------------------------------------------------------


def read(model: ContinualLLM, kept: PromptCache, prompt: list[int], owner: str = "base") -> tuple[list[int], int]:
    """Six tokens after a prompt, through a prompt cache, and how many tokens of it were read before."""
    layers = kept.take(prompt, owner) or model.make_cache()
    known = layers[0].offset
    tokens = list(decode(model, prompt, 6, Sampling(), cache=layers))
    kept.put([*prompt, *tokens], owner, layers)
    return tokens, known


def test_a_saved_prompt_cache_is_used_as_far_as_prompts_are_alike(tmp_path: Path) -> None:
    model, kept = model_of(SMALL), PromptCache()
    first, second = ids_of(SMALL, 20), [*ids_of(SMALL, 14), 9, 8, 7]
    answer, known = read(model, kept, first)
    assert known == 0
    kept.save(tmp_path / "kept.safetensors")
    again = PromptCache.load(tmp_path / "kept.safetensors", model.config)
    assert (again.ids, again.owner) == ([*first, *answer[:5]], "base"), "the last token was never read"
    for cache in (kept, again):
        tokens, known = read(model, cache, second)
        assert (tokens, known) == (list(naive(model, second, 6, Sampling())), 14)
        tokens, known = read(model, cache, second)
        assert (tokens, known) == (list(naive(model, second, 6, Sampling())), len(second) - 1)
        assert cache.take(second, "another domain") is None


def test_a_cache_that_is_taken_is_gone_until_it_is_put_back() -> None:
    model, kept = model_of(SMALL), PromptCache()
    prompt = ids_of(SMALL, 9)
    read(model, kept, prompt)
    assert kept.take([], "base") is None
    read(model, kept, prompt)
    assert kept.take(prompt, "base") is not None
    assert kept.take(prompt, "base") is None, "who took it may have been interrupted"


def test_a_window_is_reused_while_it_holds_all_and_never_written(tmp_path: Path) -> None:
    model, kept, prompt = model_of(SMALL), PromptCache(), ids_of(SMALL, 9)
    for window, usable in ((40, True), (10, False)):
        layers = model.make_cache(window)
        list(decode(model, prompt, 4, Sampling(), cache=layers))
        kept.put(prompt, "base", layers)
        with pytest.raises(InputError, match="without a window"):
            kept.save(tmp_path / "kept.safetensors")
        assert (kept.take(prompt, "base") is not None) == usable
    assert not list(tmp_path.iterdir())


def test_files_that_are_no_prompt_cache(tmp_path: Path) -> None:
    model, kept, path = model_of(SMALL), PromptCache(), tmp_path / "kept.safetensors"
    read(model, kept, ids_of(SMALL, 9))
    kept.save(path)
    loaded: Any = mx.load(str(path), return_metadata=True)
    arrays, metadata = loaded
    for name, changed, told, match in (
        ("other", arrays, {**metadata, "format": "x"}, "not a prompt cache"),
        ("unnamed", arrays, {}, "not a prompt cache"),
        ("nested", arrays, {**metadata, "ids": "[[1]]"}, "not a prompt cache"),
        ("endless", arrays, {**metadata, "ids": "[Infinity]"}, "not a prompt cache"),
        ("deep", arrays, {**metadata, "ids": "[" * 100_000}, "not a prompt cache"),
        ("wide", {n: mx.concatenate([a, a], axis=3) for n, a in arrays.items()}, metadata, "do not hold 14 tokens"),
        ("shallow", {n: a for n, a in arrays.items() if n.startswith("0.")}, metadata, "of 1 layers, the model has 3"),
        ("short", arrays, {**metadata, "ids": "[1, 2]"}, "do not hold 2 tokens"),
        ("odd", {**arrays, "0.other": arrays["0.keys"]}, metadata, "do not hold 14 tokens"),
        ("partial", {n: a for n, a in arrays.items() if n != "1.values"}, metadata, "not a prompt cache|do not hold"),
        ("flat", {n: a[0] for n, a in arrays.items()}, metadata, "do not hold|not a prompt cache"),
    ):
        mx.save_safetensors(str(tmp_path / f"{name}.safetensors"), changed, told)
        with pytest.raises(DamagedFileError, match=match):
            PromptCache.load(tmp_path / f"{name}.safetensors", model.config)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DamagedFileError):
        PromptCache.load(path, model.config)
