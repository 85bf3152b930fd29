"""Configurations: of a model, of a training run, of continual learning. Each default stands here and only here.

A field's help is its metadata; the command line builds its options from it. `ModelConfig` speaks the names of the
original project; `to_hf` and `from_hf` translate to the `config.json` of Hugging Face and mlx-lm, where every
field is written out because the two disagree about what an absent one means.
"""

import contextlib
import dataclasses
import math
import sys
from dataclasses import dataclass, field
from typing import Any

from mlx_impl.errors import DamagedFileError, InputError, listed, printable, shown

LOSS_ON = ("all", "completion", "assistant")
"""All text; the completion or last assistant turn; every assistant turn. Plain text always counts whole."""

MAX_LAYERS = 1024
"""More than any Llama has; bounds what a hostile configuration makes us build."""

REPLAY_STRATEGIES = ("uniform", "importance", "reservoir")
REPLAY_TARGETS = ("predictions", "tokens")

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def option(default: Any, help: str) -> Any:
    """A dataclass field that carries its own help text."""
    return field(default=default, metadata={"help": help})


def help_of(cls: type, name: str) -> str:
    """The help text of one field of a configuration class."""
    return str({f.name: f for f in dataclasses.fields(cls)}[name].metadata["help"])


def default_of(cls: type, name: str) -> Any:
    """The default of one field of a configuration class."""
    return {f.name: f for f in dataclasses.fields(cls)}[name].default


def checked(cls: type, values: dict[str, Any], where: str, base: Any = None) -> Any:
    """`base`, or else the defaults, changed by a mapping; every unknown key and wrong type is named (InputError).

    Numbers that came as text are taken as such: YAML 1.1 reads `3e-4`, without a dot, as text.
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}
    unknown = [f"{key} (unknown)" for key in values if key not in fields]
    wrong = []
    for key, value in values.items():
        if key in fields and fields[key].type in (float, float | None) and isinstance(value, str):
            with contextlib.suppress(ValueError):
                values = {**values, key: float(value)}
                continue
        default = fields[key].default if key in fields else None
        accepted: tuple[type, ...] = (int, float) if isinstance(default, float) else (type(default),)
        if (
            key in fields
            and default is not None
            and default is not dataclasses.MISSING
            and (not isinstance(value, accepted) or (isinstance(value, bool) and not isinstance(default, bool)))
        ):
            wrong.append(f"{key} ({shown(value)} is not a {type(default).__name__})")
    if unknown or wrong:
        known = f"; known keys are {', '.join(fields)}" if unknown else ""
        raise InputError(f"{where}: {', '.join(unknown + wrong)}{known}")
    return dataclasses.replace(base or cls(), **values)


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a Llama-like transformer. The defaults are the preset `medium`."""

    vocab_size: int = option(32000, "rows of the embedding table")
    d_model: int = option(768, "model width D")
    num_layers: int = option(12, "transformer layers")
    num_query_heads: int = option(12, "query heads H")
    num_kv_heads: int = option(3, "key/value heads K; H must be a multiple of K")
    d_ff: int = option(3072, "width of the SwiGLU hidden layer")
    max_seq_len: int = option(2048, "longest context trained for, in tokens")
    norm_eps: float = option(1e-6, "epsilon of RMSNorm")
    rope_base: float = option(10000.0, "base (theta) of the rotary embedding")
    tie_embeddings: bool = option(True, "whether the output head is the embedding table")
    dropout: float = option(0.0, "dropout on both residual branches while training")
    head_dim: int | None = option(None, "width of one head; default d_model / num_query_heads")
    attention_bias: bool = option(False, "biases on q, k, v and o")
    mlp_bias: bool = option(False, "biases on gate, up and down")
    rope_scaling: dict[str, Any] | None = option(None, "rope scaling as in HF: rope_type linear or llama3, factor, ...")
    bos_token_id: int | None = option(None, "id of the begin-of-text token, if there is one")
    eos_token_id: int | list[int] | None = option(None, "id or ids that end a text")
    pad_token_id: int | None = option(None, "id of the padding token, if there is one")

    def __post_init__(self) -> None:
        """Refuse what cannot be built; all offenders in one message (InputError)."""
        wrong = [
            f"{name} = {shown(getattr(self, name))} must be a whole number of at least 1"
            for name in (
                "vocab_size",
                "d_model",
                "num_layers",
                "num_query_heads",
                "num_kv_heads",
                "d_ff",
                "max_seq_len",
            )
            if not _is_count(getattr(self, name))
        ]
        if not wrong and self.num_layers > MAX_LAYERS:
            wrong.append(f"num_layers = {self.num_layers:,}, at most {MAX_LAYERS:,} are supported")
        if not wrong and self.num_query_heads % self.num_kv_heads:
            wrong.append(
                f"num_query_heads = {self.num_query_heads} is no multiple of num_kv_heads = {self.num_kv_heads}"
            )
        if not wrong and self.head_dim is None:
            if self.d_model % self.num_query_heads:
                wrong.append(
                    f"d_model = {self.d_model} is no multiple of num_query_heads = {self.num_query_heads}; set head_dim"
                )
            object.__setattr__(self, "head_dim", self.d_model // self.num_query_heads)
        if not wrong and (not _is_count(self.head_dim) or (self.head_dim or 0) % 2):
            wrong.append(f"head_dim = {shown(self.head_dim)} must be an even number, rotary embedding turns pairs")
        for name in ("norm_eps", "rope_base"):
            if not _is_positive(getattr(self, name)):
                wrong.append(f"{name} = {shown(getattr(self, name))} must be a positive number")
        if not (isinstance(self.dropout, int | float) and 0 <= self.dropout < 1):
            wrong.append(f"dropout = {shown(self.dropout)} must lie in [0, 1)")
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(self, name)
            ids = value if isinstance(value, list) and name == "eos_token_id" else [value]
            if not all(token is None or type(token) is int for token in ids):
                wrong.append(f"{name} = {shown(value)} must be a token id")
        for name in ("tie_embeddings", "attention_bias", "mlp_bias"):
            if not isinstance(getattr(self, name), bool):
                wrong.append(f"{name} = {shown(getattr(self, name))} must be true or false")
        wrong += _wrong_rope_scaling(self.rope_scaling)
        if wrong:
            raise InputError("model configuration: " + "; ".join(wrong))

    @property
    def head_width(self) -> int:
        """`head_dim`, which is never None once the configuration is built."""
        assert self.head_dim is not None
        return self.head_dim

    def num_parameters(self) -> int:
        """Number of weights, tied ones counted once."""
        q, kv = self.num_query_heads * self.head_width, self.num_kv_heads * self.head_width
        attention = 2 * self.d_model * (q + kv) + (q + 2 * kv + self.d_model if self.attention_bias else 0)
        mlp = 3 * self.d_model * self.d_ff + (2 * self.d_ff + self.d_model if self.mlp_bias else 0)
        tables = self.vocab_size * self.d_model * (1 if self.tie_embeddings else 2)
        return tables + self.num_layers * (attention + mlp + 2 * self.d_model) + self.d_model

    def to_hf(self, dtype: str = "float32") -> dict[str, Any]:
        """`config.json` for transformers 4 and 5 and mlx-lm; `dtype` (float32, float16, bfloat16) is the stored one."""
        scaling = dict(self.rope_scaling) if self.rope_scaling else None
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.vocab_size,
            "hidden_size": self.d_model,
            "intermediate_size": self.d_ff,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_query_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": self.max_seq_len,
            "rms_norm_eps": self.norm_eps,
            # transformers 5 reads rope_parameters, mlx-lm and transformers 4 read the other two.
            "rope_theta": self.rope_base,
            "rope_scaling": scaling,
            "rope_parameters": {"rope_theta": self.rope_base, **(scaling or {"rope_type": "default"})},
            "rope_traditional": False,
            "tie_word_embeddings": self.tie_embeddings,
            "attention_bias": self.attention_bias,
            "mlp_bias": self.mlp_bias,
            "attention_dropout": 0.0,
            "initializer_range": 0.02,
            "residual_dropout": self.dropout,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": self.eos_token_id,
            "pad_token_id": self.pad_token_id,
            "use_cache": True,
            "dtype": dtype,
            "torch_dtype": dtype,
        }

    @classmethod
    def from_hf(cls, config: dict[str, Any], where: str = "config.json") -> "ModelConfig":
        """Read a Llama `config.json` of any of the three dialects.

        Absent keys take transformers' defaults, which are the format's. Raises DamagedFileError for what cannot
        be a Llama configuration, InputError for one that this model does not have or that names code to run.
        """
        code = [key for key in ("auto_map", "model_file") if config.get(key)]
        if code:
            raise InputError(
                f"{where}: {', '.join(code)} names code to be run, which is never done; remove it from a plain Llama"
            )
        if config.get("model_type") != "llama":
            raise InputError(f"{where}: model_type is {shown(config.get('model_type'))}, only 'llama' is read here")
        if config.get("hidden_act", "silu") not in ("silu", "swish"):
            raise InputError(f"{where}: hidden_act is {shown(config['hidden_act'])}, this model has 'silu'")
        if config.get("quantization") or config.get("quantization_config"):
            raise InputError(f"{where}: the weights are quantised; convert them to fp32, fp16 or bf16 first")
        if config.get("rope_traditional"):
            raise InputError(f"{where}: rope_traditional is true, this model has the half-split layout")
        if config.get("pretraining_tp", 1) != 1:
            raise InputError(f"{where}: pretraining_tp is {shown(config['pretraining_tp'])}, only 1 is supported")
        rope = config.get("rope_parameters") or {}
        if not isinstance(rope, dict):
            raise DamagedFileError(f"{where}: rope_parameters is no object")
        scaling = config.get("rope_scaling") or {k: v for k, v in rope.items() if k != "rope_theta"} or None
        if scaling is not None and not isinstance(scaling, dict):
            raise DamagedFileError(f"{where}: rope_scaling is no object")
        if scaling is not None:
            scaling = {k: v for k, v in scaling.items() if k != "rope_theta" and v is not None}
            scaling["rope_type"] = scaling.pop("type", None) or scaling.get("rope_type", "default")
            if scaling["rope_type"] == "default":
                scaling = None
        theta = config.get("rope_theta") or rope.get("rope_theta") or 10000.0
        try:
            heads = config["num_attention_heads"]
            return cls(
                vocab_size=config["vocab_size"],
                d_model=config["hidden_size"],
                num_layers=config["num_hidden_layers"],
                num_query_heads=heads,
                num_kv_heads=heads if config.get("num_key_value_heads") is None else config["num_key_value_heads"],
                d_ff=config["intermediate_size"],
                max_seq_len=config.get("max_position_embeddings", 2048),
                norm_eps=config.get("rms_norm_eps", 1e-6),
                rope_base=float(theta) if _is_positive(theta) else theta,
                tie_embeddings=bool(config.get("tie_word_embeddings", False)),
                dropout=config.get("residual_dropout", 0.0),
                head_dim=config.get("head_dim"),
                attention_bias=bool(config.get("attention_bias", False)),
                mlp_bias=bool(config.get("mlp_bias", False)),
                rope_scaling=scaling,
                bos_token_id=config.get("bos_token_id"),
                eos_token_id=config.get("eos_token_id"),
                pad_token_id=config.get("pad_token_id"),
            )
        except KeyError as error:
            raise DamagedFileError(f"{where}: {error} is missing") from None
        except InputError as error:
            raise DamagedFileError(f"{where}: {error}") from None
        except (TypeError, ValueError) as error:
            raise DamagedFileError(f"{where}: {printable(str(error), 200)}") from None


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 2**31


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= sys.float_info.max


def _wrong_seed(seed: Any) -> list[str]:
    fine = isinstance(seed, int) and not isinstance(seed, bool) and 0 <= seed < 2**63
    return [] if fine else [f"seed = {shown(seed)} must be a whole number, at least 0 and below 2**63"]


def _wrong_rope_scaling(scaling: dict[str, Any] | None) -> list[str]:
    if scaling is None:
        return []
    if not isinstance(scaling, dict):
        return [f"rope_scaling = {shown(scaling)} must be a mapping with rope_type, factor, ..."]
    kind = scaling.get("rope_type")
    needed = {
        "linear": ["factor"],
        "llama3": ["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"],
    }
    if not isinstance(kind, str) or kind not in needed:
        return [f"rope_scaling: rope_type {shown(kind)} is not supported; linear and llama3 are"]
    wrong = [
        f"rope_scaling: {key} = {shown(scaling.get(key))} must be a positive number ({kind} needs it)"
        for key in needed[kind]
        if not _is_positive(scaling.get(key))
    ]
    unknown = [f"{key} = {shown(scaling[key])}" for key in scaling if key not in ("rope_type", *needed[kind])]
    if unknown:
        wrong.append(f"rope_scaling: this model does not have {listed(unknown)}")
    if not wrong and kind == "llama3" and not scaling["low_freq_factor"] < scaling["high_freq_factor"]:
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        wrong.append(f"rope_scaling: low_freq_factor = {low} must be less than high_freq_factor = {high}")
    return wrong


PRESETS: dict[str, ModelConfig] = {
    "tiny": ModelConfig(d_model=128, num_layers=4, num_query_heads=4, num_kv_heads=2, d_ff=384, max_seq_len=256),
    "small": ModelConfig(d_model=512, num_layers=6, num_query_heads=8, num_kv_heads=2, d_ff=2048, max_seq_len=1024),
    "medium": ModelConfig(),
    "large": ModelConfig(d_model=1024, num_layers=16, num_query_heads=16, num_kv_heads=4, d_ff=4096),
}
"""`train` takes vocab_size from the tokenizer; medium at 32,000 is exactly 127,224,576 parameters."""


@dataclass(frozen=True)
class TrainConfig:
    """A pretraining run. Learning rates, sizes and intervals are those of one optimizer step."""

    epochs: float = option(1.0, "passes over the training text")
    steps: int | None = option(None, "optimizer steps, instead of epochs")
    minutes: float | None = option(None, "wall time, instead of epochs; the schedule follows the clock")
    batch_size: int = option(4, "windows a microbatch")
    grad_accum: int = option(4, "microbatches an optimizer step")
    seq_len: int | None = option(None, "tokens a window; default: the model's context, at most 512")
    lr: float = option(3e-4, "peak learning rate")
    warmup: float = option(0.02, "share of the steps that the learning rate rises over")
    final_lr: float = option(0.1, "share of the peak at which the learning rate ends")
    weight_decay: float = option(0.1, "decoupled weight decay of matrices")
    max_grad_norm: float = option(1.0, "gradients are scaled down to this global norm")
    eval_every: int = option(100, "steps between evaluations on held-out text")
    eval_tokens: int = option(16384, "held-out tokens looked at, at most")
    save_every: int = option(100, "steps between resumable states")
    recompute: bool = option(False, "recompute activations in the backward pass: less memory, a third more time")
    loss_on: str = option(
        "all",
        "what of a .jsonl chat is trained on: all, completion (the last answer) or assistant (every answer)",
    )
    seed: int = option(0, "decides initial weights, shuffling and dropout")

    def __post_init__(self) -> None:
        """Refuse values that no run can have; all offenders in one message (InputError)."""
        wrong = []
        for name in ("steps", "batch_size", "grad_accum", "seq_len", "eval_every", "eval_tokens", "save_every"):
            value = getattr(self, name)
            if value is not None and not _is_count(value):
                wrong.append(f"{name} = {shown(value)} must be a whole number of at least 1")
        for name in ("epochs", "minutes", "lr", "max_grad_norm"):
            value = getattr(self, name)
            if value is not None and not _is_positive(value):
                wrong.append(f"{name} = {shown(value)} must be a positive number")
        for name in ("warmup", "final_lr", "weight_decay"):
            if not 0 <= getattr(self, name) <= 1:
                wrong.append(f"{name} = {shown(getattr(self, name))} must lie in [0, 1]")
        if self.loss_on not in LOSS_ON:
            wrong.append(f"loss_on = {shown(self.loss_on)} must be one of {', '.join(LOSS_ON)}")
        if self.steps is not None and self.minutes is not None:
            wrong.append("steps and minutes exclude each other")
        wrong += _wrong_seed(self.seed)
        if wrong:
            raise InputError("training configuration: " + "; ".join(wrong))


LESSON_RATE, RATE_STEPS, HELD_RATE_STEPS = 2e-3, 40, 160
"""Peak learning rate of lessons of up to so many steps, and of those that earlier lessons hold up to more of them; 32
and 160 steps were tried on SmolLM2-135M, see RESULTS.md."""


@dataclass(frozen=True)
class ContinualLearningConfig:
    """How a lesson is learned. The names are those of the original project where it has the thing."""

    lora_r: int = option(14, "rank of the adapter")
    lora_alpha: float = option(28.0, "the low-rank product is scaled by alpha / rank")
    lora_dropout: float = option(0.0, "dropout before the low-rank product while learning")
    lora_target_modules: tuple[str, ...] = option(
        LORA_TARGETS, "linear layers that carry the adapter; a model without these seven names: all of its layers'"
    )
    learning_rate: float | None = option(
        None,
        f"peak learning rate  [default: {LESSON_RATE}; in a lesson of more than {RATE_STEPS} steps, {HELD_RATE_STEPS} "
        "where there are earlier ones to hold, less, by the square root of their number]",
    )
    warmup: float = option(0.1, "share of the steps that the learning rate rises over")
    batch_size: int = option(1, "windows a step, at most; fewer where the time is short")
    seq_len: int = option(256, "tokens a window")
    gradient_accumulation_steps: int = option(1, "microbatches a step")
    replay_buffer_size: int = option(10_000, "windows of earlier lessons that a domain keeps, at most")
    replay_ratio: float = option(0.5, "share of each batch that is drawn from the domain's earlier lessons; 0 is off")
    replay_strategy: str = option("uniform", "how they are drawn: uniform, importance or reservoir")
    replay_targets: str = option(
        "predictions",
        "what replayed windows are held to: predictions (of the version that knew their lesson best) or tokens, which "
        "are learned again",
    )
    replay_weight: float = option(
        1.0,
        "how strongly replayed windows are held to predictions; 1 gives all of them, few or many, the weight of the "
        "lesson's own text",
    )
    use_ewc: bool = option(True, "whether a later lesson is held near what the earlier ones made of the adapter")
    ewc_lambda: float = option(
        2.5,
        "how strongly elastic weight consolidation holds a lesson near the version before; 1 weighs it like the "
        "divergence from what that version predicts",
    )
    ewc_gamma: float = option(0.95, "what is left of the Fisher of the lessons before, at each lesson")
    ewc_fisher_samples: int = option(8, "windows of the last lesson that its Fisher is estimated from, at most")
    base_ratio: float = option(0.05, "rows of text like the base's own, as a share of the batch that they are added to")
    distill_weight: float = option(
        0.0,
        "how strongly text like the base's, and replayed text whose tokens are learned again, is held to the frozen "
        "base's predictions; 1 weighs it like the loss",
    )
    max_grad_norm: float = option(1.0, "gradients are scaled down to this global norm")
    weight_decay: float = option(0.0, "decoupled weight decay")
    loss_on: str = option(
        "all",
        "what of a .jsonl chat is trained on: all, completion (the last answer) or assistant (every answer)",
    )
    answer_share: float = option(
        0.0,
        "share of plain text that is learned as answers in a chat, to questions that name its rare words and are not "
        "learned themselves",
    )
    holdout: float = option(0.1, "share of the text kept for measuring, never trained on")
    seed: int = option(0, "decides the adapter's initial values, the held-out part and the order of the text")
    device: str = option("default", "cpu, gpu, or mps and default for what MLX chooses")

    def __post_init__(self) -> None:
        """Refuse values that no lesson can have; all offenders in one message (InputError)."""
        wrong = []
        counts = ("lora_r", "batch_size", "seq_len", "gradient_accumulation_steps", "replay_buffer_size")
        for name in (*counts, "ewc_fisher_samples"):
            if not _is_count(getattr(self, name)):
                wrong.append(f"{name} = {getattr(self, name)!r} must be a whole number of at least 1")
        for name in ("lora_alpha", "learning_rate", "max_grad_norm", "replay_weight"):
            if not _is_positive(getattr(self, name)) and (name, getattr(self, name)) != ("learning_rate", None):
                wrong.append(f"{name} = {getattr(self, name)!r} must be a positive number")
        for name in ("lora_dropout", "holdout", "replay_ratio", "base_ratio"):
            if not 0 <= getattr(self, name) < 1:
                wrong.append(f"{name} = {getattr(self, name)!r} must be at least 0 and below 1")
        for name in ("warmup", "weight_decay", "ewc_gamma", "answer_share"):
            if not 0 <= getattr(self, name) <= 1:
                wrong.append(f"{name} = {getattr(self, name)!r} must lie in [0, 1]")
        for name in ("ewc_lambda", "distill_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                wrong.append(f"{name} = {getattr(self, name)!r} must be 0 or a positive number")
        if self.replay_strategy not in REPLAY_STRATEGIES:
            wrong.append(f"replay_strategy = {self.replay_strategy!r} must be one of {', '.join(REPLAY_STRATEGIES)}")
        if self.replay_targets not in REPLAY_TARGETS:
            wrong.append(f"replay_targets = {self.replay_targets!r} must be one of {', '.join(REPLAY_TARGETS)}")
        targets = self.lora_target_modules
        if isinstance(targets, str) or not targets or not all(isinstance(name, str) for name in targets):
            wrong.append(f"lora_target_modules = {targets!r} must be names of linear layers, such as q_proj")
        if self.loss_on not in LOSS_ON:
            wrong.append(f"loss_on = {self.loss_on!r} must be one of {', '.join(LOSS_ON)}")
        if self.device not in ("default", "mps", "cpu", "gpu"):
            wrong.append(f"device = {self.device!r} must be default, mps, cpu or gpu")
        wrong += _wrong_seed(self.seed)
        if wrong:
            raise InputError("learning configuration: " + "; ".join(wrong))

    def peak_rate(self, steps: int, held: bool = False) -> float:
        """The highest learning rate of a lesson of so many steps: what was asked for, or what suits their number.

        The more steps follow one another, the smaller each should be; two points were measured, 32 and 160 steps. A
        lesson that replay or EWC hold learns less at each step, and 160 are not too many for the rate yet.
        """
        if self.learning_rate is not None:
            return self.learning_rate
        return LESSON_RATE * min(1.0, math.sqrt((HELD_RATE_STEPS if held else RATE_STEPS) / steps))


MOST = 10**9
"""Seconds, passes or steps that nobody means more of."""

LEAST_STEPS = 16
"""Optimizer steps a lesson should have: a short text is gone over again, and batches shrink where time is short."""


@dataclass(frozen=True)
class Budget:
    """When a lesson ends: after `steps`; without them after `epochs` or `seconds` of wall time, whichever is first."""

    seconds: float = option(60.0, "wall time, measuring included")
    epochs: float | None = option(
        None, f"passes over the text  [default: 1; of a short one, what makes {LEAST_STEPS} steps]"
    )
    steps: int | None = option(None, "optimizer steps, instead of a time")

    def passes(self, windows: float) -> float:
        """Passes over a text of so many windows, counted in those that a step of one row takes."""
        return max(1.0, LEAST_STEPS / windows) if self.epochs is None else self.epochs

    def __post_init__(self) -> None:
        """InputError for what is no positive number."""
        for name, value in dataclasses.asdict(self).items():
            if value is not None and not 0 < value <= MOST:
                raise InputError(f"--{name} {value} must be a positive number, at most {MOST:,}")
