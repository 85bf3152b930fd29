"""A directory we write, opened by transformers and by mlx-lm: the same logits as ours.

Neither knows our configuration class, so this is what shows that `config.json` says the same to all three. Each reads
theta, scaling and tying from other keys and has other defaults for what is absent.
"""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch
from comparing import CONFIGS, Arrays, assert_close, weights, windows
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_impl.config import ModelConfig
from mlx_impl.model import ContinualLLM
from mlx_impl.modeldir import expected_shapes, write_model_directory

every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def written(folder: Path, config: ModelConfig) -> tuple[Path, np.ndarray, np.ndarray]:
    """A model directory, tokens (2, 38), and our logits of them."""
    directory = write_model_directory(folder / "model", config, weights(config), {}, {}, {})
    tokens = windows(config, 2, 37)[0]
    return directory, tokens, np.array(ContinualLLM.from_checkpoint(directory)(mx.array(tokens)))


@every_config
def test_transformers_computes_our_logits(tmp_path: Path, config: ModelConfig) -> None:
    from transformers import LlamaForCausalLM

    directory, tokens, ours = written(tmp_path, config)
    model, report = LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    with torch.no_grad():
        theirs = model(torch.tensor(tokens)).logits.numpy()
    # Unit-size logits; another framework's kernels and float32 angles. A wrong theta is 0.1 and more apart.
    assert_close("logits", ours, theirs, atol=1e-5)


@every_config
def test_mlx_lm_computes_our_logits(tmp_path: Path, config: ModelConfig) -> None:
    from mlx_lm.utils import load_model

    directory, tokens, ours = written(tmp_path, config)
    model, _ = load_model(directory)
    assert_close("logits", ours, model(mx.array(tokens)), atol=1e-5)


@pytest.mark.parametrize("name", ["3:1 untied biases theta 500000", "12:3 tied llama3"])
def test_these_logits_would_show_a_lost_theta_or_scaling(tmp_path: Path, name: str) -> None:
    """The comparisons above must be able to fail: drop what they are about, and the logits part by far more."""
    from mlx_lm.utils import load_model

    config = CONFIGS[name]
    directory, tokens, ours = written(tmp_path, config)
    path = directory / "config.json"
    stripped = json.loads(path.read_text(encoding="utf-8")) | {"rope_theta": 10000.0, "rope_scaling": None}
    path.write_text(json.dumps(stripped), encoding="utf-8")
    model, _ = load_model(directory)
    assert np.abs(np.array(model(mx.array(tokens))) - ours).max() > 1e-2


# -- random configurations -------------------------------------------------------------


@st.composite
def configurations(draw: st.DrawFn) -> ModelConfig:
    """Llama models of one to three layers in any proportions, half of them in those that transformers allows too."""
    kv_heads = draw(st.integers(1, 3))
    heads = kv_heads * draw(st.integers(1, 4))
    head_dim = 2 * draw(st.integers(1, 9))
    # Fewer than 8 numbers can be nearly 0 together, and normalising them magnifies rounding.
    width = heads * draw(st.integers(-(-8 // heads), 9)) if draw(st.booleans()) else draw(st.integers(8, 70))
    return ModelConfig(
        vocab_size=draw(st.integers(2, 90)),
        d_model=width,
        num_layers=draw(st.integers(1, 3)),
        num_query_heads=heads,
        num_kv_heads=kv_heads,
        d_ff=draw(st.integers(1, 80)),
        max_seq_len=64,
        norm_eps=draw(st.sampled_from([1e-6, 1e-5, 1e-3])),
        rope_base=draw(st.floats(10.0, 1e6)),
        tie_embeddings=draw(st.booleans()),
        head_dim=head_dim,
        attention_bias=draw(st.booleans()),
        mlp_bias=draw(st.booleans()),
        rope_scaling=draw(st.sampled_from([None, {"rope_type": "linear", "factor": 4.0}])),
    )


def initial(config: ModelConfig) -> Arrays:
    """Weights as before training: normal with standard deviation 0.02, norms one; biases are small and not zero."""
    rng = np.random.default_rng(1)
    drawn = {name: 0.02 * rng.standard_normal(shape, np.float32) for name, shape in expected_shapes(config).items()}
    return {name: array + np.float32(name.endswith("norm.weight")) for name, array in drawn.items()}


@settings(max_examples=25)
@given(configurations())
def test_any_configuration_means_the_same_to_all_three(
    tmp_path_factory: pytest.TempPathFactory, config: ModelConfig
) -> None:
    """Logits of initial weights, and of weights of unit size: at 0.02 attention is so even that theta hardly shows.

    Unit-size ones are 1e-2 and more apart where theta is lost (above), and rounding reaches 1e-5 in narrow models.
    """
    from mlx_lm.utils import load_model
    from transformers import LlamaForCausalLM

    tokens = windows(config, 2, 20)[0]
    for what, arrays, atol in (("initial", initial(config), 1e-5), ("unit-size", weights(config), 1e-4)):
        folder = tmp_path_factory.mktemp("random")
        directory = write_model_directory(folder / "model", config, arrays, {}, {}, {})
        ours = np.array(ContinualLLM.from_checkpoint(directory)(mx.array(tokens)))
        model, _ = load_model(directory)
        assert_close(f"{what} logits, mlx-lm", ours, model(mx.array(tokens)), atol)
        if config.d_model % config.num_query_heads == 0:
            reference = LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32)
            with torch.no_grad():
                theirs = reference(torch.tensor(tokens)).logits.numpy()
            assert_close(f"{what} logits, transformers", ours, theirs, atol)
