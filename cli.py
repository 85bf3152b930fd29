"""The `minimac-mlx` command: parse, call one function, print.

Results go to stdout (with --json one JSON object, in ASCII), progress and errors to stderr. Heavy imports happen inside
the commands, so that --help stays quick. What the commands share, exit codes included, is in `mlx_impl/shell.py`.
"""

import dataclasses
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from benchmarks import BENCH, REPETITIONS
from mlx_impl.config import LOSS_ON, PRESETS, REPLAY_TARGETS, Budget, ContinualLearningConfig, TrainConfig, help_of
from mlx_impl.errors import DamagedFileError, InputError, MiniMacError, printable
from mlx_impl.shell import FOLDER, common, emit, given, harmless, run, setting, show_version, write

if TYPE_CHECKING:
    from mlx_impl.console import Reporter
    from mlx_impl.readers import Document

PATHS = click.argument("paths", nargs=-1, type=click.Path(path_type=Path))

DOMAIN = click.option(
    "--domain",
    default="auto",
    show_default=True,
    help="a domain's name, none for the bare base, or auto: what the text suggests",
)


def sampling(max_tokens: int) -> Callable:
    """The options of commands that write text: how much by default, how it is chosen, where it ends."""
    options = [
        click.option(
            "--max-tokens", type=click.IntRange(1), default=max_tokens, show_default=True, help="new tokens, at most"
        ),
        click.option("--temperature", type=float, default=0.7, show_default=True, help="0 takes the likeliest token"),
        click.option("--top-k", type=int, default=0, show_default=True, help="choose among the k likeliest; 0 is off"),
        click.option(
            "--top-p", type=float, default=0.95, show_default=True, help="choose among the likeliest of this mass"
        ),
        click.option(
            "--min-p",
            type=float,
            default=0.0,
            show_default=True,
            help="drop what is this much less likely than the first",
        ),
        click.option(
            "--repetition-penalty",
            type=float,
            default=1.0,
            show_default=True,
            help="above 1 makes tokens that are there already less likely",
        ),
        click.option("--stop", multiple=True, help="end before this text; may be given several times"),
        click.option("--seed", type=int, default=0, show_default=True, help="the same seed gives the same text"),
    ]

    def decorate(function: Callable) -> Callable:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=show_version, help="print the version"
)
def cli() -> None:
    """A local language model that keeps learning.

    Teach it a file in seconds, see what it learned, take it back.

    \b
      minimac-mlx pull                        a base to start from (SmolLM2-135M)
      minimac-mlx learn notes.md              teach it a file
      minimac-mlx generate "My notes say"     let it speak
      minimac-mlx undo                        take the lesson back
    """


@cli.command(short_help="Get a base model to start from.")
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


@cli.command(short_help="Teach the model a text.")
@PATHS
@click.option("--text", help="text to learn, instead of files")
@click.option("--domain", default="main", show_default=True, help="what the lesson belongs to")
@click.option("--source", help="what list calls the lesson  [default: the file's name]")
@setting(Budget, "seconds")
@setting(Budget, "steps", kind=int)
@setting(Budget, "epochs", kind=float)
@setting(ContinualLearningConfig, "learning_rate", "--lr", float)
@setting(ContinualLearningConfig, "lora_r", "--rank", click.IntRange(1))
@setting(ContinualLearningConfig, "batch_size")
@setting(ContinualLearningConfig, "replay_ratio")
@click.option("--no-replay", is_flag=True, help="the same as --replay-ratio 0")
@setting(ContinualLearningConfig, "replay_targets", kind=click.Choice(REPLAY_TARGETS))
@setting(ContinualLearningConfig, "replay_weight")
@setting(ContinualLearningConfig, "ewc_lambda")
@click.option("--no-ewc", is_flag=True, help="the same as --ewc-lambda 0")
@click.option("--importance", type=float, default=1.0, show_default=True, help="odds of later replay")
@click.option("--base-data", metavar="PATH|self", help="text like the base's own to mix in; self: written by the base")
@setting(ContinualLearningConfig, "distill_weight", "--distill")
@click.option("--probe", metavar="PROMPT", help="answer this before and after the lesson")
@setting(ContinualLearningConfig, "holdout")
@setting(ContinualLearningConfig, "loss_on", kind=click.Choice(LOSS_ON))
@setting(ContinualLearningConfig, "seed")
@common()
def learn(
    paths: tuple[Path, ...],
    text: str | None,
    domain: str,
    source: str | None,
    seconds: float | None,
    steps: int | None,
    epochs: float | None,
    no_replay: bool,
    no_ewc: bool,
    importance: float,
    base_data: str | None,
    probe: str | None,
    model: Path | None,
    store: Path | None,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Teach the model files, folders, --text, or - for stdin.

    The base model stays as it is; what is learned is kept beside it and can be taken back with undo.

    \b
    Examples:
      minimac-mlx learn notes.md
      minimac-mlx learn papers/ --domain medical --seconds 300
      minimac-mlx learn --text "The office key is under the third flower pot."
      cat log.txt | minimac-mlx learn -
    """
    from mlx_impl.console import Reporter, lesson_text
    from mlx_impl.learner import ContinualLearner

    for off, name in ((no_replay, "replay_ratio"), (no_ewc, "ewc_lambda")):
        if off:
            options[name] = 0.0
    if options["lora_r"] is not None:
        options["lora_alpha"] = 2.0 * options["lora_r"]  # the scale stays what the learning rate was chosen for
    config = dataclasses.replace(ContinualLearningConfig(), **given(**options))
    budget = Budget(**given(seconds=seconds, epochs=epochs, steps=steps))
    with Reporter(quiet) as reporter:
        documents, label = _documents(paths, reporter, text)
        learner = ContinualLearner.from_checkpoint(_model(model), config, store)
        like_base: list[Document] = []
        if base_data == "self":
            reporter.say("the base writes text of its own first")
            like_base = learner.sampled_from_base()
        elif base_data is not None:
            like_base, _ = _documents((Path(base_data),), reporter)
        known = domain if domain in learner.store.domains() else "none"
        before = learner.answer(probe, known) if probe is not None else None
        lesson = learner.learn(documents, domain, printable(source or label), budget, reporter, importance, like_base)
        record = lesson.as_json()
        if probe is not None:
            record["probe"] = {"prompt": probe, "before": before, "after": learner.answer(probe, domain)}
    emit(as_json, record, lesson_text(record))


@cli.command(short_help="Continue a prompt.")
@click.argument("prompt")
@DOMAIN
@sampling(max_tokens=128)
@click.option("--chat", is_flag=True, help="put the prompt into the model's chat template, as a user's message")
@click.option("--window", type=int, help="keep this many tokens in the cache, so that memory stays bounded")
@click.option(
    "--prompt-cache",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="keep what was read in this file, for the next prompt that begins alike",
)
@common()
def generate(
    prompt: str,
    domain: str,
    max_tokens: int,
    stop: tuple[str, ...],
    chat: bool,
    window: int | None,
    prompt_cache: Path | None,
    model: Path | None,
    store: Path | None,
    as_json: bool,
    quiet: bool,
    **sampling: Any,
) -> None:
    """Continue a prompt; - reads it from stdin.

    \b
    Examples:
      minimac-mlx generate "The capital of France is" --max-tokens 8 --temperature 0
      minimac-mlx generate --chat "Explain photosynthesis to a child."
      minimac-mlx generate "The patient" --domain medical
    """
    from mlx_impl.cache import PromptCache
    from mlx_impl.console import Reporter, choice_text, context_text
    from mlx_impl.generate import Sampling, complete, prompt_ids
    from mlx_impl.learner import ContinualLearner

    settings = Sampling(**sampling)
    if prompt_cache is not None and window is not None:
        raise InputError("--prompt-cache keeps every token and --window does not: give one of them")
    prompt = _stdin() if prompt == "-" else prompt
    learner = ContinualLearner.from_checkpoint(_model(model), store=store)
    tokenizer = learner.tokenizer
    ids = plain = prompt_ids(tokenizer, prompt)
    if chat:
        ids = tokenizer.encode_chat([{"role": "user", "content": prompt}])
    used = learner.choose(domain, plain)  # a chat template says nothing about what the prompt is about
    if domain == "auto" and learner.store.domains():
        Reporter(quiet).say(choice_text(used))
    context = learner.model.config.max_seq_len
    if len(ids) + max_tokens > context:
        Reporter(quiet).say(context_text(len(ids), max_tokens, context))
    shown = harmless if sys.stdout is not None and sys.stdout.isatty() else str
    on_text = (lambda piece: None) if as_json else (lambda piece: write(shown(piece)))
    kept = PromptCache.load(prompt_cache) if prompt_cache and prompt_cache.exists() else PromptCache()
    owner = learner.weights_id()
    cache = kept.take(ids, owner) or learner.model.make_cache(window)
    result = complete(learner.model, tokenizer, ids, max_tokens, settings, stop, window, on_text, cache)
    if prompt_cache is not None and ids:
        kept.put([*ids, *result.tokens], owner, cache)
        kept.save(prompt_cache)
    record = {
        "text": result.text,
        "tokens": len(result.tokens),
        "domain": used,
        "finish": result.finish,
        "prompt_tokens_per_second": result.prompt_tokens_per_second,
        "tokens_per_second": result.tokens_per_second,
    }
    emit(as_json, record, "")


@cli.command(short_help="Talk with the model, and teach it on the way.")
@click.option("--domain", default="auto", show_default=True, help="a domain's name, none for the bare base, or auto")
@click.option("--system", help="what the model is told before the conversation begins")
@sampling(max_tokens=512)
@common()
def chat(
    domain: str,
    system: str | None,
    max_tokens: int,
    stop: tuple[str, ...],
    model: Path | None,
    store: Path | None,
    as_json: bool,
    quiet: bool,
    **sampling: Any,
) -> None:
    """Talk with the model: /learn teaches it on the way, /help shows what else there is.

    Enter sends, Alt-Enter goes on in the next line, Ctrl-C stops an answer, Ctrl-D leaves. Where stdin is no terminal,
    each of its lines is answered; with --json by one object a line.

    \b
    Examples:
      minimac-mlx chat
      minimac-mlx chat --domain medical --temperature 0
      minimac-mlx chat --system "You answer in one sentence." --json
    """
    from mlx_impl.chat import Chat
    from mlx_impl.generate import Sampling
    from mlx_impl.learner import ContinualLearner
    from mlx_impl.terminal import Terminal, converse

    settings = Sampling(**sampling)
    screen = Terminal(as_json, quiet)
    learner = ContinualLearner.from_checkpoint(_model(model), store=store)
    converse(Chat(learner, screen, domain, system, max_tokens, settings, stop, quiet), screen)


@cli.command("eval", short_help="Measure how well a text is predicted.")
@PATHS
@DOMAIN
@click.option(
    "--context", type=click.IntRange(2), help="tokens a window  [default: 512, or the model's context if that is less]"
)
@click.option(
    "--answers", is_flag=True, help="also answer the prompts of .jsonl rows, greedily, and count what is right"
)
@common()
def evaluate(
    paths: tuple[Path, ...],
    domain: str,
    context: int | None,
    answers: bool,
    model: Path | None,
    store: Path | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Measure how well the model predicts files, or - for stdin: loss, perplexity, bits per byte, accuracy.

    With --domain auto each document is measured under the domain that its first tokens suggest.

    \b
    Examples:
      minimac-mlx eval notes.md
      minimac-mlx eval notes.md --domain none
      minimac-mlx eval questions.jsonl --domain medical --answers
    """
    from mlx_impl.answers import answer
    from mlx_impl.console import Reporter, evaluation_text
    from mlx_impl.learner import ContinualLearner

    documents, _ = _documents(paths, Reporter(quiet))
    learner = ContinualLearner.from_checkpoint(_model(model), store=store)
    longest = learner.model.config.max_seq_len
    if context is not None and context > longest:
        raise InputError(f"--context {context} is longer than the model's context of {longest} tokens")
    if domain == "auto":
        measured, chosen = learner.evaluate_routed(documents, context)
        record = {**measured.as_json(), "domain": domain, "domains": chosen}
    else:
        used = learner.choose(domain)
        record = {**learner.evaluate(documents, context).as_json(), "domain": used}
    if answers:
        record["answers"] = answer(learner, documents, domain).as_json()
    emit(as_json, record, evaluation_text(record))


@cli.command("list", short_help="Show what has been learned.")
@common()
def list_domains(model: Path | None, store: Path | None, as_json: bool, quiet: bool) -> None:
    """Show the domains and their latest lessons.

    \b
    Example:
      minimac-mlx list
    """
    from mlx_impl.console import domains_text
    from mlx_impl.store import open_store

    records = open_store(_model(model), store).overview()
    emit(as_json, {"domains": records}, domains_text(records))


@cli.command(short_help="Take a lesson back.")
@click.argument("domain", default="main")
@click.option("--to", metavar="VERSION", help="go to this version, like v0002")
@common()
def undo(domain: str, to: str | None, model: Path | None, store: Path | None, as_json: bool, quiet: bool) -> None:
    """Take the last lesson of a domain back; of a first lesson, remove the domain.

    \b
    Examples:
      minimac-mlx undo
      minimac-mlx undo medical --to v0002
    """
    from mlx_impl.store import open_store, version_number

    lessons = open_store(_model(model), store)
    number = version_number(to) if to is not None else None
    with lessons.writing():
        before = lessons.require(domain)
        head = lessons.undo(domain, number)
    now = f"{domain} is at {head.name}" if head else f"{domain} had no other lesson and is removed"
    emit(
        as_json,
        {"domain": domain, "undone": before.name, "version": head.name if head else None},
        f"undone {before.name}; {now}",
    )


@cli.command(short_help="Show the lessons of a domain.")
@click.argument("domain", default="main")
@common()
def log(domain: str, model: Path | None, store: Path | None, as_json: bool, quiet: bool) -> None:
    """Show the lessons that a domain stands on, newest first: what they taught, and what they did to earlier ones.

    \b
    Examples:
      minimac-mlx log
      minimac-mlx log medical
    """
    from mlx_impl.console import log_text
    from mlx_impl.store import open_store

    lessons = open_store(_model(model), store)
    lessons.require(domain)
    history = lessons.history(domain)
    records = [version.as_json() for version in reversed(history)]
    pruned = history[0].depth - 1
    emit(as_json, {"domain": domain, "lessons": records, "pruned": pruned}, log_text(domain, records, pruned))


@cli.command(short_help="Measure what was learned and what was kept.")
@click.argument("domains", metavar="[DOMAIN]...", nargs=-1)
@click.option("--out", type=FOLDER, default="minimac-report", show_default=True, help="for report.json and report.png")
@click.option(
    "--tokens", type=click.IntRange(1), default=1024, show_default=True, help="of each lesson's held-out text"
)
@common()
def report(
    domains: tuple[str, ...], out: Path, tokens: int, model: Path | None, store: Path | None, as_json: bool, quiet: bool
) -> None:
    """Measure every lesson's held-out text under every version of its domain: what was learned, forgotten and kept.

    Says how long it will take. Prints a table and writes report.json, with all figures, and report.png.

    \b
    Examples:
      minimac-mlx report
      minimac-mlx report medical --tokens 4096 --out figures
    """
    from mlx_impl import report as reports
    from mlx_impl.console import Reporter, report_text
    from mlx_impl.learner import ContinualLearner

    out.mkdir(parents=True, exist_ok=True)  # fails before anything is measured
    with Reporter(quiet) as reporter:
        learner = ContinualLearner.from_checkpoint(_model(model), store=store)
        record = reports.report(learner, domains, tokens, reporter)
        paths = reports.write(record, out)
        reporter.say(f"written: {', '.join(map(str, paths))}")
    emit(as_json, record, report_text(record))


@cli.command(short_help="Erase a domain for good.")
@click.argument("domain")
@click.option("--yes", is_flag=True, help="do not ask")
@common()
def forget(domain: str, yes: bool, model: Path | None, store: Path | None, as_json: bool, quiet: bool) -> None:
    """Erase a domain for good: its adapters, the text held out of its lessons, the names of its files.

    Other domains stay as they are, to the bit. A single lesson cannot be erased from the middle of a domain, because
    later ones were built on it: go back before it with undo, or forget the domain and teach the rest again.

    Only the lessons' own folder is reached: reports, exported adapters and what was typed in chat (chat_history in
    ~/.minimac-mlx) are yours to delete.

    \b
    Examples:
      minimac-mlx forget medical
      minimac-mlx forget medical --yes
    """
    from mlx_impl.console import count, forgetting_text, size
    from mlx_impl.store import open_store

    lessons = open_store(_model(model), store)
    lessons.require(domain)
    if not yes:
        _confirm(f"{forgetting_text(domain, [v.source for v in lessons.versions(domain)])}. Erase it for good?")
    with lessons.writing():
        before = lessons.size()
        gone = lessons.forget(domain)
        freed = before - lessons.size()
    record = {"domain": domain, "forgotten": [version.name for version in gone], "bytes": freed}
    emit(as_json, record, f"{domain} is forgotten: {count(len(gone), 'version')}, {size(freed)}")


@cli.command(short_help="Delete old versions, to save room.")
@click.option("--keep", type=click.IntRange(1), default=5, show_default=True, help="versions of each domain to keep")
@common()
def prune(keep: int, model: Path | None, store: Path | None, as_json: bool, quiet: bool) -> None:
    """Delete old versions: of each domain the current one and those it stands on, --keep in all, stay.

    What domains know stays as it is. Versions that were undone go too, undo reaches back no further than what was
    kept, and the text held out of the deleted lessons is no longer measured.

    \b
    Examples:
      minimac-mlx prune
      minimac-mlx prune --keep 1
    """
    from mlx_impl.console import count, size
    from mlx_impl.store import open_store

    lessons = open_store(_model(model), store)
    with lessons.writing():
        before = lessons.size()
        gone = lessons.prune(keep)
        freed = before - lessons.size()
    pruned = [{"domain": version.domain, "version": version.name} for version in gone]
    emit(
        as_json,
        {"keep": keep, "pruned": pruned, "bytes": freed},
        f"pruned {count(len(gone), 'version')}, {size(freed)} freed" if gone else "nothing to prune",
    )


@cli.command(short_help="Check every file of a model and its lessons.")
@common()
def verify(model: Path | None, store: Path | None, as_json: bool, quiet: bool) -> None:
    """Check the base's files, the database, every version's files, and that nothing else lies among them.

    Prints a line for each problem and ends with code 3 if there is one. Changes nothing.

    \b
    Example:
      minimac-mlx verify
    """
    from mlx_impl.console import verification_text
    from mlx_impl.verify import verify as look

    found = look(_model(model), store)
    record = dataclasses.asdict(found)
    record["problems"] = [printable(line) for line in found.problems]
    emit(as_json, record, verification_text(record))
    if found.problems:
        raise click.exceptions.Exit(DamagedFileError.exit_code)


@cli.command(short_help="Write a domain's adapter for other programs.")
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
    from mlx_impl.console import exported_text
    from mlx_impl.exchange import export_adapter
    from mlx_impl.store import open_store

    if fuse == (to is not None) or (requantize and not fuse):
        raise InputError("say --to FORMAT for the adapter, or --fuse [--requantize] for a whole model")
    directory = _model(model)
    lessons = open_store(directory, store)
    if to is None:
        from mlx_impl.fusing import fuse as write_fused

        record = write_fused(lessons, domain, directory, out, requantize)
    else:
        record = export_adapter(lessons, domain, directory, out, to)
    emit(as_json, record, exported_text(record))


@cli.command("import", short_help="Take an adapter from other programs in.")
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
    from mlx_impl.console import Reporter, imported_text
    from mlx_impl.exchange import import_adapter as take_in
    from mlx_impl.store import open_store

    directory = _model(model)
    version = take_in(open_store(directory, store), domain, directory, source)
    Reporter(quiet).say("which base it was made for cannot be known from its files; its shapes fit this one")
    record = {"domain": domain, **version.as_json()}
    emit(as_json, record, imported_text(record))


@cli.command(short_help="Turn a model from one format into another.")
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
    from mlx_impl.console import Reporter, conversion_text
    from mlx_impl.conversion import DTYPES, format_of
    from mlx_impl.conversion import convert as write_as
    from mlx_impl.foreigndir import architecture

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


@cli.command(short_help="Train a tokenizer.")
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
    from mlx_impl.files import atomic_folder
    from mlx_impl.readers import read_documents
    from mlx_impl.tokenizer import Tokenizer

    if not paths:
        raise InputError("nothing to train on: name files or folders")
    if out.exists():
        raise InputError(f"{out} exists already; name another folder or remove it first")
    texts = (document.text for document in read_documents(paths))
    trained = Tokenizer.train(texts, vocab_size, min_frequency, special_tokens)
    with atomic_folder(out) as folder:
        trained.save(folder)
    emit(
        as_json,
        {"tokenizer": str(out), "vocab_size": trained.vocab_size},
        f"{out}: {trained.vocab_size:,} tokens",
    )


@cli.command(short_help="Train a model.")
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
    from mlx_impl.console import Reporter, training_text

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


@cli.command(short_help="Measure speed and memory beside its peers.")
@click.argument("name", metavar="NAME", type=click.Choice([*BENCH, "all"]))
@click.option("--out", type=FOLDER, default="minimac-bench", show_default=True, help="folder for JSON and pictures")
@click.option("--data", type=FOLDER, help="folder of NAME/train.txt to train on  [default: Python's reference]")
@click.option(
    "--repetitions", type=click.IntRange(1), default=REPETITIONS, show_default=True, help="of each measurement"
)
@click.option("--quick", is_flag=True, help="small sizes, to see that it works: no figures to keep")
@click.option("--thorough", is_flag=True, help="what can be long is: 10,000 steps where else 2,000")
@common(store=False)
def bench(
    name: str,
    out: Path,
    data: Path | None,
    repetitions: int,
    quick: bool,
    thorough: bool,
    model: Path | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Measure this machine: warmed up, repeated, mlx-lm and PyTorch in the same run, a JSON file for each NAME.

    \b
      tokens   decoding and prefill              train    LoRA and full steps, memory
      learn    seconds to a held-out loss        route    choosing among many domains
      startup  to the first token                curves   how costs grow

    \b
    Examples:
      minimac-mlx bench all
      minimac-mlx bench tokens --quick
    """
    from benchmarks.bench import run as measured
    from benchmarks.harness import Options
    from mlx_impl.console import Reporter, bench_text

    with Reporter(quiet) as reporter:
        options = Options(_model(model), data, repetitions, quick, thorough, reporter.say)
        records = [measured(one, options, out) for one in (BENCH if name == "all" else [name])]
    emit(as_json, {"benchmarks": records}, "\n\n".join(map(bench_text, records)))


@cli.command(short_help="Show how this machine is doing.")
@common(store=False)
def doctor(model: Path | None, as_json: bool, quiet: bool) -> None:
    """Show this machine as minimac-mlx sees it, and what to do if something is wrong.

    \b
    Example:
      minimac-mlx doctor
    """
    from mlx_impl import device
    from mlx_impl.console import doctor_text

    record = {**device.describe(), "model": str(model) if model else _default_model(), "advice": device.advice()}
    emit(as_json, record, doctor_text(record))


@cli.command(short_help="See everything once, in a few minutes.")
@click.option("--seconds", type=float, default=60.0, show_default=True, help="time for each of the two trainings")
@common(store=False)
def demo(seconds: float, model: Path | None, as_json: bool, quiet: bool) -> None:
    """Everything once: pull a base, train a tiny model from scratch, teach the base a file, take it back.

    The text is Python's own language reference, which every Python brings along. With --model nothing is pulled and
    that model is taught; it is not changed either way.

    \b
    Examples:
      minimac-mlx demo
      minimac-mlx demo --seconds 20 --model my-model
    """
    from mlx_impl.console import Reporter
    from mlx_impl.demo import demo as play

    with Reporter(quiet) as reporter:
        record = play(seconds, model, reporter, reporter.say if as_json else lambda line: write(f"{line}\n"))
    if as_json:
        emit(as_json, record, "")


def _compared(source: Path, target: Path, config: Path | None, stored: str) -> dict[str, Any]:
    """Both models on the same tokens, each run by the implementation that its format is for."""
    from convert.check import compare, tokens_for
    from convert.detect import read_model

    def traced(path: Path, config: Path | None = None) -> Any:
        model = read_model(path, config)
        if model.framework == "torch":
            try:
                from torch_ref.check import trace
            except ModuleNotFoundError:
                raise InputError(f"--check {path}: needs PyTorch; pip install 'minimac-mlx[torch]'") from None
        else:
            from mlx_impl.check import trace
        return trace(model.config, model.tensors, tokens_for(model.config))

    return dataclasses.asdict(compare(traced(source, config), traced(target), stored))


def _model(named: Path | None) -> Path:
    """The model directory to use: the one named, else the default."""
    from mlx_impl.hub import default_model

    return named if named is not None else default_model()


def _default_model() -> str | None:
    """The default model's folder, if there is one."""
    from mlx_impl.hub import default_model

    try:
        return str(default_model())
    except InputError:
        return None


def _confirm(question: str) -> None:
    """Ask on the terminal; MiniMacError for no, InputError where there is nobody to ask."""
    if sys.stdin is None or not sys.stdin.isatty():
        raise InputError("this cannot be taken back, and there is no terminal to ask on; say --yes if it is meant")
    if not click.confirm(printable(question), err=True):
        raise MiniMacError("nothing was erased")


def _documents(paths: Sequence[Path], reporter: "Reporter", text: str | None = None) -> tuple[list["Document"], str]:
    """The documents that --text, - or PATHS name, and a label for them. Says what was passed over in folders."""
    from mlx_impl import readers

    if text is not None:
        if paths:
            raise InputError(f"--text and {paths[0]}: give a text or files, not both")
        return [readers.text_document(text, "text")], "text"
    if Path("-") in paths:
        if len(paths) > 1:
            raise InputError("- is stdin and comes alone, not among files")
        return [readers.text_document(_stdin(), "stdin")], "stdin"
    if not paths:
        raise InputError("no text: name files or folders, or - for stdin")
    skipped: list[str] = []
    documents = list(readers.read_documents(paths, lambda path, reason: skipped.append(f"{path} ({reason})")))
    if skipped:
        others = f" and {len(skipped) - 1} more" if len(skipped) > 1 else ""
        reporter.say(f"passed over {skipped[0]}{others}")
    label = os.path.basename(os.path.abspath(paths[0])) or str(paths[0])
    return documents, label if len(paths) == 1 else f"{label} and {len(paths) - 1} more"


def _stdin() -> str:
    """All of stdin as text."""
    if sys.stdin is None:
        raise InputError("stdin is closed: there is nothing to read")
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"stdin: not UTF-8 at byte {error.start:,}; convert it to UTF-8 first") from None


def main(arguments: list[str] | None = None) -> None:
    """Entry point."""
    run(cli, "minimac-mlx", arguments)


if __name__ == "__main__":
    main()
