"""LoRA on the MLX model: what it must leave untouched, what it costs, what it refuses, and that mlx-lm reads it.

Most tests here ask for bit-identity and have no tolerance: an adapter that is off, or zero, is no approximation of
the base. Parity of the adapted model itself is in `test_parity.py`.
"""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from comparing import CONFIGS, adapter, assert_close, from_mlx, mlx_model, to_mlx, weights, windows
from mlx.utils import tree_flatten

from mlx_impl import lora
from mlx_impl.adapters import read_adapter, write_adapter
from mlx_impl.arrays import flatten
from mlx_impl.config import LORA_TARGETS, PRESETS
from mlx_impl.errors import DamagedFileError, InputError
from mlx_impl.lora import LoRAConfig
from mlx_impl.model import ContinualLLM
from mlx_impl.modeldir import expected_shapes, write_model_directory
from mlx_impl.train import train_steps

CONFIG = CONFIGS["3:1 untied biases theta 500000"]
TOKENS, MASK = windows(CONFIG, 3, 17)
LORA = LoRAConfig(rank=3, alpha=6.0)


def base() -> ContinualLLM:
    """The base model of these tests, by formula."""
    return mlx_model(CONFIG, weights(CONFIG))


def logits(model: ContinualLLM) -> np.ndarray:
    """Logits of the same windows, always of the same shape."""
    return np.array(model(mx.array(TOKENS)))


def held_arrays(model: ContinualLLM) -> dict[str, mx.array]:
    """The array objects themselves, to be compared with `is`."""
    return dict(tree_flatten(model.parameters()))


def train(model: ContinualLLM, steps: int = 3) -> None:
    """A few steps at a rate that moves every trained weight."""
    batches = [[(mx.array(TOKENS), mx.array(MASK))]] * steps
    train_steps(model, batches, [1e-2] * steps)


# -- what stays as it was ------------------------------------------------------------


def test_a_fresh_adapter_gives_the_base_logits_bit_for_bit() -> None:
    model = base()
    expected = logits(model)
    paths = lora.attach(model, LORA, mx.random.key(0))
    assert len(paths) == 7 * CONFIG.num_layers
    assert all(array.any() for name, array in lora.adapter_arrays(model).items() if name.endswith("lora_a"))
    assert np.array_equal(logits(model), expected)


def test_training_moves_the_adapter_and_leaves_the_base_bit_identical() -> None:
    model = base()
    lora.attach(model, LORA, mx.random.key(0))
    before, fresh = logits(model), from_mlx(lora.adapter_arrays(model))
    assert sorted(flatten(model.trainable_parameters())) == sorted(fresh)
    train(model)
    assert np.abs(logits(model) - before).max() > 0.1
    trained = from_mlx(lora.adapter_arrays(model))
    assert not [name for name in fresh if np.array_equal(trained[name], fresh[name])]
    lora.detach(model)
    after, original = from_mlx(model.parameters()), weights(CONFIG)
    assert not [name for name in original if not np.array_equal(after[name], original[name])]


def test_detaching_restores_the_very_same_arrays() -> None:
    model = base()
    before, expected = held_arrays(model), logits(model)
    lora.attach(model, LORA, mx.random.key(0))
    train(model)
    lora.detach(model)
    after = held_arrays(model)
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    assert np.array_equal(logits(model), expected)
    lora.detach(model)  # nothing is attached any more, and nothing happens
    assert lora.adapter_arrays(model) == {}


def test_attaching_twice_replaces_and_does_not_stack() -> None:
    model = base()
    lora.attach_arrays(model, to_mlx(adapter(CONFIG, rank=2)), scale=3.0)
    once = logits(model)
    lora.attach(model, LORA, mx.random.key(1))
    lora.attach_arrays(model, to_mlx(adapter(CONFIG, rank=2)), scale=3.0)
    assert np.array_equal(logits(model), once)
    assert not [path for path, _ in model.named_modules() if path.endswith("linear.linear")]


def test_switching_adapters_and_back_gives_the_same_logits() -> None:
    model = base()
    first, second = to_mlx(adapter(CONFIG, rank=2)), to_mlx(adapter(CONFIG, rank=5))
    lora.attach_arrays(model, first, scale=3.0)
    expected = logits(model)
    lora.attach_arrays(model, second, scale=0.5)
    assert np.abs(logits(model) - expected).max() > 0.1
    lora.attach_arrays(model, first, scale=3.0)
    assert np.array_equal(logits(model), expected)


# -- fusing --------------------------------------------------------------------------


def test_fused_equals_attached_and_fusing_again_changes_nothing() -> None:
    model = base()
    before = held_arrays(model)
    lora.attach_arrays(model, to_mlx(adapter(CONFIG, rank=4)), scale=2.0)
    attached = logits(model)
    lora.fuse(model)
    assert lora.lora_layers(model) == []
    fused = logits(model)
    # The same sums in another order, on logits of about unit size; a forgotten adapter is 1 apart.
    assert_close("logits", fused, attached, atol=1e-5)
    lora.fuse(model)
    assert np.array_equal(logits(model), fused)
    assert flatten(model.trainable_parameters()) == {}
    original = weights(CONFIG)
    assert all(np.array_equal(np.array(before[name]), original[name]) for name in original), "fusing wrote to the base"


# -- size, seeds, dtype, dropout -----------------------------------------------------


def test_the_default_adapter_on_medium_has_2_774_016_parameters() -> None:
    shapes = expected_shapes(PRESETS["medium"])
    targets = [shape for name, shape in shapes.items() if name.split(".")[-2] in LORA_TARGETS]
    assert sum(LoRAConfig().rank * (width_out + width_in) for width_out, width_in in targets) == 2_774_016
    model = ContinualLLM(PRESETS["medium"])  # lazy: nothing of its 127 million weights is computed
    lora.attach(model, LoRAConfig(), mx.random.key(0))
    assert lora.num_parameters(lora.adapter_arrays(model)) == 2_774_016
    assert LoRAConfig().scale == 2.0


def test_the_key_alone_decides_the_initial_adapter() -> None:
    arrays = []
    for global_seed, key in ((1, 5), (2, 5), (1, 6)):
        model = base()
        mx.random.seed(global_seed)
        lora.attach(model, LORA, mx.random.key(key))
        arrays.append(from_mlx(lora.adapter_arrays(model)))
    same, again, other = arrays
    assert all(np.array_equal(same[name], again[name]) for name in same)
    lora_a = [name for name in same if name.endswith("lora_a")]
    assert not [name for name in lora_a if np.array_equal(same[name], other[name])]
    bounds = {name: np.abs(same[name]).max() * np.sqrt(len(same[name])) for name in lora_a}
    assert all(0.9 < bound <= 1 for bound in bounds.values())  # the largest of at least 90 uniform numbers
    assert len({array.tobytes() for name, array in same.items() if name in lora_a}) == len(lora_a)


def test_an_adapter_on_a_half_precision_base_stays_float32() -> None:
    model = base()
    model.set_dtype(mx.float16)
    arrays = {name: array.astype(mx.float16) for name, array in to_mlx(adapter(CONFIG, rank=2)).items()}
    lora.attach_arrays(model, arrays, scale=1.0)
    assert {array.dtype for array in lora.adapter_arrays(model).values()} == {mx.float32}
    assert model(mx.array(TOKENS)).dtype == mx.float16
    lora.fuse(model)
    assert {array.dtype for _, array in tree_flatten(model.parameters())} == {mx.float16}


def test_adapter_dropout_follows_the_mode_of_the_model() -> None:
    arrays = to_mlx(adapter(CONFIG, rank=2))
    model = base()
    lora.attach_arrays(model, arrays, scale=1.0)
    expected = logits(model)
    lora.attach_arrays(model, arrays, scale=1.0, dropout=0.5)
    assert np.array_equal(logits(model), expected), "attached to a model in evaluation mode"
    model.train()
    assert np.abs(logits(model) - logits(model)).max() > 1e-2
    lora.attach_arrays(model, arrays, scale=1.0, dropout=0.5)
    assert np.abs(logits(model) - logits(model)).max() > 1e-2, "attached to a model in training mode"
    model.eval()
    assert np.array_equal(logits(model), expected)


# -- what is refused -----------------------------------------------------------------


def test_every_misfit_is_named_at_once_and_the_model_stays_as_it_was() -> None:
    model = base()
    expected = logits(model)
    arrays = to_mlx(adapter(CONFIG, rank=2))
    at = "model.layers.0.self_attn"
    del arrays[f"{at}.k_proj.lora_b"]
    arrays[f"{at}.q_proj.lora_a"] = mx.zeros((5, 2))
    arrays["model.layers.9.mlp.up_proj.lora_a"] = mx.zeros((36, 2))
    arrays["model.norm.lora_a"] = mx.zeros((36, 2))
    arrays[f"{at}.v_proj.m"] = mx.zeros((12,))  # DoRA's magnitude: left out, the logits would be wrong
    with pytest.raises(DamagedFileError) as refused:
        lora.attach_arrays(model, arrays, scale=1.0)
    for part in (
        f"{at}.k_proj lacks lora_b",
        f"{at}.q_proj: lora_a [5, 2] and lora_b [2, 36] on a layer 36 -> 36",
        "model.layers.9.mlp.up_proj is no linear layer",
        "model.norm is no linear layer",
        f"{at}.v_proj.m is neither lora_a nor lora_b",
    ):
        assert part in str(refused.value)
    assert "o_proj" not in str(refused.value)
    assert np.array_equal(logits(model), expected)
    with pytest.raises(DamagedFileError, match="holds no arrays"):
        lora.attach_arrays(model, {}, scale=1.0)


def test_targets_the_model_lacks_and_impossible_shapes_are_refused() -> None:
    with pytest.raises(InputError, match="no linear layer called c_attn, wq"):
        lora.attach(base(), LoRAConfig(rank=2, targets=("wq", "q_proj", "c_attn")), mx.random.key(0))
    with pytest.raises(InputError, match="rank = 0"):
        LoRAConfig(rank=0)
    with pytest.raises(InputError, match=r"dropout = 1\.0"):
        LoRAConfig(dropout=1.0)


def test_only_the_named_targets_are_adapted() -> None:
    model = base()
    paths = lora.attach(model, LoRAConfig(rank=2, targets=("q_proj", "down_proj")), mx.random.key(0))
    assert paths == [
        f"model.layers.{i}.{name}" for i in range(CONFIG.num_layers) for name in ("mlp.down_proj", "self_attn.q_proj")
    ]
    assert {name.rpartition(".")[0] for name in flatten(model.trainable_parameters())} == set(paths)


# -- mlx-lm --------------------------------------------------------------------------


def test_mlx_lm_opens_the_adapter_and_computes_the_same(tmp_path: Path) -> None:
    from mlx_lm.tuner.utils import load_adapters
    from mlx_lm.utils import load_model

    shape = LoRAConfig(rank=3, alpha=7.5)
    model = base()
    lora.attach_arrays(model, to_mlx(adapter(CONFIG, shape.rank)), shape.scale)
    folder = tmp_path / "adapter"
    folder.mkdir()
    write_adapter(folder, lora.adapter_arrays(model), shape, model)

    directory = write_model_directory(tmp_path / "model", CONFIG, weights(CONFIG), {}, {}, {})
    theirs, _ = load_model(directory)
    unadapted = np.array(theirs(mx.array(TOKENS)))
    theirs = load_adapters(theirs, str(folder))
    theirs.eval()
    # Same kernels, other order of the sums: the adapter moves these logits by more than 1.
    assert_close("logits", logits(model), theirs(mx.array(TOKENS)), atol=1e-5)
    assert np.abs(logits(model) - unadapted).max() > 1

    expected = logits(model)
    lora.attach_arrays(model, *read_adapter(folder))
    assert np.array_equal(logits(model), expected)
