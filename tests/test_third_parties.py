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
from comparing import CONFIGS, assert_close, weights, windows

from mlx_impl.config import ModelConfig
from mlx_impl.model import ContinualLLM
from mlx_impl.modeldir import write_model_directory

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
