"""Bases of other architectures, opened through mlx-lm; `open_model` decides who opens what.

Llama directories are our own model's. Everything else that mlx-lm knows is wrapped, not copied: `ForeignLLM` gives the
network what `base.BaseModel` asks for, under mlx-lm's own parameter names. What it cannot find out it does without:
where the logits are more than one matrix product the loss takes them whole, which is slower and as right.

No code of a model is run: config.json and the weights are checked before mlx-lm reads either.
"""

import contextlib
import importlib.metadata
import io
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from convert.model import GENERATION_CONFIG, read_tokenizer
from mlx_impl import foreigndir, kernels, modeldir, quantised
from mlx_impl.arrays import check_finite, flatten
from mlx_impl.base import BaseModel
from mlx_impl.conversion import lessons_stay
from mlx_impl.device import can_compile, keep_quantised
from mlx_impl.errors import DamagedFileError, InputError, MiniMacError
from mlx_impl.files import atomic_folder, read_json, write_json
from mlx_impl.model import ContinualLLM
from mlx_impl.packing import KEYS, Packing

TESTED = (
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "gemma",
    "gemma2",
    "gemma3_text",
    "phi3",
    "mistral",
    "olmo2",
    "cohere",
    "starcoder2",
    "gpt2",
)
"""What the tests teach, among some hundred that mlx-lm knows."""


def open_model(directory: str | Path, dtype: mx.Dtype = mx.float32) -> BaseModel:
    """A model directory, ready to be taught; weights are cast to `dtype`, quantised ones as `device` says.

    Raises InputError where it is not there, of an architecture that is not supported, or names code to be run;
    DamagedFileError where its files are not what they claim to be.
    """
    directory = Path(directory).expanduser()
    if read_json(directory / modeldir.CONFIG).get("model_type", "llama") == "llama":
        return ContinualLLM.from_checkpoint(directory, dtype)
    return ForeignLLM.from_directory(directory, dtype)


def linear_shapes(model: BaseModel) -> dict[str, tuple[int, int]]:
    """Name of the weights of each linear layer inside the transformer layers -> (out, in), packed or not."""
    inside = {id(module) for layer in model.layers for _, module in layer.named_modules()}
    found = {path: module for path, module in model.named_modules() if id(module) in inside}
    linears = ((path, module) for path, module in found.items() if isinstance(module, quantised.LINEAR))
    return {f"{path}.weight": quantised.linear_shape(module) for path, module in linears}


@dataclass(frozen=True)
class ForeignShape:
    """What a lesson goes by (see `memory.Shape`), found in config.json under its many names, and in the network."""

    vocab_size: int
    d_model: int
    num_layers: int
    num_query_heads: int
    d_ff: int
    max_seq_len: int


class ForeignLLM:
    """A network of mlx-lm's as a base. `hidden` and `head` are its own where they can be told apart (see `_head_of`).

    Elsewhere `hidden` gives the logits already, and `head` hands them on.
    """

    def __init__(self, network: nn.Module, config: Mapping[str, Any]) -> None:
        """`config` is that of config.json. InputError for a network that keeps more than keys and values."""
        self._network = network
        self._layers = _layers_of(network)
        self._decoder, self._head, logits = _head_of(network)
        self._shape = _shape_of(network, config, logits.shape[-1])
        self.positions = _learned_positions(network)
        """Positions that the network has an embedding for, where these are learned; None where they are computed."""
        strange = sorted({type(cache).__name__ for cache in self.make_cache() if not hasattr(cache, "offset")})
        if strange:
            raise InputError(
                f"model_type {config.get('model_type')!r:.60} keeps more than keys and values of what it read "
                f"({', '.join(strange)}); recurrent and hybrid models are not supported"
            )

    @classmethod
    def from_directory(cls, directory: str | Path, dtype: mx.Dtype = mx.float32) -> "ForeignLLM":
        """Open a model directory through mlx-lm, which takes seconds to import; errors as in `open_model`."""
        directory = Path(directory).expanduser()
        config, load = _checked(directory)
        with _explained(directory, config):
            network = load(directory)
            if not keep_quantised():
                quantised.unpack_layers(network)
            network.set_dtype(dtype)
            mx.eval(network.parameters())
            if not (directory / modeldir.MANIFEST).is_file():  # where there is one, hashes vouch for the values
                check_finite(flatten(network.parameters()), str(directory))
            return cls(network, config)

    @property
    def config(self) -> ForeignShape:
        """Its sizes and its context."""
        return self._shape

    @property
    def layers(self) -> Sequence[nn.Module]:
        """The transformer layers, first to last: the list that the network itself goes through."""
        return self._layers

    @property
    def vocab_size(self) -> int:
        """Number of logits; a tokenizer may have fewer ids."""
        return self._shape.vocab_size

    @property
    def head_weight(self) -> mx.array | None:
        """(V, D), of which the logits are the product with the hidden states; None where they are more than that."""
        return None if self._head is None else self._head.weight

    def __call__(self, tokens: mx.array, cache: Sequence[Any] | None = None) -> mx.array:
        """Logits (B, T, V) of tokens (B, T); with a cache, T new tokens after those it holds."""
        self._check_positions(tokens, cache)
        logits: mx.array = self._network(tokens, cache=cache)
        return logits

    def hidden(self, tokens: mx.array, cache: Sequence[Any] | None = None) -> mx.array:
        """Final hidden states (B, T, D) of tokens (B, T), or without a `head_weight` their logits (B, T, V)."""
        self._check_positions(tokens, cache)
        states: mx.array = self._decoder(tokens, cache=cache)
        return states

    def _check_positions(self, tokens: mx.array, cache: Sequence[Any] | None) -> None:
        """InputError for tokens beyond the last learned position: MLX would read what lies behind the table."""
        end = tokens.shape[1] + (cache[0].offset if cache else 0)
        if self.positions is not None and end > self.positions:
            raise InputError(
                f"{end:,} tokens, and the model has learned {self.positions:,} positions; shorten the text"
            )

    def head(self, hidden: mx.array) -> mx.array:
        """Logits (..., V) of what `hidden` returns."""
        return hidden if self._head is None else hidden @ self._head.weight.T

    def make_cache(self, window: int | None = None) -> list[Any]:
        """mlx-lm's caches, one a layer. With `window` they keep that many tokens, the first four always among them.

        InputError for a window that is too small, and where the architecture has caches of its own.
        """
        from mlx_lm.models.cache import make_prompt_cache

        if window is not None and hasattr(self._network, "make_cache"):
            raise InputError("--window: this architecture has windows of its own; leave it out")
        if window is not None and window < 5:
            raise InputError(f"window = {window} must be larger than 4, the first tokens, which always stay")
        caches: list[Any] = make_prompt_cache(self._network, window)
        return caches

    # What follows is the network's, so that parameters keep mlx-lm's names.

    def parameters(self) -> dict:
        """Tree of all weights."""
        return self._network.parameters()

    def trainable_parameters(self) -> dict:
        """Tree of the weights that are not frozen."""
        return self._network.trainable_parameters()

    def named_modules(self) -> list[tuple[str, nn.Module]]:
        """Every module with its dotted path."""
        return self._network.named_modules()

    def update(self, parameters: dict, strict: bool = True) -> Any:
        """Replace weights by those of a tree of the same names."""
        return self._network.update(parameters, strict)

    def update_modules(self, modules: Any, strict: bool = True) -> Any:
        """Replace modules by those of a tree of the same names."""
        return self._network.update_modules(modules, strict)

    def freeze(self) -> Any:
        """Exclude every weight from training."""
        return self._network.freeze()

    def unfreeze(self) -> Any:
        """Include every weight again."""
        return self._network.unfreeze()

    def train(self, mode: bool = True) -> Any:
        """Switch dropout on, or with False off."""
        return self._network.train(mode)


def _checked(directory: Path) -> tuple[dict[str, Any], Callable[[Path], nn.Module]]:
    """config.json, and what opens the directory, after all that can be checked before; errors as in `open_model`."""
    where = directory / modeldir.CONFIG
    config = read_json(where)
    foreigndir.check_config(config, str(where))
    foreigndir.checked_tensors(directory)
    return config, _loader(config, str(where))


def write_quantised(
    source: Path,
    target: Path,
    packing: Packing,
    dtype: str | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Pack a model directory of another architecture as `mlx_lm.convert` does; or nothing. What was done, for JSON.

    `dtype` is that of what is not packed, and of scales and biases (None: as it is); `say` gets what was found. Raises
    InputError where `target` exists, where the source is quantised already or nothing in it can be, else as in
    `open_model`.
    """
    from mlx_lm import utils

    if target.exists():
        raise InputError(f"{target} exists already; name another place or remove it first")
    config, load = _checked(source)
    if any(config.get(key) is not None for key in KEYS):
        raise InputError(f"{source}: its weights are quantised already")
    files = read_tokenizer(source)
    found = f"a model directory of another architecture, {config['model_type']}"
    say(f"{source} is {found}")
    with _explained(source, config):
        network = load(source)
        if dtype is not None:
            network.set_dtype(getattr(mx, dtype))
            config |= {"dtype": dtype, "torch_dtype": dtype}
        parameters = sum(array.size for array in flatten(network.parameters()).values())
        with contextlib.redirect_stdout(io.StringIO()):
            network, config = utils.quantize_model(network, config, packing.group_size, packing.bits)
        arrays = flatten(network.parameters())
        scales = [array for name, array in arrays.items() if name.endswith(".scales")]
        if not scales:
            raise InputError(f"{source}: nothing to quantise: no row is a multiple of {packing.group_size} long")
        check_finite(arrays, str(source))
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(target) as folder:
        write_json(folder / modeldir.CONFIG, config)
        for name, content in files.items():
            (folder / name).write_bytes(content)
        if (source / GENERATION_CONFIG).is_file():
            shutil.copyfile(source / GENERATION_CONFIG, folder / GENERATION_CONFIG)
        quantised.write_arrays(folder / modeldir.WEIGHTS, arrays)
        modeldir.write_manifest(folder, source={"folder": source.resolve().name})
    return {
        "source": str(source),
        "found": found,
        "target": str(target),
        "format": "hf",
        "dtype": str(scales[0].dtype).removeprefix("mlx.core."),
        "parameters": parameters,
        "bits": packing.bits,
        "notes": lessons_stay(source),
    }


def _loader(config: Mapping[str, Any], where: str) -> Callable[[Path], nn.Module]:
    """What opens a directory of this architecture, weights to be read on first use. InputError for an unknown one."""
    from mlx_lm import utils

    classes_of = utils._get_classes  # an mlx-lm that has it no longer must not make all architectures unknown
    try:
        with contextlib.redirect_stdout(sys.stderr):
            classes_of(dict(config))
    except (
        ValueError,
        AttributeError,
        SystemExit,
    ):  # no such module, or one with no model or other needs
        raise InputError(
            f"{where}: model_type is {config['model_type']!r:.60}, which neither this program nor mlx-lm "
            f"{importlib.metadata.version('mlx-lm')} knows; tested are llama, {', '.join(TESTED)}"
        ) from None
    if kernels.on_cpu() and not can_compile():
        mx.disable_compile()  # mlx-lm's activations are compiled functions
    return lambda directory: utils.load_model(directory, lazy=True)[0]


@contextlib.contextmanager
def _explained(directory: Path, config: Mapping[str, Any]) -> Iterator[None]:
    """Turn what mlx-lm raises for files that do not fit together into a DamagedFileError.

    What a file can make of a hundred architectures' constructors cannot be foreseen, so every kind of error is meant.
    """
    try:
        yield
    except MiniMacError:
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise DamagedFileError(
            f"{directory}: mlx-lm cannot open it as {config['model_type']}: {reason[:400]}"
        ) from None


def _head_of(network: nn.Module) -> tuple[Any, Any, mx.array]:
    """What gives hidden states, the layer whose weight makes logits of them, and the logits of some first tokens.

    Found by trying: the product must give the network's own logits bit for bit, which leaves no room for a bias, a
    scale or a cap. Where none does: the network itself and None.
    """
    tokens = mx.arange(4)[None]
    logits = network(tokens)  # (1, 4, V)
    top = getattr(network, "language_model", network)
    decoder = getattr(top, "model", None)
    if not isinstance(decoder, nn.Module):
        return network, None, logits
    states = decoder(tokens, cache=None)  # (1, 4, D)
    wanted = logits.shape[-1], states.shape[-1]
    for _, layer in network.named_modules():
        fits = isinstance(layer, nn.Linear | nn.Embedding) and "bias" not in layer and layer.weight.shape == wanted
        if fits and mx.array_equal(states @ layer.weight.T, logits).item():
            return decoder, layer, logits
    return network, None, logits


def _layers_of(network: nn.Module) -> list[nn.Module]:
    """The list itself: `network.layers` is a copy of it in some architectures."""
    first = network.layers[0]
    lists = (value for _, module in network.named_modules() for value in module.values() if isinstance(value, list))
    return next(value for value in lists if value and value[0] is first)


def _learned_positions(network: nn.Module) -> int | None:
    """Rows of the table of positions that GPT-2 and its kind have."""
    tables = (module for path, module in network.named_modules() if path.rpartition(".")[2] == "wpe")
    return next((len(table.weight) for table in tables if isinstance(table, nn.Embedding)), None)


def _shape_of(network: nn.Module, config: Mapping[str, Any], vocab_size: int) -> ForeignShape:
    inner = config.get("text_config")
    described = {**config, **(inner if isinstance(inner, dict) else {})}

    def number(*names: str) -> int | None:
        there = (described.get(name) for name in names)
        return next((value for value in there if type(value) is int and value > 0), None)

    layers = network.layers
    shapes = [
        quantised.linear_shape(module)
        for layer in layers
        for _, module in layer.named_modules()
        if isinstance(module, quantised.LINEAR)
    ]
    width = number("hidden_size", "n_embd", "d_model", "dim") or min((wide for _, wide in shapes), default=1)
    return ForeignShape(
        vocab_size=vocab_size,
        d_model=width,
        num_layers=len(layers),
        num_query_heads=number("num_attention_heads", "n_head", "n_heads", "num_heads") or max(1, width // 64),
        d_ff=max((wide for _, wide in shapes), default=width),  # what goes into the second feed-forward matrix
        max_seq_len=number("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length") or 2048,
    )
