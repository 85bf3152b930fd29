"""Writes docs/predictions.md: how many tokens a second the memory bandwidth of each of Apple's chips allows at most.

Nothing is measured here; the arithmetic is that of `mlx_impl.chips`, and a test holds the page to it.

    python -m benchmarks.predictions
"""

from dataclasses import replace
from pathlib import Path

from mlx_impl import files
from mlx_impl.chips import CHIPS, QUANTISED_4, Chip, bytes_per_token, ceiling
from mlx_impl.config import PRESETS, ModelConfig

PAGE = Path(__file__).parent.parent / "docs" / "predictions.md"

SMOLLM2 = ModelConfig(
    vocab_size=49152, d_model=576, num_layers=30, num_query_heads=9, num_kv_heads=3, d_ff=1536, max_seq_len=8192
)
"""Sizes of SmolLM2-135M."""

MODELS = {"SmolLM2-135M": SMOLLM2, "medium, 8,000 tokens": replace(PRESETS["medium"], vocab_size=8000)}
CASES = (("16 bits", 16.0, 128), ("4 bits", QUANTISED_4, 128), ("16 bits", 16.0, 8192))
"""What a weight takes, and the context before the token."""


def page() -> str:
    """The page as Markdown."""
    columns = [
        (name, config, *case) for name, config in MODELS.items() for case in CASES if case[2] <= config.max_seq_len
    ]
    read = [bytes_per_token(config, bits, context) for _, config, _, bits, context in columns]
    titles = [f"{name}, {label}, {context:,} before" for name, _, label, _, context in columns]
    lines = [
        "# Predicted ceilings",
        "",
        "**Predictions, not measurements**: nobody has run this on a Mac yet. To decode a token, every weight is",
        "read from memory once, and every key and value of the context before it (16 bits each). No decoder of one",
        "text at a time can be faster than bandwidth / bytes; how near ours comes `minimac-mlx bench tokens` tells.",
        "4 bits are 4.5 with the scales. Bandwidths are Apple's own figures. `python -m benchmarks.predictions` wrote",
        "this page.",
        "",
        "Tokens a second, at most:",
        "",
        f"| chip | GPU cores | GB/s | {' | '.join(titles)} |",
        f"|---|---|---:|{'---:|' * len(columns)}",
        f"| MB a token | | | {' | '.join(f'{size / 1e6:,.0f}' for size in read)} |",
        *(_line(chip, read) for chip in CHIPS),
        "",
        "M1 and M2 compute in float16, M3 and later in bfloat16: 16 bits both.",
    ]
    return "\n".join(lines) + "\n"


def _line(chip: Chip, read: list[float]) -> str:
    speeds = " | ".join(f"{ceiling(chip.bandwidth, size):,.0f}" for size in read)
    cores = " or ".join(map(str, chip.gpu_cores))
    return f"| {chip.name.removeprefix('Apple ')} | {cores} | {chip.bandwidth:g} | {speeds} |"


def main() -> None:
    """Write the page."""
    files.write_text(PAGE, page())
    print(f"written to {PAGE}")


if __name__ == "__main__":
    main()
