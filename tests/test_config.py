"""Configurations: sizes of the presets, `config.json` in three dialects and back, and what is refused in one message.

The dialects differ in what an absent key means; a theta that is not 10000 shows where one was missed.
"""

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_impl.config import (
    LORA_TARGETS,
    PRESETS,
    RATE_STEPS,
    ContinualLearningConfig,
    ModelConfig,
    TrainConfig,
    checked,
    default_of,
    help_of,
)
from mlx_impl.errors import DamagedFileError, InputError

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
CONFIG = ModelConfig(
    d_model=96, num_query_heads=6, num_kv_heads=2, rope_base=500000.0, tie_embeddings=False, eos_token_id=2
)


def test_presets() -> None:
    assert PRESETS["medium"].num_parameters() == 127_224_576
    assert list(PRESETS) == ["tiny", "small", "medium", "large"]
    small, large = PRESETS["small"], PRESETS["large"]
    assert (small.d_model, small.num_layers, small.num_query_heads, small.num_kv_heads) == (512, 6, 8, 2)
    assert (large.d_model, large.num_layers, large.num_query_heads, large.num_kv_heads) == (1024, 16, 16, 4)


def test_the_default_adapter_on_medium() -> None:
    """2,774,016 parameters, 2.18 % more: rank times (in + out) of seven projections a layer."""
    c, rank = PRESETS["medium"], ContinualLearningConfig().lora_r
    kv = c.num_kv_heads * c.head_width
    sizes = [(c.d_model, c.d_model)] * 2 + [(c.d_model, kv)] * 2 + [(c.d_model, c.d_ff)] * 3
    assert len(sizes) == len(LORA_TARGETS)
    assert c.num_layers * rank * sum(a + b for a, b in sizes) == 2_774_016


@given(
    theta=st.sampled_from([10000.0, 500000.0, 100000.0]),
    tied=st.booleans(),
    biases=st.booleans(),
    scaling=st.sampled_from([None, LLAMA3, {"rope_type": "linear", "factor": 2.0}]),
    head_dim=st.sampled_from([None, 32]),
    eos=st.sampled_from([None, 2, [2, 3]]),
)
def test_config_json_and_back(
    theta: float, tied: bool, biases: bool, scaling: dict | None, head_dim: int | None, eos: Any
) -> None:
    config = dataclasses.replace(
        CONFIG,
        rope_base=theta,
        tie_embeddings=tied,
        attention_bias=biases,
        mlp_bias=biases,
        rope_scaling=scaling,
        head_dim=head_dim,
        eos_token_id=eos,
    )
    assert ModelConfig.from_hf(config.to_hf()) == config


def test_both_dialects_of_theta_are_read() -> None:
    full = CONFIG.to_hf()
    new = {k: v for k, v in full.items() if k not in ("rope_theta", "rope_scaling")}  # transformers 5
    old = {k: v for k, v in full.items() if k != "rope_parameters"}  # transformers 4, mlx-lm
    assert ModelConfig.from_hf(new).rope_base == ModelConfig.from_hf(old).rope_base == 500000.0
    scaled = dataclasses.replace(CONFIG, rope_scaling=LLAMA3).to_hf()
    del scaled["rope_scaling"]
    assert ModelConfig.from_hf(scaled).rope_scaling == LLAMA3
    oldest = {**old, "rope_scaling": {"type": "linear", "factor": 4.0}}
    assert ModelConfig.from_hf(oldest).rope_scaling == {"rope_type": "linear", "factor": 4.0}


def test_absent_keys_mean_what_they_do_in_the_format() -> None:
    full = CONFIG.to_hf()
    for key in ("tie_word_embeddings", "num_key_value_heads", "head_dim"):
        del full[key]
    config = ModelConfig.from_hf(full)
    assert not config.tie_embeddings
    assert config.num_kv_heads == 6
    assert config.head_dim == 16


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"auto_map": {"AutoModel": "x.py"}}, InputError, "auto_map names code"),
        ({"model_file": "x.py"}, InputError, "model_file names code"),
        ({"model_type": "qwen2"}, InputError, "model_type is 'qwen2'"),
        ({"hidden_act": "gelu"}, InputError, "hidden_act is 'gelu'"),
        ({"quantization": {"bits": 4}}, InputError, "quantised"),
        ({"rope_traditional": True}, InputError, "half-split"),
        ({"num_hidden_layers": 0}, DamagedFileError, "num_layers = 0"),
        ({"num_hidden_layers": "12"}, DamagedFileError, "num_layers = '12'"),
        ({"vocab_size": -5}, DamagedFileError, "vocab_size = -5"),
        ({"rms_norm_eps": float("nan")}, DamagedFileError, "norm_eps = nan"),
        ({"rope_theta": "big"}, DamagedFileError, "big"),
        ({"rope_scaling": "yes"}, DamagedFileError, "rope_scaling is no object"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2}}, DamagedFileError, "'yarn' is not supported"),
        ({"rope_scaling": {**LLAMA3, "high_freq_factor": 1.0}}, DamagedFileError, "must be less than"),
        ({"rope_scaling": {"rope_type": "linear"}}, DamagedFileError, "factor = None"),
        ({"rope_scaling": {**LLAMA3, "beta_fast": [1]}}, DamagedFileError, r"does not have beta_fast = \[1\]"),
    ],
)
def test_wrong_config_json(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as raised:
        ModelConfig.from_hf({**CONFIG.to_hf(), **changes}, "dir/config.json")
    assert str(raised.value).startswith("dir/config.json: ")
    assert "\n" not in str(raised.value)


def test_a_missing_key_is_named() -> None:
    broken = CONFIG.to_hf()
    del broken["hidden_size"]
    with pytest.raises(DamagedFileError, match="'hidden_size' is missing"):
        ModelConfig.from_hf(broken)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_query_heads": 6, "num_kv_heads": 4, "d_model": 96}, "6 is no multiple of num_kv_heads = 4"),
        ({"d_model": 100, "num_query_heads": 12}, "100 is no multiple of num_query_heads = 12"),
        ({"head_dim": 7}, "head_dim = 7 must be an even number"),
        ({"dropout": 1.0}, r"dropout = 1.0 must lie in \[0, 1\)"),
        ({"d_ff": 0, "num_layers": -1}, "num_layers = -1 .*; d_ff = 0"),
        ({"vocab_size": True}, "vocab_size = True"),
    ],
)
def test_wrong_models_are_refused_with_all_reasons(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ModelConfig(**values)


@pytest.mark.parametrize(
    ("cls", "values", "message"),
    [
        (TrainConfig, {"lr": -1.0, "batch_size": 0}, "batch_size = 0 .*; lr = -1.0"),
        (TrainConfig, {"steps": 3, "minutes": 1.0}, "exclude each other"),
        (TrainConfig, {"loss_on": "some"}, "loss_on = 'some'"),
        (TrainConfig, {"warmup": 1.5}, "warmup = 1.5"),
        (ContinualLearningConfig, {"lora_r": 0, "learning_rate": float("inf")}, "lora_r = 0 .*; learning_rate = inf"),
        (ContinualLearningConfig, {"holdout": 1.0}, "holdout = 1.0"),
        (ContinualLearningConfig, {"device": "tpu"}, "device = 'tpu'"),
    ],
)
def test_wrong_runs_and_lessons(cls: type, values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        cls(**values)


def test_checked_names_everything_at_once() -> None:
    with pytest.raises(
        InputError, match=r"f\.yaml: speed \(unknown\), lr \('x' is not a float\); known keys are epochs"
    ):
        checked(TrainConfig, {"speed": 1, "lr": "x"}, "f.yaml")
    assert checked(TrainConfig, {"lr": 1, "steps": 5}, "f.yaml") == TrainConfig(lr=1, steps=5)


@pytest.mark.parametrize("cls", [ModelConfig, TrainConfig, ContinualLearningConfig])
def test_every_field_explains_itself(cls: type) -> None:
    for field in dataclasses.fields(cls):
        assert len(help_of(cls, field.name)) > 8
        assert default_of(cls, field.name) == field.default


def test_the_peak_rate_falls_with_the_number_of_steps_unless_it_was_asked_for() -> None:
    config = ContinualLearningConfig()
    assert [config.peak_rate(steps) for steps in (1, RATE_STEPS, 4 * RATE_STEPS)] == [2e-3, 2e-3, 1e-3]
    asked = checked(ContinualLearningConfig, {"learning_rate": "3e-4"}, "x")
    assert asked.peak_rate(1) == asked.peak_rate(1000) == asked.peak_rate(1000, held=True) == 3e-4


def test_a_lesson_that_holds_others_keeps_its_rate_for_longer() -> None:
    config = ContinualLearningConfig()
    assert [config.peak_rate(steps, held=True) for steps in (40, 160, 640)] == [2e-3, 2e-3, 1e-3]
