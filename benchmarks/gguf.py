"""The default model as GGUF, F16 and Q8_0, read by transformers' loader and run by llama.cpp, with an adapter too.

Prints and writes for both files their size; of transformers the largest difference of the logits from ours in float32,
of llama.cpp that of the log-probabilities of its five likeliest tokens, at every eighth place of the text; of both
whether greedy decoding gives the same tokens, and whether the tokenizer inside gives the same ids. The adapter is that
of a lesson of eight steps, exported as GGUF beside the F16 file.

    python -m benchmarks.gguf [--tokens 256]
"""

import argparse
import tempfile
from pathlib import Path
from pydoc_data import topics
from typing import Any

import mlx_impl  # noqa: F401  before MLX, for the fast BLAS

# isort: split
import mlx.core as mx
import numpy as np
import torch
import transformers

from benchmarks import llamacpp
from benchmarks.common import record
from benchmarks.parity import NEW_TOKENS, PROMPT
from mlx_impl import exchange, generate
from mlx_impl.base import BaseModel
from mlx_impl.config import Budget
from mlx_impl.conversion import convert
from mlx_impl.hub import default_model
from mlx_impl.learner import ContinualLearner
from mlx_impl.model import ContinualLLM
from mlx_impl.tokenizer import Tokenizer


def main() -> None:
    """Write both files into a temporary folder and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=256, help="tokens of text to compare on  [default: 256]")
    arguments = parser.parse_args()
    directory = default_model()
    tokenizer = Tokenizer.load(directory)
    text = topics.topics["assignment"]
    ids, prompt = tokenizer.encode(text)[: arguments.tokens], tokenizer.encode(PROMPT)
    ours = ContinualLLM.from_checkpoint(directory)
    logits = np.array(ours(mx.array([ids])))[0]  # (T, V)
    greedy = list(generate.decode(ours, prompt, NEW_TOKENS, generate.Sampling()))
    files: dict[str, Any] = {}
    adapted: dict[str, Any] = {}
    for to in ("gguf-f16", "gguf-q8_0"):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.gguf"
            convert(directory, path, to)
            there = _llama_cpp(ours, path, ids, prompt, greedy)
            of_text, of_ids = llamacpp.answers(path, [text[:400], tokenizer.encode(text[:400])])
            if to == "gguf-f16":
                adapted = _with_adapter(directory, path, text, ids, prompt)
            theirs, continuation = _transformers(path, ids, prompt)
            library = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=path.name)
            files[to] = {
                "bytes": path.stat().st_size,
                "largest_difference": float(np.abs(theirs - logits).max()),
                "same_greedy_tokens": continuation == greedy,
                "same_token_ids": library.encode(text, add_special_tokens=False) == tokenizer.encode(text),
                "text": tokenizer.decode(continuation),
                "llama.cpp": {**there, "same_token_ids": of_text == of_ids},
            }
    scale = {"model": directory.name, "tokens": len(ids), "largest_logit": float(np.abs(logits).max())}
    record(
        "gguf",
        {**scale, "greedy": {"prompt": PROMPT, "text": tokenizer.decode(greedy)}, "files": files, "adapter": adapted},
    )


def _llama_cpp(
    ours: BaseModel, path: Path, ids: list[int], prompt: list[int], greedy: list[int], adapter: Path | None = None
) -> dict[str, Any]:
    """How near llama.cpp is to ours on the ids, and whether it continues the prompt alike."""
    prompts = [ids[:length] for length in range(8, len(ids), 8)]
    found = llamacpp.answers(path, prompts, adapter=adapter)
    (continued,) = llamacpp.answers(path, [prompt], NEW_TOKENS, adapter)
    return {
        "largest_difference": llamacpp.largest_difference(ours, prompts, found),
        "places": len(prompts),
        "same_greedy_tokens": continued["ids"] == greedy,
    }


def _with_adapter(base: Path, path: Path, text: str, ids: list[int], prompt: list[int]) -> dict[str, Any]:
    """The same after a lesson, exported as an adapter beside the base in `path`; and how far it went from the base."""
    with tempfile.TemporaryDirectory() as folder:
        learner = ContinualLearner.from_checkpoint(base, store=Path(folder) / "store")
        learner.learn_from_text(text, budget=Budget(steps=8))
        exchange.export_adapter(learner.store, "main", base, Path(folder) / "out", "gguf")
        learner.set_adapter("main")
        greedy = list(generate.decode(learner.model, prompt, NEW_TOKENS, generate.Sampling()))
        bare = _llama_cpp(learner.model, path, ids, prompt, greedy)
        there = _llama_cpp(learner.model, path, ids, prompt, greedy, Path(folder) / "out" / "adapter.gguf")
        return {**there, "without_it": bare["largest_difference"]}


def _transformers(path: Path, ids: list[int], prompt: list[int]) -> tuple[np.ndarray, list[int]]:
    """Logits (T, V) of the ids and the greedy continuation of the prompt."""
    model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    with torch.no_grad():
        start = torch.tensor([prompt])
        done = model.generate(
            start, attention_mask=torch.ones_like(start), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None
        )
        return model(torch.tensor([ids])).logits[0].numpy(), done[0, len(prompt) :].tolist()


if __name__ == "__main__":
    main()
