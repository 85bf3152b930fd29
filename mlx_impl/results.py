"""Results in words, as a person reads them: what a command prints on stdout where it is not asked for JSON.

Most take the record that `--json` would print. Imports no MLX.
"""

import textwrap
from collections.abc import Sequence
from typing import Any

from mlx_impl.errors import legible, listed
from mlx_impl.ngrams import TOLD

Record = dict[str, Any]

LESSONS_ACROSS = 8
"""Lessons whose losses after every stage fit into 80 columns."""


def duration(seconds: float) -> str:
    """45 s, 12 min, 3 h 20 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def count(number: int, what: str) -> str:
    """1 lesson, 2 lessons."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def size(bytes: int) -> str:
    """340 bytes, 12.3 kB, 4.5 MB, 1.2 GB."""
    if bytes < 1000:
        return count(bytes, "byte")
    unit, name = next((unit, name) for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if bytes >= unit)
    return f"{bytes / unit:,.1f} {name}"


def context_text(prompt: int, new: int, context: int) -> str:
    """A warning that a text may outgrow what the model was trained for."""
    return (
        f"prompt and --max-tokens are {prompt:,} + {new:,} tokens, the model was trained for {context:,}: "
        "what lies beyond gets worse"
    )


def lesson_text(lesson: Record, more: str = ", --seconds gives it more") -> str:
    """What a lesson did; `more` is how it can be given more time."""
    held = lesson.get("heldout")
    figures = held or lesson["fit"]
    where = f"{'held-out text' if held else 'the text itself, no part held out'} ({figures['tokens']:,} tokens)"
    replayed = (
        f", {lesson['replayed_tokens']:,} tokens of earlier lessons replayed" if lesson["replayed_tokens"] else ""
    )
    part = f"{seen} of " if (seen := _seen(lesson)) else ""
    left = "the end of the text" if part else "all of its passes over the text"
    cut = "" if lesson["complete"] else f"; the time was up before {left}{more}"
    lines = [
        f"{lesson['domain']} {lesson['version']}: learned {part}{lesson['source']} in {duration(lesson['seconds'])}, "
        f"{count(lesson['steps'], 'step')} of {count(lesson['batch_size'], 'window')}{replayed}{cut}",
        f"loss on {where}: {figures['before']:.3f} -> {figures['after']:.3f} nats per token"
        f"{_taught(figures, 'an earlier lesson')}",
    ]
    lines += [
        f"{earlier['version']} ({earlier['source']}): {earlier['before']:.3f} -> {earlier['after']:.3f}, "
        f"perplexity {earlier['ppl_forget_percent']:+.1f} % on {earlier['tokens']:,} of its tokens"
        f"{_taught(earlier, 'this lesson')}"
        for earlier in lesson["kept"]
    ]
    if lesson["not_measured"]:
        others = count(lesson["not_measured"], "other earlier lesson" if lesson["kept"] else "earlier lesson")
        lines.append(
            f"{others} not measured, to keep this one short: `minimac-mlx report {lesson['domain']}` measures all"
        )
    if "probe" in lesson:
        lines += [f"{when}: {legible(' '.join(lesson['probe'][when].split()))}" for when in ("before", "after")]
    return "\n".join(lines)


def _taught(measured: Record, where: str) -> str:
    """A warning where held-out text was taught by another lesson: its loss then says less of what was learned."""
    share = measured.get("taught_percent", 0.0)
    return f" ({share:.0f} % of that text was in {where})" if share >= TOLD else ""


def choice_text(domain: str | None) -> str:
    """Which domain answers, where the router chose it."""
    return f"domain {domain}" if domain else "the base answers: no domain suits the prompt better; --domain names one"


def evaluation_text(record: Record) -> str:
    """What a model makes of a text."""
    domain = record["domain"] or "none"
    if "domains" in record:
        domain += f" ({', '.join(f'{name}: {number:,}' for name, number in record['domains'].items())})"
    perplexity = f"{record['perplexity']:,.2f}" if record["perplexity"] is not None else "beyond all numbers"
    bits = f"{record['bits_per_byte']:.4f}" if record["bits_per_byte"] is not None else "no bytes to count"
    return (
        f"domain {domain}, {record['tokens']:,} tokens\n"
        f"loss           {record['loss']:.4f} nats per token\n"
        f"perplexity     {perplexity}\n"
        f"bits per byte  {bits}\n"
        f"accuracy       {record['accuracy']:.1%} of next tokens\n"
        f"calibration    off by {record['calibration_error']:.1%} on average"
    ) + (
        f"\nanswers        {record['answers']['right']:,} of {count(record['answers']['pairs'], 'prompt')} right"
        if "answers" in record
        else ""
    )


def undo_record(domain: str, before: Sequence[Any], after: Sequence[Any], there: Sequence[Any]) -> Record:
    """What an undo did, from the versions that the domain stood on, those it stands on now, and all it had before.

    Without a lesson left the domain is gone, and with it what had been undone earlier.
    """
    stood, stands, had = ([version.name for version in versions] for versions in (before, after, there))
    return {
        "domain": domain,
        "undone": [name for name in reversed(stood) if name not in stands],
        "erased": [] if stands else [name for name in had if name not in stood],
        "version": stands[-1] if stands else None,
    }


def undo_text(record: Record) -> str:
    """The same in a line."""
    now = f"{record['domain']} is at {record['version']}"
    if record["version"] is None:
        also = f", with {listed(record['erased'])}, which had been undone before" if record["erased"] else ""
        now = f"{record['domain']} has no other lesson and is removed{also}"
    return f"undone {listed(record['undone'])}; {now}" if record["undone"] else f"{now} again"


def report_text(record: Record) -> str:
    """What was learned and what was kept, a paragraph or two a domain, in 80 columns."""
    return "\n\n".join(_domain_report(domain, record["tokens_per_text"]) for domain in record["domains"])


def _domain_report(record: Record, tokens: int) -> str:
    """One domain: a line a lesson, the losses behind them where they fit, and the figures of the whole."""
    matrix, lessons = record["matrix"], record["lessons"]
    losses = matrix["losses"]
    what = f"{record['domain']}: {count(len(lessons), 'lesson')}, {record['regime']}"
    lines = [
        *textwrap.wrap(f"{what}; nats per held-out token, of {tokens:,} at most", 80),
        f"{'lesson':<8}{'source':<19}{'base':>8}{'learned':>9}{'now':>8}{'forgotten':>12}{'gain lost':>12}",
    ]
    forgotten, lost = matrix["ppl_forget_percent"], matrix["gain_lost_percent"]
    for j, lesson in enumerate(lessons):
        source = lesson["source"] if len(lesson["source"]) <= 17 else lesson["source"][:16] + "…"
        figures = [_figure(losses[stage][j], ".3f") for stage in (0, j + 1, -1)]
        shares = [_figure(each["each"][j], "+.1f", " %") for each in (forgotten, lost)]
        lines.append(
            f"{lesson['version']:<8}{source:<19}{figures[0]:>8}{figures[1]:>9}{figures[2]:>8}"
            f"{shares[0]:>12}{shares[1]:>12}"
        )
    for what in ("mean", "worst") if forgotten["mean"] is not None else ():
        shares = [_figure(each[what], "+.1f", " %") for each in (forgotten, lost)]
        lines.append(f"{what:<52}{shares[0]:>12}{shares[1]:>12}")
    if forgotten["mean"] is not None:
        lines += textwrap.wrap("(forgotten: perplexity above the text's best so far; gain lost: since its lesson)", 80)
    if 2 < len(lessons) <= LESSONS_ACROSS:
        lines += ["", "".join(f"{name:>8}" for name in ("after", *(lesson["version"] for lesson in lessons)))]
        for name, row in zip(("base", *matrix["names"]), losses, strict=True):
            lines.append("".join(f"{value:>8}" for value in (name, *(_figure(loss, ".3f") for loss in row))))
    return "\n".join([*lines, *_domain_notes(record)])


def _domain_notes(record: Record) -> list[str]:
    """What there is to say of a domain besides its lessons' figures."""
    matrix, lines = record["matrix"], []
    if matrix["backward_transfer"] is not None:
        forward = matrix["forward_transfer"]
        later = "" if forward is None else f", to later ones {forward:+.3f}"
        lines.append(
            f"transfer to earlier lessons {matrix['backward_transfer']:+.3f}{later} nats per token (above 0 helped)"
        )
    for lesson in record["lessons"]:
        if (found := lesson["ppl_forget_interval"]) is not None:
            lines.append(
                f"{lesson['version']} forgotten: {found['low']:+.1f} to {found['high']:+.1f} % in {found['level']:.0%} "
                f"of resamples of its {lesson['documents']} documents"
            )
    if record["routing"] is not None:
        routing = record["routing"]
        chosen = ", ".join(f"{name} {number}" for name, number in routing["chosen"].items())
        lines.append(
            f"routed by {routing['routed_by_tokens']} tokens: {routing['accuracy']:.0%} of "
            f"{count(routing['pieces'], 'piece')} right ({chosen}), {routing['oracle_gap']:+.3f} nats per token"
        )
    if record["generated"] is not None:
        base, own = record["generated"]["base"], record["generated"]["domain"]
        lines.append(
            f"{own['distinct_1']:.0%} of the tokens it generates are different ones (base {base['distinct_1']:.0%}), "
            f"{own['repetition_4']:.0%} of its 4-grams stood there before ({base['repetition_4']:.0%}), "
            f"longest loop {count(own['longest_loop'], 'token')} ({base['longest_loop']})"
        )
    lines += [
        f"{lesson['taught_percent']:.0f} % of {lesson['version']}'s held-out text was taught by a later lesson: "
        "whether it was forgotten cannot be told; not in mean, worst and transfer"
        for lesson in record["lessons"]
        if lesson["taught_percent"] >= TOLD
    ]
    lines += [
        f"{lesson['known_percent']:.0f} % of {lesson['version']}'s held-out text was taught by an earlier lesson: what "
        "was gained on it is not its own; not in transfer to later ones"
        for lesson in record["lessons"]
        if lesson["known_percent"] >= TOLD
    ]
    unmeasured = [lesson["version"] for lesson in record["lessons"] if not lesson["measured_tokens"]]
    if unmeasured:
        lines.append(
            f"nothing was held out of {', '.join(unmeasured)}: not measured (a tenth is of texts of 2,000 tokens or "
            "more; `minimac-mlx log` says how well shorter ones are known)"
        )
    holes = [f"{hole['lesson']} at stage {hole['stage']}" for hole in matrix["missing"]]
    damaged = [hole for hole in holes if hole.split()[0] not in unmeasured]
    if damaged:
        lines.append(f"no finite loss: {', '.join(damaged)}")
    if record["pruned"]:
        lines.append(f"{count(record['pruned'], 'older lesson')} pruned: not measured")
    return [line for text in lines for line in textwrap.wrap(text, 80, subsequent_indent="  ")]


def _figure(value: float | None, form: str, unit: str = "") -> str:
    """A number, or a dash where there is none."""
    return "-" if value is None else f"{value:{form}}{unit}"


def domains_text(records: list[Record], where: str) -> str:
    """One line a domain of those that lie in `where`."""
    if not records:
        return f"nothing learned yet in {legible(where)}; teach it with `minimac-mlx learn`"
    lines = []
    for r in records:
        lessons = count(r["lessons"], "lesson")
        lines.append(
            f"{r['domain']:<16} {r['version']}  {lessons:<11} {r['created'][:10]}  {_change(r)}  {r['source']}"
        )
    return "\n".join(lines)


def _seen(lesson: Record) -> str:
    """How much of a text a lesson came to, empty where that was all of it or, of an older one, nobody knows."""
    seen = lesson.get("seen_percent", 100.0)
    return f"{seen:.{0 if seen >= 1 else 1}f} %" if seen < 100 else ""


def _change(version: Record) -> str:
    """What a version did to the loss on its own text; of one that came from elsewhere, from where."""
    if "imported" in version:
        return f"imported from {version['imported']}"
    figures = version.get("heldout") or version["fit"]
    return f"{'held-out' if 'heldout' in version else 'fit'} {figures['before']:.3f} -> {figures['after']:.3f}"


def log_text(domain: str, lessons: list[Record], pruned: int) -> str:
    """The lessons of a domain, newest first; `pruned` counts the older ones that are gone."""
    lines = []
    for r in lessons:
        taught = ""
        if "imported" not in r:
            part = f" ({seen} of the text)" if (seen := _seen(r)) else ""
            taught = f"{count(r['tokens'], 'token')}{part}, {count(r['steps'], 'step')}, {duration(r['seconds'])}  "
        lines.append(f"{r['version']}  {r['created'][:16].replace('T', ' ')}  {taught}{_change(r)}  {r['source']}")
        kept = [f"{k['version']} {k['ppl_forget_percent']:+.1f} %{_taught(k, r['version'])}" for k in r.get("kept", [])]
        if kept:
            others = f"; {left} not measured" if (left := r.get("not_measured", 0)) else ""
            lines.append(f"       perplexity of earlier lessons, by this one: {', '.join(kept)}{others}")
    if pruned:
        lines.append(f"{count(pruned, 'older lesson')} of {domain} pruned")
    return "\n".join(lines)


def exported_text(record: Record) -> str:
    """What was written."""
    files = ", ".join(record["files"])
    written = f"{record['domain']} {record['version']} as {record['format']}: {files} in {record['out']}"
    if "survived_percent" in record:
        written += f"\n{record['survived_percent']:.1f} % of what the adapter changes outlived the quantisation"
    return written


def conversion_text(record: Record) -> str:
    """What was written, what was left out, and how close the two models are."""
    bits = f" in {record['bits']} bits" if "bits" in record else ""
    lines = [f"{record['target']}: {record['format']}, {record['parameters']:,} weights{bits} as {record['dtype']}"]
    lines += [f"  {file}: {told}" for file, told in record.get("files", {}).items()]
    if record.get("domain"):
        command = f"minimac-mlx learn FILE -m {record['target']} --domain {record['domain']}"
        lines.append(f"domain {record['domain']} {record['version']}: `{command}` goes on from there")
    lines += [f"note: {note}" for note in record["notes"]]
    if check := record.get("check"):
        far = "not finite" if check["difference"] is None else f"{check['difference']:.1e}"
        line = f"largest difference of the logits over {check['tokens']} tokens: {far}, at most {check['at_most']:.1e}"
        lines.append(line + (f" is allowed; first in {check['first']}" if check["first"] else " is allowed"))
        if rounding := check.get("quantising"):
            changed = f"{rounding['kl']:.2g} nats per token, on {check['tokens']} tokens of {rounding['on']}"
            lines.append(f"what quantising itself changed in the predictions (mean KL divergence): {changed}")
    return "\n".join(lines)


def imported_text(record: Record) -> str:
    """What was taken in."""
    return (
        f"{record['domain']} {record['version']}: imported {record['source']} from {record['imported']}, "
        f"{record['trainable_parameters']:,} parameters, rank {record['rank']}, scale {record['scale']:g}"
    )


def forgetting_text(domain: str, sources: list[str]) -> str:
    """What `forget` is about to do; `sources` are the labels of all versions, oldest first."""
    labels = list(dict.fromkeys(sources))
    named = ", ".join(labels[:3]) + (f" and {len(labels) - 3} more" if len(labels) > 3 else "")
    return f"{domain}: {count(len(sources), 'version')}, learned from {named}"


def verification_text(record: Record) -> str:
    """One line a problem, or that there is none."""
    if record["problems"]:
        return "\n".join(record["problems"])
    counts = ", ".join(count(record[f"{what}s"], what) for what in ("domain", "version", "file"))
    base = f"{count(record['base_files'], 'file')} of the base" if record["base_files"] else "a base without hashes"
    writer = f"; process {record['writer']} is writing, so leftovers were not looked for" if record["writer"] else ""
    return f"all is well: {counts}, {base}{writer}"


def training_text(record: Record) -> str:
    """How a training run ended."""
    best = (
        ""
        if record["best_loss"] is None
        else f"; held-out loss {record['best_loss']:.3f} at step {record['best_step']}"
    )
    return (
        f"{record['model']}: {record['step']:,} steps, {record['tokens']:,} tokens in {duration(record['seconds'])}, "
        f"loss {record['loss']:.3f}{best}\nthe curve is in {record['model']}/loss.png"
    )


def bench_text(record: Record) -> str:
    """The figures of one benchmark with their goals, where they were measured and where they lie."""
    machine = record["machine"]
    lines = [
        f"{record['benchmark'].removeprefix('bench_')}: {record['model']} on {machine['chip']}, {machine['dtype']}"
        + (", a quick run: these figures say nothing but that it works" if record["quick"] else "")
    ]
    for row in record["figures"]:
        goal = "" if row["goal"] is None else f"{row['goal']}: {'met' if row['met'] else 'not met'}"
        value = f"{_figure(row['value'], '.3g'):>9} {row['unit']:<5} {goal:<22} "
        lines += textwrap.wrap(value + row["figure"], 100, initial_indent="  ", subsequent_indent=" " * 41)
    absent = [f"{name} ({peer['absent']})" for name, peer in record.get("peers", {}).items() if "absent" in peer]
    if absent:
        lines.append(f"  not compared with {', '.join(absent)}")
    return "\n".join([*lines, f"  written to {', '.join(record['written'])}"])


def doctor_text(record: Record) -> str:
    """The machine, one fact a line, and the advice."""
    packages = ", ".join(f"{name} {version}" for name, version in record["packages"].items())
    lines = [
        f"chip      {record['chip']}, {record['cores']} cores",
        f"memory    {record['memory_bytes'] / 2**30:.1f} GB",
        f"system    {record['system']}, Python {record['python']}",
        f"device    {record['device']}, computing in {record['dtype']}",
        *([f"blas      {record['blas']}"] if record["blas"] else []),
        f"packages  {packages}",
        f"model     {record['model'] or 'none yet: run `minimac-mlx pull`'}",
    ]
    return "\n".join(lines + [f"! {line}" for line in record["advice"]] + ([] if record["advice"] else ["all is well"]))
