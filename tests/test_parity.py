"""The MLX side against the PyTorch reference, in float32: logits, gradients, LoRA, training, greedy decoding.

Weights are formulas, so that both sides hold the same bits without a random generator in between, and whole tensors
are compared. Activations and logits have unit size. The tolerances are DESIGN's: logits 1e-5 absolute (seen: 3e-6, an
ulp of the intermediate sums), gradients 1e-4 of a tensor's largest entry (seen: 4e-6).
"""

import ast
import importlib
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch
from comparing import (
    CONFIGS,
    adapter,
    assert_all_close,
    assert_close,
    assert_logits_close,
    first_divergence,
    from_mlx,
    from_torch,
    mlx_loss_gradients,
    mlx_model,
    to_mlx,
    to_torch,
    torch_loss_gradients,
    torch_model,
    wave,
    weights,
    windows,
)
from mlx.utils import tree_flatten

import mlx_impl.generate
import mlx_impl.lora
import mlx_impl.loss
import mlx_impl.model
import mlx_impl.optim
import mlx_impl.train
import torch_ref.generate
import torch_ref.lora
import torch_ref.loss
import torch_ref.model
import torch_ref.train
from mlx_impl.config import ModelConfig
from mlx_impl.errors import DamagedFileError, InputError
from mlx_impl.modeldir import expected_shapes, write_model_directory

LOGITS = 1e-5
GRADIENTS = 1e-4
SCALE = 1.5  # of the adapters; 1 would hide a scale applied twice or never

every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def adapted(config: ModelConfig, rank: int = 3) -> tuple[mlx_impl.model.ContinualLLM, torch_ref.model.ContinualLLM]:
    """Both models with the same adapter on."""
    ours, reference = mlx_model(config, weights(config)), torch_model(config, weights(config))
    mlx_impl.lora.attach_arrays(ours, to_mlx(adapter(config, rank)), SCALE)
    torch_ref.lora.attach_arrays(reference, to_torch(adapter(config, rank)), SCALE)
    return ours, reference


# -- the arithmetic, piece by piece --------------------------------------------------


@every_config
def test_rope_frequencies(config: ModelConfig) -> None:
    ours = np.array(mlx_impl.model.rope_frequencies(config))
    reference = torch_ref.model.rope_frequencies(config).numpy()
    assert_close("periods, relative", ours / reference, np.ones_like(reference), atol=2e-6)  # float32 powers


def test_llama3_scaling_meets_all_of_its_three_cases() -> None:
    config = CONFIGS["12:3 tied llama3"]
    plain = 500000.0 ** (np.arange(0, config.head_width, 2) / config.head_width)
    stretch = np.array(mlx_impl.model.rope_frequencies(config)) / plain
    assert stretch[[0, 1, 3]] == pytest.approx([1, 1, 8], rel=1e-5)
    assert 1.1 < stretch[2] < 7.9


@pytest.mark.parametrize("size", [1.0, 1e4])
def test_cross_entropy(size: float) -> None:
    logits, targets = wave((3, 5, 17), 0.0) * np.float32(size), np.arange(15).reshape(3, 5)
    ours = mlx_impl.loss.cross_entropy(mx.array(logits), mx.array(targets))
    reference = torch_ref.loss.cross_entropy(torch.tensor(logits), torch.tensor(targets))
    definition = torch.nn.functional.cross_entropy(
        torch.tensor(logits, dtype=torch.float64).flatten(0, 1),
        torch.tensor(targets).flatten(),
        reduction="none",
    )
    assert_close("ours", ours, definition.reshape(3, 5), of_largest=1e-6)
    assert_close("reference", reference, definition.reshape(3, 5), of_largest=1e-6)


@pytest.mark.parametrize("size", [1.0, 30.0])
def test_divergence(size: float) -> None:
    random = np.random.default_rng(2)
    logits, teacher = (size * random.standard_normal((2, 5, 40), np.float32) for _ in range(2))
    ours = mlx_impl.loss.divergence(mx.array(logits), mx.array(teacher))
    reference = torch_ref.loss.divergence(torch.tensor(logits), torch.tensor(teacher))
    ours_p, theirs_p = (torch.log_softmax(torch.tensor(x), -1) for x in (logits, teacher))
    definition = torch.nn.functional.kl_div(ours_p, theirs_p, reduction="none", log_target=True).sum(-1)
    np.testing.assert_allclose(np.array(ours), reference.numpy(), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(reference.numpy(), definition.numpy(), rtol=1e-5, atol=1e-5)


# -- forward and backward ------------------------------------------------------------


@every_config
@pytest.mark.parametrize("length", [1, 13, 37])
def test_logits_from_mlx_weights_to_torch(config: ModelConfig, length: int) -> None:
    ours = mlx_model(config, weights(config))
    reference = torch_ref.model.ContinualLLM(config)
    reference.load_state_dict(to_torch(from_mlx(ours.parameters())))
    assert_logits_close(ours, reference, windows(config, 3, length)[0][:, :-1], LOGITS)


@every_config
def test_logits_from_torch_weights_to_mlx(config: ModelConfig) -> None:
    reference = torch_ref.model.ContinualLLM(config, seed=3)
    arrays = from_torch(reference.state_dict())
    ours = mlx_impl.model.ContinualLLM(config, seed=4)
    ours.load_weights([(name, mx.array(array)) for name, array in arrays.items()])
    assert_logits_close(ours, reference, windows(config, 3, 29)[0], LOGITS)


def test_both_read_the_same_directory(tmp_path: Path) -> None:
    config = CONFIGS["3:1 untied biases theta 500000"]
    directory = write_model_directory(tmp_path / "m", config, weights(config), {}, {}, {})
    ours = mlx_impl.model.ContinualLLM.from_checkpoint(directory)
    reference = torch_ref.model.ContinualLLM.from_checkpoint(directory)
    assert reference.config == ours.config == config
    state = from_torch(reference.state_dict())
    assert {name: array.shape for name, array in state.items()} == expected_shapes(config)
    held = from_mlx(ours.parameters())
    assert all(np.array_equal(state[name], held[name]) for name in state)
    assert_logits_close(ours, reference, windows(config, 2, 9)[0], LOGITS)


@every_config
@pytest.mark.parametrize("length", [13, 37])
def test_gradients_of_every_tensor(config: ModelConfig, length: int) -> None:
    tokens, mask = windows(config, 3, length)
    loss, gradients = mlx_loss_gradients(mlx_model(config, weights(config)), tokens, mask)
    expected_loss, expected = torch_loss_gradients(torch_model(config, weights(config)), tokens, mask)
    assert sorted(expected) == sorted(expected_shapes(config))
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert_all_close("gradient", gradients, expected, of_largest=GRADIENTS)


@every_config
def test_far_positions(config: ModelConfig) -> None:
    """Near position 2000 float32 angles are off by an ulp of 1e-4 radians; the reference's are taken in float64."""
    ours, reference = mlx_model(config, weights(config)), torch_model(config, weights(config))
    assert_logits_close(ours, reference, windows(config, 1, 2047)[0], 1e-4)


@every_config
def test_an_explicit_mask(config: ModelConfig) -> None:
    ours, reference = mlx_model(config, weights(config)), torch_model(config, weights(config))
    tokens = windows(config, 2, 20)[0]
    near = np.subtract.outer(np.arange(21), np.arange(21))
    mask = (near >= 0) & (near < 5)
    with torch.no_grad():
        expected = reference.hidden(torch.tensor(tokens), mask=torch.tensor(mask))
    assert_close("hidden", ours.hidden(mx.array(tokens), mask=mx.array(mask)), expected, LOGITS)


@every_config
def test_cached_logits(config: ModelConfig) -> None:
    ours, reference = mlx_model(config, weights(config)), torch_model(config, weights(config))
    tokens = windows(config, 2, 22)[0]
    mlx_cache, torch_cache = ours.make_cache(), reference.make_cache()
    for start, end in ((0, 7), (7, 8), (8, 19), (19, 23)):
        actual = ours(mx.array(tokens[:, start:end]), mlx_cache)
        with torch.no_grad():
            expected = reference(torch.tensor(tokens[:, start:end]), torch_cache)
        assert_close(f"logits of {start}:{end}", actual, expected, LOGITS)
    with torch.no_grad():
        whole = reference(torch.tensor(tokens))[:, 19:]
    assert_close("the reference's cache against its full forward", expected, whole, LOGITS)


# -- LoRA ----------------------------------------------------------------------------


@every_config
def test_lora_logits_attached_fused_and_detached(config: ModelConfig) -> None:
    ours, reference = adapted(config)
    tokens = windows(config, 3, 17)[0]
    attached = np.array(ours(mx.array(tokens)))
    assert_logits_close(ours, reference, tokens, LOGITS)
    base = mlx_model(config, weights(config))
    assert np.abs(attached - np.array(base(mx.array(tokens)))).max() > 1, "the adapter does something"

    mlx_impl.lora.fuse(ours)
    torch_ref.lora.fuse(reference)
    assert_logits_close(ours, reference, tokens, LOGITS)
    with torch.no_grad():
        assert_close("the reference, fused", reference(torch.tensor(tokens)), attached, LOGITS)

    ours, reference = adapted(config)
    mlx_impl.lora.detach(ours)
    torch_ref.lora.detach(reference)
    assert_logits_close(ours, reference, tokens, LOGITS)
    assert_all_close("weight", from_torch(reference.state_dict()), weights(config))


@every_config
def test_lora_gradients(config: ModelConfig) -> None:
    ours, reference = adapted(config)
    tokens, mask = windows(config, 3, 19)
    loss, gradients = mlx_loss_gradients(ours, tokens, mask)
    expected_loss, expected = torch_loss_gradients(reference, tokens, mask)
    assert sorted(expected) == sorted(adapter(config, 3)), "the adapter and nothing else is trained"
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert_all_close("gradient", gradients, expected, of_largest=GRADIENTS)


def test_adapters_cross_in_both_directions() -> None:
    config = CONFIGS["12:3 tied llama3"]
    tokens = windows(config, 2, 11)[0]
    ours, reference = mlx_model(config, weights(config)), torch_model(config, weights(config))
    settings = {"rank": 4, "alpha": 6.0, "targets": ("q_proj", "v_proj", "down_proj")}
    paths = mlx_impl.lora.attach(ours, mlx_impl.lora.LoRAConfig(**settings), mx.random.key(0))
    torch_paths = torch_ref.lora.attach(reference, torch_ref.lora.LoRAConfig(**settings), torch.Generator())
    assert sorted(torch_paths) == sorted(paths)
    shapes = {name: array.shape for name, array in mlx_impl.lora.adapter_arrays(ours).items()}
    from_reference = from_torch(torch_ref.lora.adapter_arrays(reference))
    assert {name: array.shape for name, array in from_reference.items()} == shapes
    assert torch_ref.lora.num_parameters(torch_ref.lora.adapter_arrays(reference)) == sum(
        array.size for array in from_reference.values()
    )
    for number, name in enumerate(name for name in from_reference if name.endswith("lora_b")):
        from_reference[name] = wave(shapes[name], number)  # zero in a fresh adapter
    scale = torch_ref.lora.LoRAConfig(**settings).scale
    mlx_impl.lora.attach_arrays(ours, to_mlx(from_reference), scale)
    torch_ref.lora.attach_arrays(reference, to_torch(from_mlx(mlx_impl.lora.adapter_arrays(ours))), scale)
    assert_logits_close(ours, reference, tokens, LOGITS)


def test_the_reference_refuses_what_the_product_refuses() -> None:
    config = CONFIGS["1:1 tied"]
    arrays = adapter(config, 2)
    del arrays["model.layers.0.mlp.up_proj.lora_b"]
    arrays["model.layers.7.mlp.up_proj.lora_a"] = wave((32, 2), 0.0)
    arrays["model.layers.1.self_attn.q_proj.lora_a"] = wave((3, 2), 0.0)
    arrays["model.layers.1.self_attn.v_proj.m"] = wave((32,), 0.0)
    messages = []
    for model, attach, convert in (
        (mlx_model(config, weights(config)), mlx_impl.lora.attach_arrays, to_mlx),
        (torch_model(config, weights(config)), torch_ref.lora.attach_arrays, to_torch),
    ):
        with pytest.raises(DamagedFileError) as refused:
            attach(model, convert(arrays), SCALE)
        messages.append(str(refused.value))
    assert messages[0] == messages[1]
    assert messages[0].count(";") == 3
    with pytest.raises(InputError, match="no linear layer called wq"):
        torch_ref.lora.attach(
            torch_model(config, weights(config)),
            torch_ref.lora.LoRAConfig(targets=("wq",)),
            torch.Generator(),
        )


# -- training ------------------------------------------------------------------------

STEPS = 100


@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
@pytest.mark.parametrize("name", ["3:1 untied biases theta 500000", "12:3 tied llama3"])
def test_a_hundred_training_steps(name: str, lora: bool) -> None:
    config = CONFIGS[name]
    ours, reference = mlx_model(config, weights(config)), torch_model(config, weights(config))
    if lora:
        ours, reference = adapted(config)
    steps = [[windows(config, 2, 13, phase=n % 3 + 3 * k) for k in range(1 + n % 2)] for n in range(STEPS)]
    rates = [mlx_impl.optim.warmup_cosine(n, STEPS, 10, peak=1e-3) for n in range(STEPS)]
    settings = {"weight_decay": 0.1, "max_grad_norm": 1.0, "betas": (0.9, 0.95), "eps": 1e-8}
    losses = mlx_impl.train.train_steps(
        ours, [[(mx.array(t), mx.array(m)) for t, m in s] for s in steps], rates, **settings
    )
    expected = torch_ref.train.train_steps(
        reference, [[(torch.tensor(t), torch.tensor(m)) for t, m in s] for s in steps], rates, **settings
    )
    assert expected[-1] < 0.8 * expected[0], "it learns, else equal curves would say little"
    # Rounding differs in every sum and training amplifies it: 3e-6 is seen in the losses, 3e-4 in the weights (the
    # key biases, whose gradients are so small that AdamW follows their rounding).
    assert_close("losses, relative", np.divide(losses, expected), np.ones(STEPS), atol=1e-3)
    trained = from_torch({n: p for n, p in reference.named_parameters() if p.requires_grad})
    assert_all_close("trained", from_mlx(dict(tree_flatten(ours.trainable_parameters()))), trained, of_largest=3e-3)


# -- decoding ------------------------------------------------------------------------


@every_config
@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_tokens_with_and_without_cache(config: ModelConfig, penalty: float) -> None:
    ours, reference = mlx_model(config, weights(config)), torch_model(config, weights(config))
    prompt, vocab_size = windows(config, 1, 10)[0][0].tolist(), config.vocab_size - 5
    sampling = mlx_impl.generate.Sampling(repetition_penalty=penalty)
    produced = [
        list(mlx_impl.generate.naive(ours, prompt, 24, sampling, vocab_size)),
        list(mlx_impl.generate.decode(ours, prompt, 24, sampling, vocab_size)),
        list(torch_ref.generate.naive(reference, prompt, 24, penalty, vocab_size)),
        list(torch_ref.generate.decode(reference, prompt, 24, penalty, vocab_size)),
    ]
    assert all(len(tokens) == 24 for tokens in produced)
    assert produced == [produced[0]] * 4


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0.7},
        {"temperature": 2.0, "top_k": 5},
        {"temperature": 1.0, "top_p": 0.4},
        {"temperature": 1.0, "min_p": 0.3},
        {"temperature": 0.5, "top_k": 12, "top_p": 0.8, "min_p": 0.02},
    ],
    ids=str,
)
def test_what_sampling_draws_from(sampling: dict[str, float]) -> None:
    logits, seen = 3 * wave((41,), 1.0), [3, 5, 5, 40]
    ours = mlx_impl.generate.filtered(
        mlx_impl.generate.penalized(mx.array(logits), seen, 1.7), mlx_impl.generate.Sampling(**sampling)
    )
    reference = torch_ref.generate.filtered(torch_ref.generate.penalized(torch.tensor(logits), seen, 1.7), **sampling)
    probabilities = np.exp(np.array(ours))
    assert_close("probabilities", probabilities, reference.exp(), atol=1e-6)
    assert ((probabilities > 0) == (reference.exp().numpy() > 0)).all(), "the same tokens are excluded"


# -- the helper and the arrangement --------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["model.embed_tokens", "model.layers.1.self_attn.k_proj", "model.layers.2.mlp.up_proj", "model.norm"],
)
def test_the_first_diverging_module_is_named(name: str) -> None:
    config = CONFIGS["3:1 untied biases theta 500000"]
    spoiled = weights(config)
    spoiled[f"{name}.weight"] = spoiled[f"{name}.weight"] * np.float32(1.01)
    ours, reference = mlx_model(config, spoiled), torch_model(config, weights(config))
    tokens = windows(config, 2, 9)[0]
    assert first_divergence(ours, reference, tokens, LOGITS).startswith(f"{name}: worst at [")
    with pytest.raises(AssertionError, match=f"^logits: worst at .*; first: {name}: worst at"):
        assert_logits_close(ours, reference, tokens, LOGITS)
    same = mlx_model(config, weights(config))
    assert first_divergence(same, reference, tokens, LOGITS) == "no module differs"


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parent.parent / "torch_ref").glob("[a-z]*.py")), ids=lambda path: path.name
)
def test_every_public_function_of_the_reference_has_its_twin(path: Path) -> None:
    public = [
        node.name
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
    ]
    twin = importlib.import_module(f"mlx_impl.{path.stem}")
    assert [name for name in public if not callable(getattr(twin, name, None))] == []
    assert public or path.stem == "__init__"
