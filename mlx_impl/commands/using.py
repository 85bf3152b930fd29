"""What a model is for: it continues prompts, talks, and is measured on a text."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from mlx_impl.commands.inputs import documents_from, model_directory, read_stdin
from mlx_impl.commands.options import PATHS, as_given, command, common
from mlx_impl.errors import InputError
from mlx_impl.shell import emit, harmless, write

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


@command("generate")
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
    from mlx_impl.console import Reporter
    from mlx_impl.generate import Sampling, complete, prompt_ids
    from mlx_impl.learner import ContinualLearner
    from mlx_impl.results import choice_text, context_text

    with as_given():
        settings = Sampling(**sampling)
    if prompt_cache is not None and window is not None:
        raise InputError("--prompt-cache keeps every token and --window does not: give one of them")
    prompt = read_stdin() if prompt == "-" else prompt
    learner = ContinualLearner.from_checkpoint(model_directory(model), store=store)
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
    kept, empty = PromptCache(), learner.model.make_cache(window)
    if prompt_cache is not None:
        kept.check(prompt_cache, empty)  # before the answer takes its time
        if prompt_cache.exists() and prompt_cache.stat().st_size > 0:
            kept = PromptCache.load(prompt_cache, learner.model.config)
    owner = learner.weights_id()
    cache = kept.take(ids, owner) or empty
    result = complete(learner.model, tokenizer, ids, max_tokens, settings, stop, window, on_text, cache)
    record = {
        "text": result.text,
        "tokens": len(result.tokens),
        "domain": used,
        "finish": result.finish,
        "prompt_tokens_per_second": result.prompt_tokens_per_second,
        "tokens_per_second": result.tokens_per_second,
    }
    emit(as_json, record, "")
    if prompt_cache is not None and ids:
        kept.put([*ids, *result.tokens], owner, cache)
        kept.save(prompt_cache)


@command("chat")
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

    Enter sends, Alt-Enter or a backslash before it goes on in the next line, Ctrl-C stops an answer, Ctrl-D leaves.
    Where stdin is no terminal, each of its lines that is not blank is answered, one with a backslash at its end
    together with the next; with --json by one object, {"error": ...} where nothing came of it.

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

    with as_given():
        settings = Sampling(**sampling)
    screen = Terminal(as_json, quiet)
    learner = ContinualLearner.from_checkpoint(model_directory(model), store=store)
    converse(Chat(learner, screen, domain, system, max_tokens, settings, stop, quiet), screen)


@command("eval")
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
    from mlx_impl.console import Reporter
    from mlx_impl.learner import ContinualLearner
    from mlx_impl.results import evaluation_text

    documents, _ = documents_from(paths, Reporter(quiet))
    learner = ContinualLearner.from_checkpoint(model_directory(model), store=store)
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
