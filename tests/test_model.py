"""The MLX model by itself: its size, its caches against the plain forward pass, checkpointing, seeds and dropout.

Whether it computes the right thing is the business of `test_parity.py`. Here one path of the same model is held
against another. Logits have about unit size, float32 keeps 7 digits of their terms, and matmul is not
batch-invariant: 1e-5 is three times the largest difference seen, and 1000 times smaller than any masking mistake.
"""

import gc
import itertools
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from comparing import (
    CONFIGS,
    adapter,
    assert_all_close,
    assert_close,
    from_mlx,
    mlx_loss_gradients,
    mlx_model,
    to_mlx,
    weights,
    windows,
)
from hypothesis import given
from hypothesis import strategies as st
from mlx.utils import tree_flatten

from mlx_impl import kernels, lora
from mlx_impl.cache import RotatingKVCache
from mlx_impl.config import PRESETS, ModelConfig
from mlx_impl.errors import DamagedFileError
from mlx_impl.model import ContinualLLM, Rope
from mlx_impl.modeldir import expected_shapes, write_model_directory

LOGITS = 1e-5
GROUPED = CONFIGS["12:3 tied llama3"]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("offset", [0, 7, 1000])
def test_positions_on_a_cpu_are_those_of_mlxs_kernel(
    config: ModelConfig, offset: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is turned is the same, to the bit where frequencies are plain; so are the gradients, to rounding."""
    rope = Rope(config)
    x = mx.random.normal((2, 5, 3, config.head_width), key=mx.random.key(0))
    towards = mx.random.normal((2, 3, 5, config.head_width), key=mx.random.key(1))

    def turned() -> tuple[np.ndarray, np.ndarray]:
        (out,), (gradient,) = mx.vjp(lambda x: [rope(x, offset)], [x], [towards])
        return np.array(out), np.array(gradient)

    out, gradient = turned()
    monkeypatch.setattr(kernels, "on_cpu", lambda: False)
    expected, expected_gradient = turned()
    if config.rope_scaling is None:
        assert np.array_equal(out, expected)
    assert_close("turned", out, expected, of_largest=1e-4)  # an angle of 1,000 is known to 6e-5
    assert_close("gradient", gradient, expected_gradient, of_largest=1e-4)
    assert_close("one token", np.array(x[:1, :1] @ rope.matrix(offset)), out[:1, :, :1].swapaxes(1, 2), of_largest=1e-6)


def shapes(model: ContinualLLM) -> dict[str, tuple[int, ...]]:
    """Shapes of all parameters; nothing is computed."""
    return {name: array.shape for name, array in tree_flatten(model.parameters())}


def in_chunks(model: ContinualLLM, tokens: np.ndarray, chunks: list[int], window: int | None = None) -> np.ndarray:
    """Logits of tokens (B, T) fed to a cache piece by piece."""
    assert sum(chunks) == tokens.shape[1]
    cache = model.make_cache(window)
    ends = list(itertools.accumulate(chunks))
    parts = [model(mx.array(tokens[:, end - n : end]), cache) for n, end in zip(chunks, ends, strict=True)]
    return np.array(mx.concatenate(parts, axis=1))


# -- size and names ------------------------------------------------------------------


@pytest.mark.parametrize("config", [*PRESETS.values(), *CONFIGS.values()], ids=[*PRESETS, *CONFIGS])
def test_parameters_have_the_expected_names_and_number(config: ModelConfig) -> None:
    model = ContinualLLM(config)
    assert shapes(model) == expected_shapes(config)
    assert sum(a.size for _, a in tree_flatten(model.parameters())) == config.num_parameters()


def test_medium_has_the_originals_size_and_building_it_allocates_nothing() -> None:
    before = mx.get_active_memory()
    model = ContinualLLM(PRESETS["medium"])
    assert sum(a.size for _, a in tree_flatten(model.parameters())) == 127_224_576
    assert mx.get_active_memory() - before < 2**20  # of 485 MiB


# -- caches --------------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize(
    "chunks",
    [[23], [1] * 23, [22, 1], [1, 22], [5, 1, 7, 10], [11, 1, 1, 10]],
    ids=lambda c: "-".join(map(str, c)),
)
def test_cached_logits_are_the_full_forwards(config: ModelConfig, chunks: list[int]) -> None:
    model = mlx_model(config, weights(config))
    tokens = windows(config, 2, 22)[0]
    assert_close("logits", in_chunks(model, tokens, chunks), model(mx.array(tokens)), LOGITS)


def test_a_cache_grows_past_its_step() -> None:
    model = mlx_model(GROUPED, weights(GROUPED))
    tokens = windows(GROUPED, 1, 599)[0]
    full = model(mx.array(tokens))
    # 250 + 7 crosses the first 256 rows; 343 of prompt after them need more than one step at once.
    assert_close("logits", in_chunks(model, tokens, [250, 7, 343]), full, LOGITS)
    assert_close("logits", in_chunks(model, tokens, [590] + [1] * 10), full, LOGITS)


def windowed(model: ContinualLLM, tokens: np.ndarray, window: int, keep: int = 4) -> np.ndarray:
    """Logits where position i sees j <= i if j < keep or j is among the latest window - keep, by an explicit mask."""
    length = tokens.shape[1]
    mask = np.zeros((length, length), dtype=bool)
    for i in range(length):
        for j in range(i + 1):
            mask[i, j] = j < keep or i - j < window - keep
    return np.array(model.head(model.hidden(mx.array(tokens), mask=mx.array(mask))))


@given(cuts=st.sets(st.integers(1, 39)), window=st.integers(5, 41))
def test_the_rotating_cache_is_attention_under_its_mask(cuts: set[int], window: int) -> None:
    config = CONFIGS["1:1 tied"]
    model = mlx_model(config, weights(config))
    tokens = windows(config, 2, 39)[0]
    chunks = np.diff([0, *sorted(cuts), 40]).tolist()
    assert_close("logits", in_chunks(model, tokens, chunks, window), windowed(model, tokens, window), LOGITS)


@pytest.mark.parametrize("chunks", [[270, 30, 1, 1], [1] * 8 + [200] + [1] * 94, [302]], ids=len)
def test_a_window_that_is_no_multiple_of_the_growth(chunks: list[int]) -> None:
    model = mlx_model(GROUPED, weights(GROUPED))
    tokens = windows(GROUPED, 1, 301)[0]
    assert_close("logits", in_chunks(model, tokens, chunks, 260), windowed(model, tokens, 260), LOGITS)


def test_a_rotating_cache_holds_no_more_than_its_window() -> None:
    model = mlx_model(GROUPED, weights(GROUPED))
    cache = model.make_cache(window=8)
    for chunk in (3, 20, 1, 1):
        model(mx.zeros((1, chunk), mx.int32), cache)
    model(mx.zeros((1, 1), mx.int32), cache)
    assert {len(entry.update(*new_rows(model))[0][0, 0]) for entry in cache} == {8}
    with pytest.raises(ValueError, match="window = 4 must be larger than keep = 4"):
        RotatingKVCache(4)


def new_rows(model: ContinualLLM) -> tuple[mx.array, mx.array]:
    """Keys and values (1, K, 1, d) of one more token."""
    zeros = mx.zeros((1, model.config.num_kv_heads, 1, model.config.head_width))
    return zeros, zeros


# -- gradient checkpointing ----------------------------------------------------------


@pytest.mark.parametrize("adapted", [False, True], ids=["full", "LoRA"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_recomputed_gradients_are_the_gradients(config: ModelConfig, adapted: bool) -> None:
    model = mlx_model(config, weights(config))
    if adapted:
        lora.attach_arrays(model, to_mlx(adapter(config, rank=3)), scale=2.0)
    tokens, mask = windows(config, 3, 21)
    loss, gradients = mlx_loss_gradients(model, tokens, mask)
    before = from_mlx(model.parameters())
    model.checkpoint_gradients(True)
    again, recomputed = mlx_loss_gradients(model, tokens, mask)
    # The same operations on the same shapes; on one device they are even bit-identical, fused ones may not be.
    assert_close("loss", again, loss, of_largest=1e-6)
    assert_all_close("gradient", recomputed, gradients, of_largest=1e-6)
    assert all(np.array_equal(array, before[name]) for name, array in from_mlx(model.parameters()).items())


@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_are_those_of_what_dropout_left(recompute: bool) -> None:
    """Against differences of the loss, the random state being the same each time."""
    config = replace(CONFIGS[next(iter(CONFIGS))], dropout=0.3)
    model = mlx_model(config, weights(config))
    model.train()
    model.checkpoint_gradients(recompute)
    tokens, _ = windows(config, 3, 21)
    embedding = model.model.embed_tokens
    start = embedding.weight
    direction = mx.random.normal(start.shape, key=mx.random.key(1))

    def value(weight: mx.array) -> mx.array:
        mx.random.seed(5)
        embedding.weight = weight
        return (model(mx.array(tokens)) ** 2).mean()

    slope = (mx.grad(value)(start) * direction).sum().item()
    step = 1e-3
    found = (value(start + step * direction) - value(start - step * direction)).item() / (2 * step)
    assert slope == pytest.approx(found, rel=2e-2)
    assert value(start).item() != pytest.approx(mx.square(model.train(False)(mx.array(tokens))).mean().item(), rel=1e-3)


def test_checkpointing_saves_memory() -> None:
    config = ModelConfig(61, 32, 8, 4, 2, 96)
    model = mlx_model(config, weights(config))
    tokens, mask = windows(config, 4, 128)
    peaks = []
    for on in (False, True):
        model.checkpoint_gradients(on)
        gc.collect()  # of what other tests left
        mx.reset_peak_memory()
        held = mx.get_active_memory()
        mlx_loss_gradients(model, tokens, mask)
        peaks.append(mx.get_peak_memory() - held)
    # One layer's activations and eight residual streams instead of eight layers' activations: 9.5 MB for 25 here.
    assert peaks[1] < 0.5 * peaks[0], peaks


# -- seeds, dropout, dtype -----------------------------------------------------------


def test_random_weights_are_a_function_of_the_seed_alone() -> None:
    config = CONFIGS["3:1 untied biases theta 500000"]
    mx.random.seed(1)
    first = from_mlx(ContinualLLM(config, seed=5).parameters())
    mx.random.seed(2)
    second = from_mlx(ContinualLLM(config, seed=5).parameters())
    other = from_mlx(ContinualLLM(config, seed=6).parameters())
    assert all(np.array_equal(first[name], second[name]) for name in first)
    matrices = [name for name, array in first.items() if array.ndim == 2]
    assert matrices
    assert not any(np.array_equal(first[name], other[name]) for name in matrices)


def test_random_weights_have_the_deviation_they_promise() -> None:
    config = ModelConfig(256, 64, 8, 4, 2, 256, attention_bias=True)
    for name, array in from_mlx(ContinualLLM(config).parameters()).items():
        if array.ndim == 1:
            assert (array == (0 if name.endswith("bias") else 1)).all(), name
            continue
        wanted = 0.02 / 4 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02  # sqrt(2 * 8) = 4
        # The deviation of n normal numbers scatters by 1/sqrt(2n), 1.6 % for the smallest matrix: 5 times that.
        assert array.std() == pytest.approx(wanted, rel=0.08), name


def test_dropout_acts_in_training_mode_only() -> None:
    plain = ModelConfig(61, 32, 2, 4, 4, 48)
    dropping = ModelConfig(61, 32, 2, 4, 4, 48, dropout=0.5)
    model, expected = mlx_model(dropping, weights(plain)), mlx_model(plain, weights(plain))
    tokens = mx.array(windows(plain, 2, 9)[0])
    assert mx.array_equal(model(tokens), expected(tokens)), "a new model evaluates"
    model.train()
    mx.random.seed(0)
    first, second = model(tokens), model(tokens)
    mx.random.seed(0)
    assert mx.array_equal(model(tokens), first), "the draw is a function of MLX's random state"
    assert not mx.allclose(first, second, atol=1e-2)
    model.eval()
    assert mx.array_equal(model(tokens), expected(tokens))


@pytest.mark.parametrize(("dtype", "digits"), [(mx.float32, 2**-24), (mx.float16, 2**-11), (mx.bfloat16, 2**-8)])
def test_a_loaded_model_computes_in_the_dtype_asked_for(tmp_path: Path, dtype: mx.Dtype, digits: float) -> None:
    config = CONFIGS["4:2 untied linear scaling, heads wider than D/H"]
    directory = write_model_directory(tmp_path / "m", config, weights(config), {}, {}, {})
    model = ContinualLLM.from_checkpoint(directory, dtype)
    assert model.config == config
    assert {array.dtype for _, array in tree_flatten(model.parameters())} == {dtype}
    tokens = mx.array(windows(config, 2, 15)[0])
    logits = model(tokens)
    assert logits.dtype == dtype
    expected = mlx_model(config, weights(config))(tokens)
    # Each of some 20 roundings on the way moves unit activations by at most `digits`; 64 leaves room for growth.
    assert_close("logits", logits.astype(mx.float32), expected, atol=64 * digits)


def test_a_directory_that_does_not_fit_is_refused_with_every_tensor_named(tmp_path: Path) -> None:
    config = CONFIGS["1:1 tied"]
    arrays = weights(config)
    arrays["model.extra.weight"] = arrays.pop("model.norm.weight")
    arrays["model.layers.1.mlp.up_proj.weight"] = arrays["model.layers.1.mlp.up_proj.weight"][:-1]
    directory = write_model_directory(tmp_path / "m", config, weights(config), {}, {}, {})
    mx.save_safetensors(str(directory / "model.safetensors"), to_mlx(arrays))
    (directory / "minimac.json").unlink()  # its hash would be the first to object
    names = r"model\.norm\.weight.*model\.extra\.weight.*up_proj\.weight is \[47, 32\]"
    with pytest.raises(DamagedFileError, match=names):
        ContinualLLM.from_checkpoint(directory)
