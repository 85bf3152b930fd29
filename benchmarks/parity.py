"""SmolLM2-135M in four implementations: ours, torch_ref, transformers and mlx-lm, in float32 on the same tokens.

Prints and writes the largest absolute difference of the logits and whether greedy decoding gives the same tokens.

    python -m benchmarks.parity [--tokens 256]
"""

import argparse
from pydoc_data import topics
from typing import Any

import mlx_impl  # noqa: F401  before MLX, for the fast BLAS

# isort: split
import mlx.core as mx
import numpy as np
import torch
import transformers
from mlx_lm.utils import load_model

from benchmarks.common import record
from mlx_impl import generate
from mlx_impl.hub import default_model
from mlx_impl.model import ContinualLLM
from mlx_impl.tokenizer import Tokenizer
from torch_ref.model import ContinualLLM as TorchLLM

PROMPT = "The capital of France is"
NEW_TOKENS = 24


def main() -> None:
    """Compare the default model's logits and greedy continuations."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=256, help="tokens of text to compare on  [default: 256]")
    arguments = parser.parse_args()
    directory = default_model()
    tokenizer = Tokenizer.load(directory)
    ids = tokenizer.encode(topics.topics["assignment"])[: arguments.tokens]
    prompt = tokenizer.encode(PROMPT)

    ours = ContinualLLM.from_checkpoint(directory)
    logits = np.array(ours(mx.array([ids])))[0]  # (T, V)
    greedy = list(generate.decode(ours, prompt, NEW_TOKENS, generate.Sampling()))
    others = {"torch_ref": _torch_ref, "transformers": _transformers, "mlx-lm": _mlx_lm}
    compared: dict[str, Any] = {}
    for name, run in others.items():
        theirs, continuation = run(directory, ids, prompt)
        difference = np.abs(theirs - logits)
        compared[name] = {
            "largest_difference": float(difference.max()),
            "mean_difference": float(difference.mean()),
            "same_first_choice": float((theirs.argmax(-1) == logits.argmax(-1)).mean()),
            "same_greedy_tokens": continuation == greedy,
        }
    text = tokenizer.decode(greedy)
    scale = {"model": directory.name, "tokens": len(ids), "largest_logit": float(np.abs(logits).max())}
    record("parity", {**scale, "greedy": {"prompt": PROMPT, "text": text}, "against": compared})


def _torch_ref(directory: Any, ids: list[int], prompt: list[int]) -> tuple[np.ndarray, list[int]]:
    from torch_ref import generate as torch_generate

    model = TorchLLM.from_checkpoint(directory)
    with torch.no_grad():
        logits = model(torch.tensor([ids]))[0].numpy()
        return logits, list(torch_generate.decode(model, prompt, NEW_TOKENS))


def _transformers(directory: Any, ids: list[int], prompt: list[int]) -> tuple[np.ndarray, list[int]]:
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].numpy()
        start = torch.tensor([prompt])
        done = model.generate(
            start, attention_mask=torch.ones_like(start), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None
        )
    return logits, done[0, len(prompt) :].tolist()


def _mlx_lm(directory: Any, ids: list[int], prompt: list[int]) -> tuple[np.ndarray, list[int]]:
    from mlx_lm.generate import generate_step

    model, _ = load_model(directory)
    logits = np.array(model(mx.array([ids])))[0]
    steps = generate_step(mx.array(prompt), model, max_tokens=NEW_TOKENS)
    return logits, [int(token) for token, _ in steps]


if __name__ == "__main__":
    main()
