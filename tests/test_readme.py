"""The README is true: its Python runs, its first ten minutes run, every command in it parses, its figures have a file.

A tiny model stands where `pull` would put SmolLM2, so that nothing is downloaded.
"""

import json
import re
import shlex
from pathlib import Path
from pydoc_data import topics
from typing import Any

import numpy as np
import pytest

import cli
from benchmarks import bench
from mlx_impl import modeldir
from mlx_impl.arrays import flatten
from mlx_impl.config import ModelConfig
from mlx_impl.model import ContinualLLM
from mlx_impl.tokenizer import Tokenizer

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
CHAT = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands() -> list[list[str]]:
    """Every `minimac-mlx` line of the README, without the program's name and comments."""
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("minimac-mlx")]


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home with a tiny pulled model, and notes in the current folder."""
    home = tmp_path / ".minimac-mlx"
    model = home / "models" / "smollm2-135m-instruct"
    text = "\n\n".join(topics.topics[name] for name in sorted(topics.topics)[:6])
    tokenizer = Tokenizer.train([text], 400)
    tokenizer.save(tmp_path / "tok")
    files = {path.name: path.read_bytes() for path in (tmp_path / "tok").iterdir()}
    settings = json.loads(files["tokenizer_config.json"])
    files["tokenizer_config.json"] = json.dumps({**settings, "chat_template": CHAT}).encode()
    config = ModelConfig(tokenizer.vocab_size, d_model=32, num_layers=2, num_query_heads=4, num_kv_heads=2, d_ff=64)
    arrays = {name: np.array(array) for name, array in flatten(ContinualLLM(config).parameters()).items()}
    modeldir.write_model_directory(model, config, arrays, files, {}, {})
    (home / "default").write_text(str(model))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("MINIMAC_HOME", raising=False)
    monkeypatch.delenv("MINIMAC_MODEL", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.md").write_text(text[:12000], encoding="utf-8")
    return tmp_path


def run(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    return int(ended.value.code or 0)


def test_the_first_ten_minutes(reader: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = blocks("sh")[1]
    lines = [shlex.split(line, comments=True)[1:] for line in first.splitlines() if line.startswith("minimac-mlx")]
    assert [line[0] for line in lines if line[0] != "generate"] == ["doctor", "pull", "learn", "eval", "list", "undo"]
    for line in lines:
        if line[0] != "pull":  # the fixture did
            assert run(line) == 0, line
    assert "undone v0001; main has no other lesson and is removed" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", commands(), ids=" ".join)
def test_every_command_parses(arguments: list[str]) -> None:
    """Names and options exist; nothing is run."""
    command = cli.cli.commands[arguments[0]]
    command.make_context(arguments[0], list(arguments[1:]))


def test_python_blocks_run(reader: Path) -> None:
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), {})


def test_yaml_blocks_are_configurations(tmp_path: Path) -> None:
    from mlx_impl.recipe import read_config

    (tmp_path / "c.yaml").write_text(blocks("yaml")[0])
    model, train = read_config(str(tmp_path / "c.yaml"))
    assert (model.num_layers, train) == (8, {"lr": 0.0005, "steps": 2000})


def test_the_formats_name_tests_that_exist() -> None:
    named = set(re.findall(r"`(test_\w+)`", README))
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    assert len(named) > 10
    assert named <= set(re.findall(r"^def (test_\w+)", sources, re.MULTILINE))
    table = README.partition("\n## Formats\n")[2].partition("\n|---|")[2].partition("\n\n")[0]
    rows = [row.strip("|").split("|") for row in table.splitlines()[1:]]
    assert len(rows) >= 13
    for name, read, write, by, tests in rows:
        assert read.strip(), name
        assert write.strip(), name
        assert by.strip(), name
        assert "`test_" in tests, name


def test_gguf_gives_the_text_that_the_readme_says() -> None:
    result = json.loads((ROOT / "benchmarks" / "results" / "gguf.json").read_text(encoding="utf-8"))
    assert set(result["files"]) == {"gguf-f16", "gguf-q8_0"}
    for file in result["files"].values():
        for read in (file, file["llama.cpp"]):
            assert read["same_greedy_tokens"]
            assert read["same_token_ids"]
    assert result["adapter"]["same_greedy_tokens"]
    assert "gives the same 24 greedy tokens as here" in README


def test_lesson_figures_are_those_of_the_file() -> None:
    lesson = json.loads((ROOT / "benchmarks" / "results" / "lesson.json").read_text(encoding="utf-8"))
    held = lesson["heldout"]
    figures = f"{held['before']:.3f} -> {held['after']:.3f}, {lesson['trained_tokens']:,}"
    figures += f", {lesson['tokens_per_second']:.0f}, {100 * lesson['share_outside_steps']:.0f} %"
    assert f"| held-out loss, tokens, tokens a second, time outside optimizer steps | {figures} |" in README


def test_parity_figures_are_those_of_the_file() -> None:
    result = json.loads((ROOT / "benchmarks" / "results" / "parity.json").read_text(encoding="utf-8"))
    for name, figures in result["against"].items():
        same = "yes" if figures["same_greedy_tokens"] else "no"
        assert f"| {name} | {figures['largest_difference']:.1e} | {same} |" in README
        assert figures["largest_difference"] <= 1e-3


def test_routing_and_settings_figures_are_those_of_the_files() -> None:
    def result(name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text("utf-8"))
        return found

    routing = result("routing")
    right, rise = routing["by_prefix"]["64"]["router"]["accuracy"], routing["rest"]["mean_loss_percent"]
    assert f"the base's too; what that costs | {100 * right:.0f} %; {rise:.2f} % |" in README
    settings = result("settings_40960")
    ours, plain = settings["settings"]["1 windows, default"], settings["plain"]
    figures = f"{ours['gain']:.3f}; {plain['gain']:.3f}; {ours['gain'] / plain['gain']:.2f} times"
    assert f"with a plain LoRA of rank 8; the ratio | {figures} |" in README


def test_speed_is_that_of_the_files() -> None:
    folder = ROOT / "benchmarks" / "results"
    assert bench.table(folder, goals=True) in README
    curves = json.loads((folder / "bench_curves.json").read_text("utf-8"))["curves"]["lesson by lessons before"]
    assert f"(`minimac-mlx bench curves`) | {curves['20']['s'] / curves['2']['s']:.2f} times |" in README
    assert bench.table(folder) in (folder.parent / "RESULTS.md").read_text(encoding="utf-8")


def test_figures_of_twenty_lessons_are_those_of_the_file() -> None:
    result = json.loads((ROOT / "benchmarks" / "results" / "lessons.json").read_text("utf-8"))
    ours, theirs = (result[side]["first_lesson"]["loss_above_joint_percent"] for side in ("minimac", "mlx_lm"))
    assert f"joint training on all twenty | {ours:.1f} % |" in README
    assert f"resumed at the best of three rates | {theirs:.1f} % |" in README
    ours, theirs = (result[side]["matrix"]["ppl_forget_percent"] for side in ("minimac", "mlx_lm"))
    assert f"forgotten in the mean; by mlx-lm's | {abs(ours['mean']):.1f} %; {theirs['mean']:.1f} % |" in README
    assert f"One of the twenty lessons lost {ours['worst']:.1f} %." in README


def test_figures_of_invented_facts_are_those_of_the_file() -> None:
    result = json.loads((ROOT / "benchmarks" / "results" / "facts.json").read_text("utf-8"))

    def right(stage: str) -> str:
        return ", ".join(str(result["stages"][stage][kind]["right"]) for kind in ("trained", "unseen", "chat"))

    assert f"questions in a chat, of 50 | {right('facts, after')} |" in README
    assert f"| with chat rows among the text | {right('facts-chat, after')} |" in README
    assert f"in others | {right('facts, after another lesson in it')}; the same answers |" in README
    assert f"as many as fit into its prompt | {right('in the prompt')} |" in README
    assert result["unchanged_by_other_domains"] is True


def test_forgetting_figures_are_those_of_the_files() -> None:
    folder = ROOT / "benchmarks" / "results"
    quick, full = (json.loads((folder / f"forgetting_{n}.json").read_text("utf-8"))["methods"] for n in ("quick", 8192))
    told = " ".join(README.split())

    def worst(methods: dict[str, Any], name: str) -> str:
        return f"{methods[name]['ppl_forget_percent']['worst']['value']:.1f} %"

    def between(figure: dict[str, float]) -> str:
        return f"{figure['value']:.1f} % ({figure['low']:.1f} to {figure['high']:.1f})"

    ours, gained = full["replay+ewc"]["ppl_forget_percent"], full["replay+ewc"]["plasticity_percent"]
    assert f"(replay by predictions, and EWC) | {between(ours['worst'])} |" in README
    assert f"| in the mean | {between(ours['mean'])} |" in README
    assert f"worst, mean | {gained['worst']:.0f} %, {gained['mean']:.0f} % |" in README
    assert f"a tenth of replay | {between(full['replay10+ewc']['ppl_forget_percent']['worst'])} |" in README
    assert f"with full fine-tuning | {worst(full, 'lora')}; {worst(full, 'full')} |" in README
    assert f"with replay but no EWC | {worst(full, 'ewc')}; {worst(full, 'replay')} |" in README
    assert f"one LoRA forgets {worst(quick, 'lora')}, full fine-tuning {worst(quick, 'full')}" in told
    assert f"replay without EWC {worst(quick, 'replay')}, " in told
    assert f"by default {worst(quick, 'replay+ewc')}, by tokens {worst(quick, 'tokens+ewc')}" in told
    assert quick["domains"]["bit_identical"] is full["domains"]["bit_identical"] is True
    routed = full["domains"]["routed"]
    cost = f"{100 * routed['accuracy']:.0f} %; {routed['ppl_rise_percent']:.2f} %"
    assert f"of general text, that go where they belong; what that costs | {cost} |" in README
    long = json.loads((folder / "forgetting_40960.json").read_text("utf-8"))["methods"]
    routed = long["domains"]["routed"]
    cost = f"{100 * routed['accuracy']:.0f} %; {routed['ppl_rise_percent']:.2f} %"
    assert f"that go to their domain; what that costs | {cost} |" in README
    assert long["domains"]["bit_identical"] is True
    ours, gained = long["replay+ewc"]["ppl_forget_percent"], long["replay+ewc"]["plasticity_percent"]
    assert f"by default; in the mean | {between(ours['worst'])}; {between(ours['mean'])} |" in README
    assert f"there, of what it gains alone: worst, mean | {gained['worst']:.0f} %, {gained['mean']:.0f} % |" in README
    assert f"a tenth of replay there | {between(long['replay10+ewc']['ppl_forget_percent']['worst'])} |" in README
    assert f"there: worst | {worst(long, 'full')}; {worst(long, 'ewc')}; {worst(long, 'replay')} |" in README
    naive = long["lora"]["ppl_forget_percent"]
    assert f"LoRA there: worst, mean | {worst(long, 'lora')}, {naive['mean']['value']:.1f} % |" in README
    results = " ".join((ROOT / "benchmarks" / "RESULTS.md").read_text("utf-8").split())
    for method in [*quick.values(), *full.values(), *long.values()]:
        figure = method.get("ppl_forget_percent", {}).get("worst", {})
        if "low" in figure:
            shown = f"{figure['value']:.1f} ({figure['low']:.1f} to {figure['high']:.1f})"
            assert f"| {method['title']} | {shown} |" in results
