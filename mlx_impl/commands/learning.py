"""Teaching the model: one lesson from files, a text or stdin."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_impl.commands.inputs import documents_from, model_directory
from mlx_impl.commands.options import PATHS, as_given, command, common, given, setting
from mlx_impl.config import LOSS_ON, REPLAY_TARGETS, Budget, ContinualLearningConfig
from mlx_impl.errors import InputError, legible
from mlx_impl.shell import emit

if TYPE_CHECKING:
    from mlx_impl.readers import Document


@command("learn")
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
@setting(ContinualLearningConfig, "seq_len")
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
@setting(ContinualLearningConfig, "answer_share")
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
    from mlx_impl.console import Reporter
    from mlx_impl.learner import ContinualLearner
    from mlx_impl.results import lesson_text

    for off, option, name in ((no_replay, "--no-replay", "replay_ratio"), (no_ewc, "--no-ewc", "ewc_lambda")):
        if off and options[name] is not None:
            raise InputError(f"{option} and --{name.replace('_', '-')}: give one of the two")
        if off:
            options[name] = 0.0
    if options["lora_r"] is not None:
        options["lora_alpha"] = 2.0 * options["lora_r"]  # the scale stays what the learning rate was chosen for
    with as_given():
        config = dataclasses.replace(ContinualLearningConfig(), **given(**options))
    budget = Budget(**given(seconds=seconds, epochs=epochs, steps=steps))
    if base_data == "-" and Path("-") in paths:
        raise InputError("- is stdin, which is read once: as the text or as --base-data")
    with Reporter(quiet) as reporter:
        documents, label = documents_from(paths, reporter, text)
        learner = ContinualLearner.from_checkpoint(model_directory(model), config, store)
        if options["seq_len"] is not None and config.seq_len > learner.config.seq_len:
            reporter.say(f"windows of {learner.config.seq_len:,} tokens, the model's context, not {config.seq_len:,}")
        if config.distill_weight > 0 and base_data is None and config.replay_targets == "predictions":
            reporter.say("--distill holds text like the base's to its predictions, but --base-data names none")
        like_base: list[Document] = []
        if base_data == "self":
            reporter.say("the base writes text of its own first")
            like_base = learner.sampled_from_base()
        elif base_data is not None:
            like_base, _ = documents_from((Path(base_data),), reporter)
        known = domain if domain in learner.store.domains() else "none"
        before = learner.answer(probe, known) if probe is not None else None
        head = learner.store.head(domain)
        try:
            lesson = learner.learn(documents, domain, legible(source or label), budget, reporter, importance, like_base)
        except KeyboardInterrupt:
            kept = learner.store.head(domain) != head
            raise KeyboardInterrupt("the lesson was kept already" if kept else "nothing was kept") from None
        record = lesson.as_json()
        if probe is not None:
            try:
                after = learner.answer(probe, domain)
            except KeyboardInterrupt:
                reporter.say(
                    f"{domain} {lesson.version} was learned already; `minimac-mlx undo {domain}` takes it back"
                )
                raise
            record["probe"] = {"prompt": probe, "before": before, "after": after}
    emit(as_json, record, lesson_text(record))
