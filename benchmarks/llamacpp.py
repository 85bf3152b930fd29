"""llama.cpp itself, as the wheel xllamacpp carries it: what it makes of a GGUF file, with an adapter or without.

What it predicts is compared, not only the text that comes of it: the log-probabilities of the tokens that it holds for
the likeliest, with ours of the same tokens. While it runs, its server listens on a port of this machine that the system
chooses; nobody asks it there.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx_impl  # noqa: F401  before MLX, for the fast BLAS

# isort: split
import mlx.core as mx

from benchmarks import child
from mlx_impl.base import BaseModel
from mlx_impl.errors import MiniMacError

LIKELIEST = 5
"""Tokens after each prompt whose log-probabilities are compared."""


def answers(
    model: Path, prompts: Sequence[str | Sequence[int]], tokens: int = 1, adapter: Path | None = None
) -> list[dict[str, Any]]:
    """What llama.cpp says after texts or token ids, a text being tokenised by llama.cpp, in a process of its own.

    For each prompt: `ids`, its greedy continuation by at most `tokens`; `likeliest`, [id, log-probability in nats] of
    the first one's rivals and itself, empty where it is part of a character; `prompt_tokens`, how many were read.
    MiniMacError where that fails.
    """
    given = {"model": str(model), "prompts": list(prompts), "tokens": tokens, "adapter": adapter and str(adapter)}
    found: list[dict[str, Any]] = child.call(_answers, **given)
    return found


def _answers(model: str, prompts: list[str | list[int]], tokens: int, adapter: str | None) -> list[dict[str, Any]]:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = model
    params.n_parallel, params.n_gpu_layers, params.warmup, params.verbosity = 1, 0, False, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    if adapter is not None:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(adapter, 1.0)]
    server = xllamacpp.Server(params)
    asked = {"n_predict": tokens, "temperature": 0.0, "n_probs": LIKELIEST, "cache_prompt": False}
    told = {"return_tokens": True, "verbose": True}
    return [_answer(server.handle_completions({"prompt": prompt, **asked, **told})) for prompt in prompts]


def _answer(reply: dict[str, Any]) -> dict[str, Any]:
    if "error" in reply:
        raise MiniMacError(f"llama.cpp: {reply['error']['message']}")
    ids = reply["__verbose"]["tokens"]
    places = (reply["choices"][0]["logprobs"] or {}).get("content", [])
    first = places[0]["top_logprobs"] if places and places[0]["id"] == ids[0] else []
    likeliest = [[top["id"], top["logprob"]] for top in first]
    return {"ids": ids, "likeliest": likeliest, "prompt_tokens": reply["usage"]["prompt_tokens"]}


def largest_difference(ours: BaseModel, prompts: Sequence[Sequence[int]], found: Sequence[dict[str, Any]]) -> float:
    """By how much the log-probabilities of what llama.cpp holds for the likeliest differ from ours, in nats, at most.

    MiniMacError where there is nothing to compare.
    """
    differences = []
    for prompt, answer in zip(prompts, found, strict=True):
        logits = ours(mx.array([prompt]))[0, -1].astype(mx.float32)  # (V,)
        logp = logits - mx.logsumexp(logits)
        differences += [abs(float(logp[id].item()) - value) for id, value in answer["likeliest"]]  # type: ignore[arg-type]
    if not differences:
        raise MiniMacError("llama.cpp gave no log-probability")
    return max(differences)
