"""The default model as GGUF, F16 and Q8_0, read by transformers' loader: is the greedy text the same as ours?

Prints and writes for both files their size, the largest difference of the logits from ours in float32, whether greedy
decoding gives the same tokens, and whether the tokenizer inside gives the same ids.

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

from benchmarks.common import record
from benchmarks.parity import NEW_TOKENS, PROMPT
from mlx_impl import generate
from mlx_impl.conversion import convert
from mlx_impl.hub import default_model
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
    del ours
    files: dict[str, Any] = {}
    for to in ("gguf-f16", "gguf-q8_0"):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.gguf"
            convert(directory, path, to)
            theirs, continuation = _transformers(path, ids, prompt)
            library = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=path.name)
            files[to] = {
                "bytes": path.stat().st_size,
                "largest_difference": float(np.abs(theirs - logits).max()),
                "same_greedy_tokens": continuation == greedy,
                "same_token_ids": library.encode(text, add_special_tokens=False) == tokenizer.encode(text),
                "text": tokenizer.decode(continuation),
            }
    scale = {"model": directory.name, "tokens": len(ids), "largest_logit": float(np.abs(logits).max())}
    record("gguf", {**scale, "greedy": {"prompt": PROMPT, "text": tokenizer.decode(greedy)}, "files": files})


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
