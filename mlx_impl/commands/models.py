"""How a model comes to be: pulled, or trained from scratch with a tokenizer of its own."""

import dataclasses
from pathlib import Path
from typing import Any

import click

from mlx_impl.commands.options import FOLDER, PATHS, command, common, given, setting
from mlx_impl.config import LOSS_ON, PRESETS, TrainConfig, help_of
from mlx_impl.errors import InputError
from mlx_impl.shell import emit


@command("pull")
@click.argument("source", required=False)
@click.option("--force", is_flag=True, help="replace a model of the same name")
@common(model=False)
def pull(source: str | None, force: bool, as_json: bool, quiet: bool) -> None:
    """Get a base model: SmolLM2-135M without a name, else a .gguf file, a folder or a hub id.

    \b
    Examples:
      minimac-mlx pull
      minimac-mlx pull HuggingFaceTB/SmolLM2-360M-Instruct
      minimac-mlx pull ./model.gguf
    """
    from mlx_impl.console import Reporter
    from mlx_impl.pull import pull as fetch

    with Reporter(quiet) as reporter:
        directory = fetch(source, progress=None if quiet else reporter.say, force=force)
    emit(as_json, {"model": str(directory)}, f"{directory} is now the default model")


@command("tokenizer")
@PATHS
@click.option(
    "--vocab-size", type=click.IntRange(300, 1_000_000), default=8000, show_default=True, help="tokens, at most"
)
@click.option("--out", type=FOLDER, required=True, help="folder to write")
@click.option(
    "--min-frequency",
    type=click.IntRange(1),
    default=2,
    show_default=True,
    help="pairs seen less often are not merged",
)
@click.option("--special-token", "special_tokens", multiple=True, help="a token of its own; may be given several times")
@common(model=False)
def tokenizer(
    paths: tuple[Path, ...],
    vocab_size: int,
    out: Path,
    min_frequency: int,
    special_tokens: tuple[str, ...],
    as_json: bool,
    quiet: bool,
) -> None:
    """Train a tokenizer on files.

    \b
    Example:
      minimac-mlx tokenizer books/ --vocab-size 8000 --out tok
    """
    from mlx_impl.console import Reporter
    from mlx_impl.files import atomic_folder
    from mlx_impl.readers import PassedOver, read_documents
    from mlx_impl.tokenizer import Tokenizer

    if not paths:
        raise InputError("nothing to train on: name files or folders")
    if out.exists():
        raise InputError(f"{out} exists already; name another folder or remove it first")
    skipped = PassedOver()
    texts = (document.text for document in read_documents(paths, skipped))
    trained = Tokenizer.train(texts, vocab_size, min_frequency, special_tokens)
    if skipped.files:
        Reporter(quiet).warn(str(skipped))
    with atomic_folder(out) as folder:
        trained.save(folder)
    emit(
        as_json,
        {"tokenizer": str(out), "vocab_size": trained.vocab_size},
        f"{out}: {trained.vocab_size:,} tokens",
    )


@command("train")
@PATHS
@click.option("--out", type=FOLDER, required=True, help="model directory to write")
@click.option("--config", help=f"a preset ({', '.join(PRESETS)}) or a YAML file  [default: medium]")
@click.option("--init", type=FOLDER, help="go on from this model directory")
@click.option(
    "--tokenizer",
    type=FOLDER,
    help="tokenizer folder  [default: one is trained on the text]",
)
@click.option(
    "--vocab-size",
    type=click.IntRange(300, 1_000_000),
    default=8000,
    show_default=True,
    help="of a tokenizer that is trained",
)
@click.option(
    "--eval-data",
    type=click.Path(path_type=Path),
    help="text to measure on  [default: 2 % of the text, held out]",
)
@click.option("--resume", is_flag=True, help="go on with the run in --out")
@setting(TrainConfig, "epochs")
@setting(TrainConfig, "steps", kind=int)
@setting(TrainConfig, "minutes", kind=float)
@setting(TrainConfig, "batch_size")
@setting(TrainConfig, "grad_accum")
@setting(TrainConfig, "seq_len", kind=int)
@setting(TrainConfig, "lr")
@setting(TrainConfig, "warmup")
@setting(TrainConfig, "weight_decay")
@setting(TrainConfig, "max_grad_norm")
@setting(TrainConfig, "eval_every")
@setting(TrainConfig, "save_every")
@setting(TrainConfig, "loss_on", kind=click.Choice(LOSS_ON))
@setting(TrainConfig, "seed")
@click.option("--recompute", is_flag=True, default=None, help=help_of(TrainConfig, "recompute"))
@common(model=False)
def train(
    paths: tuple[Path, ...],
    out: Path,
    config: str | None,
    init: Path | None,
    tokenizer: Path | None,
    vocab_size: int,
    eval_data: Path | None,
    resume: bool,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Train a model from scratch, or on from --init.

    \b
    Examples:
      minimac-mlx train books/ --out my-model --config small --minutes 30
      minimac-mlx train --out my-model --resume
      minimac-mlx train law.txt --init my-model --out my-lawyer --epochs 2 --lr 1e-4
    """
    from mlx_impl import recipe
    from mlx_impl.console import Reporter
    from mlx_impl.results import training_text

    with Reporter(quiet) as reporter:
        progress = recipe.run(
            paths=paths,
            out=out,
            config=config,
            init=init,
            tokenizer=tokenizer,
            vocab_size=vocab_size,
            eval_data=eval_data,
            resuming=resume,
            options=given(**options),
            report=reporter,
        )
    record = {"model": str(out), **dataclasses.asdict(progress)}
    emit(as_json, record, training_text(record))
