"""To and from other programs: models from format to format, adapters in and out.

`convert --check` runs a model of each implementation; this is the only place that knows both.
"""

import dataclasses
from pathlib import Path
from typing import Any

import click

from mlx_impl.commands.inputs import model_directory
from mlx_impl.commands.options import FOLDER, command, common
from mlx_impl.errors import DamagedFileError, InputError
from mlx_impl.shell import emit


@command("convert")
@click.argument("source", metavar="SRC", type=click.Path(path_type=Path))
@click.argument("target", metavar="DST", type=click.Path(path_type=Path))
@click.option("--to", metavar="FORMAT", help="one of those above  [default: by DST's ending, else hf]")
@click.option(
    "--dtype",
    type=click.Choice(["fp32", "fp16", "bf16"]),
    help="how to store hf, torch and original  [default: as SRC; fp32 for .pt, .gguf and quantised ones]",
)
@click.option(
    "--quantize",
    type=click.Choice(["4", "8"]),
    help="pack hf to so many bits a weight, as mlx-lm does; of other architectures than Llama too",
)
@click.option("--config", type=click.Path(path_type=Path), help="config.json of weights that have none beside them")
@click.option("--tokenizer", type=FOLDER, help="take the tokenizer of this folder, where SRC has none or another")
@click.option("--domain", help="what the adapter in the original's checkpoint folder becomes  [default: main]")
@click.option("--check", is_flag=True, help="read DST back and compare what both models compute")
@common(model=False)
def convert(
    source: Path,
    target: Path,
    to: str | None,
    dtype: str | None,
    quantize: str | None,
    config: Path | None,
    tokenizer: Path | None,
    domain: str | None,
    check: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Read the model SRC, whatever its format, and write it to DST, which must be new.

    Read are model directories, GGUF files, state dicts of torch_ref and files of the original PyTorch project, these
    as .pt (PyTorch is needed) or .safetensors. Nothing is written if a tensor is unknown, missing or of the wrong
    shape. --check ends with code 3 if the models differ by more than rounding does, and names the first module. With
    --quantize it holds DST against what the rounded weights compute, and says what the rounding itself changed.

    A checkpoint folder of the original moves over whole: weights and tokenizer, and its adapter, replay buffer and EWC
    state as a domain that goes on learning. What became of each file is printed.

    \b
    Formats, each with an example:
      hf          a model directory, for this program, mlx-lm and transformers
                  minimac-mlx convert model.gguf my-model
                  minimac-mlx convert checkpoints/my_expert my-model --tokenizer tokenizers/mine
                  minimac-mlx convert my-model half --dtype fp16 --check
                  minimac-mlx convert my-model small --quantize 4 --dtype bf16 --check
      gguf-f16    for llama.cpp and Ollama, with the tokenizer; gguf-q8_0 is half as large
                  minimac-mlx convert my-model my-model.gguf
                  minimac-mlx convert my-model my-model.gguf --to gguf-q8_0
      torch       a state dict for torch_ref, .pt or .safetensors; writes config.json beside it
                  minimac-mlx convert my-model weights/model.pt
      original    model.pt of the PyTorch project that this one continues
                  minimac-mlx convert my-model model.pt --to original
    """
    from convert.original import is_checkpoint_folder
    from mlx_impl.console import Reporter
    from mlx_impl.conversion import DTYPES, format_of
    from mlx_impl.conversion import convert as write_as
    from mlx_impl.foreigndir import architecture
    from mlx_impl.results import conversion_text

    to, packing, write_packed, moves = format_of(target, to), None, None, is_checkpoint_folder(source)
    kind = architecture(source)
    if moves and (to != "hf" or quantize is not None):
        raise InputError(f"{source}: a checkpoint folder becomes a model directory first; convert that")
    if quantize is not None:
        from mlx_impl.packing import Packing
        from mlx_impl.quantised import packed_writer

        if to != "hf":
            raise InputError(f"--quantize {quantize}: packs model directories; leave it out with --to {to}")
        packing = Packing(int(quantize))
        write_packed = packed_writer(packing)
    with Reporter(quiet) as reporter:
        if moves:
            from mlx_impl.moving import move_over

            stored = DTYPES[dtype or "fp32"]
            record = move_over(source, target, domain or "main", tokenizer, config, stored, reporter.say)
            source = Path(record["weights"])
        elif domain is not None:
            raise InputError(f"--domain {domain}: only a checkpoint folder of the original becomes one")
        elif kind is not None and packing is not None:
            from mlx_impl.foreign import write_quantised

            if check or tokenizer or config:
                raise InputError(f"{source}: --check, --tokenizer and --config are for Llamas, this is a {kind}")
            record = write_quantised(source, target, packing, DTYPES[dtype] if dtype else None, reporter.say)
        else:
            record = write_as(source, target, to, dtype, config, tokenizer, reporter.say, write_packed)
            if packing is not None:
                record["bits"] = packing.bits
        if check and packing is not None:
            from mlx_impl.check import compare_packed

            record["check"] = compare_packed(source, target, packing, record["dtype"], config)
        elif check:
            record["check"] = _compared(source, target, config, record["dtype"])
    emit(as_json, record, conversion_text(record))
    if check and record["check"]["first"] is not None:
        raise click.exceptions.Exit(DamagedFileError.exit_code)


@command("export")
@click.argument("domain", metavar="NAME")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--to", type=click.Choice(["mlx-lm", "peft", "gguf", "original"]), help="format of the adapter")
@click.option("--fuse", is_flag=True, help="write the base with the adapter in it, as one model")
@click.option("--requantize", is_flag=True, help="with --fuse: quantised again like the base; says what that cost")
@common()
def export(
    domain: str,
    out: Path,
    to: str | None,
    fuse: bool,
    requantize: bool,
    model: Path | None,
    store: Path | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Write a domain's current adapter into the folder OUT, which must be new or empty.

    mlx-lm is for mlx_lm.load(adapter_path=...), peft for peft.PeftModel, gguf for llama.cpp and Ollama, original for
    the PyTorch project that this one continues. --fuse writes a whole model directory instead, in float32.

    \b
    Examples:
      minimac-mlx export medical medical-peft --to peft
      minimac-mlx export main for-ollama --to gguf
      minimac-mlx export medical medical-model --fuse
    """
    from mlx_impl.exchange import export_adapter
    from mlx_impl.results import exported_text
    from mlx_impl.store import open_store

    if fuse == (to is not None) or (requantize and not fuse):
        raise InputError("say --to FORMAT for the adapter, or --fuse [--requantize] for a whole model")
    directory = model_directory(model)
    lessons = open_store(directory, store)
    if to is None:
        from mlx_impl.fusing import fuse as write_fused

        record = write_fused(lessons, domain, directory, out, requantize)
    else:
        record = export_adapter(lessons, domain, directory, out, to)
    emit(as_json, record, exported_text(record))


@command("import")
@click.argument("domain", metavar="NAME")
@click.argument("source", metavar="SRC", type=click.Path(path_type=Path))
@common()
def import_adapter(
    domain: str, source: Path, model: Path | None, store: Path | None, as_json: bool, quiet: bool
) -> None:
    """Make an adapter from elsewhere the new domain NAME: a folder of mlx-lm or PEFT, a .gguf or .pt file.

    Its tensors must fit the base. The domain can be used and taught like any other, but --domain auto never chooses it
    before it was taught here.

    \b
    Examples:
      minimac-mlx import medical ./my-peft-adapter
      minimac-mlx import medical adapter.gguf
    """
    from mlx_impl.console import Reporter
    from mlx_impl.exchange import import_adapter as take_in
    from mlx_impl.results import imported_text
    from mlx_impl.store import open_store

    directory = model_directory(model)
    version = take_in(open_store(directory, store), domain, directory, source)
    Reporter(quiet).say("which base it was made for cannot be known from its files; its shapes fit this one")
    record = {"domain": domain, **version.as_json()}
    emit(as_json, record, imported_text(record))


def _compared(source: Path, target: Path, config: Path | None, stored: str) -> dict[str, Any]:
    """Both models on the same tokens, each run by the implementation that its format is for."""
    from convert.check import compare, tokens_for
    from convert.detect import read_model

    def traced(path: Path, config: Path | None = None) -> Any:
        model = read_model(path, config, with_tokenizer=False)
        if model.framework == "torch":
            try:
                from torch_ref.check import trace
            except ModuleNotFoundError:
                raise InputError(f"--check {path}: needs PyTorch; pip install 'minimac-mlx[torch]'") from None
        else:
            from mlx_impl.check import trace
        return trace(model.config, model.tensors, tokens_for(model.config))

    return dataclasses.asdict(compare(traced(source, config), traced(target), stored))
