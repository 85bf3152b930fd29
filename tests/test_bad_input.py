"""What a person can mistype and a hostile file can hold: one line, the right exit code, and the disk as it was.

Each case runs a whole command and compares every file before and after. What test_mutations once found belongs into the
lists here.
"""

import errno
import json
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from terminal import TEXT, Done, isolate, run, tiny_tokenizer, tree, write_model

from mlx_impl import modeldir

LESSON = ("--text", "The key lies under the pot. " * 8)


@pytest.fixture(autouse=True)
def _workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The current folder of every test: a model `m`, a text `t.txt`, an empty folder and files that are no text."""
    isolate(monkeypatch, tmp_path / "home")
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "m")
    Path("empty").mkdir()
    Path("t.txt").write_text(TEXT)
    Path("empty.txt").touch()
    Path("blank.txt").write_text(" \n\n")
    Path("binary.txt").write_bytes(b"ab\0cd")
    Path("latin1.txt").write_bytes("the café".encode("latin-1"))
    Path("broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    Path("keys.jsonl").write_text('{"words": "a"}\n')
    Path("broken.pdf").write_bytes(b"%PDF-1.4 and then nothing")


def refused(
    arguments: str | tuple[str | Path, ...], code: int, words: str, stdin: bytes = b"", keeping: str = "nothing"
) -> Done:
    """Run what must fail: nothing on stdout, one line of error that has `words`, and no file changed.

    Files whose path starts with `keeping` may be there afterwards: a cache of tokens.
    """
    before = tree(Path.cwd())
    done = run(*(arguments.split() if isinstance(arguments, str) else arguments), stdin=stdin)
    errors = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert (done.code, done.out) == (code, ""), done.err
    assert len(errors) == 1, done.err
    assert words in errors[0]
    assert done.err.splitlines()[-1] == errors[0]
    assert "Traceback" not in done.err
    after = tree(Path.cwd())
    differ = [path for path in before | after if before.get(path) != after.get(path)]
    assert [path for path in differ if not path.startswith(keeping)] == []
    return done


# -- usage -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("nonsense", "No such command 'nonsense'; see `minimac-mlx --help`"),
        ("learn --nonsense", "No such option '--nonsense'"),
        ("generate -m m", "Missing argument 'PROMPT'"),
        ("train t.txt", "Missing option '--out'"),
        ("doctor more", "unexpected extra argument (more)"),
        ("list -m nowhere", "Directory 'nowhere' does not exist"),
        ("list -m t.txt", "Directory 't.txt' is a file"),
        ("list -m m --store t.txt", "Directory 't.txt' is a file"),
        ("list -m empty", "empty: no model directory, config.json and model.safetensors are not there"),
        ("generate -m empty x", "empty: no model directory"),
        ("learn -m m", "no text: name files or folders, or - for stdin"),
        ("learn -m m t.txt --text x", "--text and t.txt: give a text or files, not both"),
        ("learn -m m - t.txt", "- is stdin and comes alone"),
        ("learn -m m t.txt --steps 0", "--steps 0 must be a positive number"),
        ("learn -m m t.txt --seconds 0", "--seconds 0.0 must be a positive number"),
        ("learn -m m t.txt --seconds -1", "--seconds -1.0 must be a positive number"),
        ("learn -m m t.txt --seconds nan", "--seconds nan must be a positive number"),
        ("learn -m m t.txt --seconds inf", "--seconds inf must be a positive number"),
        ("learn -m m t.txt --seconds soon", "'soon' is not a valid float"),
        ("learn -m m t.txt --epochs inf", "--epochs inf must be a positive number"),
        ("learn -m m t.txt --rank 0", "Invalid value for '--rank': 0"),
        ("learn -m m t.txt --rank 33", "rank = 33 is more than any layer can use: at most 32 (--rank)"),
        ("learn -m m t.txt --lr nan", "--lr nan must be a positive number"),
        ("learn -m m t.txt --batch-size 0", "--batch-size 0 must be a whole number of at least 1"),
        ("learn -m m t.txt --no-replay --replay-ratio 0.1", "--no-replay and --replay-ratio: give one of the two"),
        ("learn -m m t.txt --no-ewc --ewc-lambda 1", "--no-ewc and --ewc-lambda: give one of the two"),
        ("bench", "Choose from: tokens, train,"),
        ("pull nosuch.gguf", "nosuch.gguf: no such file"),
        ("learn -m m t.txt --answer-share 0.5", "--answer-share: the model has no chat template"),
        ("learn -m m t.txt --answer-share 2", "--answer-share 2.0 must lie in [0, 1]"),
        ("learn -m m t.txt --holdout 1", "--holdout 1.0 must be at least 0 and below 1"),
        ("learn -m m t.txt --seed -1", "--seed -1 must be a whole number, at least 0"),
        ("learn -m m t.txt --seed 9223372036854775808", "below 2**63"),
        ("learn -m m t.txt --loss-on some", "'some' is not one of 'all', 'completion', 'assistant'"),
        ("learn -m m t.txt --domain ../../x", "'../../x' cannot name a domain"),
        ("learn -m m t.txt --domain Law", "'Law' cannot name a domain"),
        ("learn -m m t.txt --domain none", "'none'"),
        ("learn -m m t.txt --domain auto", "'auto'"),
        ("generate -m m x --max-tokens 0", "0 is not in the range x>=1"),
        ("generate -m m x --temperature -1", "--temperature -1.0 must lie in [0, 100]"),
        ("generate -m m x --temperature nan", "--temperature nan must lie in [0, 100]"),
        ("generate -m m x --top-p 0", "--top-p 0.0 must lie in (0, 1]"),
        ("generate -m m x --top-k -1", "--top-k -1"),
        ("generate -m m x --min-p 1.5", "--min-p 1.5 must lie in [0, 1]"),
        ("generate -m m x --repetition-penalty 0", "--repetition-penalty 0.0"),
        ("generate -m m x --seed -1", "--seed -1 must lie in [0, 2**32)"),
        ("generate -m m x --window 4", "--window 5 is the least"),
        ("generate -m m x --domain nope", "no domain called 'nope'; there are: none yet"),
        ("generate -m m x --chat", "no chat template"),
        ("undo -m m", "nothing learned yet"),
        ("undo main -m m", "no domain called 'main'"),
        ("undo -m m --to latest", "'latest' is no version"),
        ("eval -m m", "no text: name files"),
        ("eval -m m t.txt --context 1", "1 is not in the range x>=2"),
        ("pull nowhere", "nowhere: neither a .gguf or .whl file, a model folder nor a hub id"),
        ("pull empty", "empty: no config.json"),
        ("tokenizer t.txt --out m", "m exists already"),
        ("tokenizer t.txt --out t.txt", "Directory 't.txt' is a file"),
        ("tokenizer t.txt --out t.txt/x", "a folder is needed here and a file is in its place"),
        ("tokenizer t.txt --out tok --vocab-size 299", "299 is not in the range 300<=x<=1000000"),
        ("tokenizer t.txt --out tok --special-token <s>", "special token '<s>'"),
        ("demo --seconds nan", "--seconds nan must be a positive number"),
    ],
)
def test_usage(arguments: str, words: str) -> None:
    refused(arguments, 2, words)


def test_an_empty_stop_string_and_an_empty_text() -> None:
    refused(("generate", "-m", "m", "x", "--stop", ""), 2, "a stop string must not be empty")
    refused(("learn", "-m", "m", "--text", ""), 2, "text: empty")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--out out", "nothing to train on"),
        ("t.txt --out t.txt", "Directory 't.txt' is a file"),
        ("t.txt --out m", "m exists already"),
        ("t.txt --out out --config huge", "--config huge: no preset (tiny, small, medium, large) and no file"),
        ("t.txt --out out --config tiny --init m", "--config and --init exclude each other"),
        ("t.txt --out out --config tiny --tokenizer empty", "empty: no tokenizer.json there"),
        ("t.txt --out out --config tiny --steps 0", "steps = 0"),
        ("t.txt --out out --config tiny --steps 1 --minutes 1", "steps and minutes exclude each other"),
        ("t.txt --out out --config tiny --seq-len 257", "--seq-len 257 is longer than the model's context of 256"),
        ("t.txt --out out --config tiny --warmup nan", "warmup = nan must lie in [0, 1]"),
        ("t.txt --out out --config tiny --seed -1", "seed = -1"),
        ("t.txt --out out --init empty", "empty: no tokenizer.json there"),
        ("t.txt --out out --config tiny --eval-data nowhere.txt", "nowhere.txt: no such file"),
        ("empty.txt --out out --config tiny", "empty.txt: empty"),
        ("--out nowhere --resume", "nowhere: no training to resume there"),
        ("--out m --resume", "m: no training to resume there"),
        ("t.txt --out m --resume", "--resume goes on with the same data and model; leave out PATH"),
    ],
)
def test_train_usage(arguments: str, words: str) -> None:
    more = " --vocab-size 400" if "--config tiny" in arguments else ""
    refused(f"train {arguments}{more}", 2, words, keeping="home/cache/")
    assert not Path("out").exists()


def test_a_directory_that_holds_lessons_is_not_trained_into() -> None:
    assert run("learn", "-m", "m", *LESSON, "--steps", "1", "--store", "out/learner").code == 0
    refused("train t.txt --out out --config tiny", 2, "out holds lessons, which belong to its weights")


# -- texts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["learn -m m --steps 1", "eval -m m", "tokenizer --out tok"])
@pytest.mark.parametrize(
    ("file", "code", "words"),
    [
        ("nowhere.txt", 2, "nowhere.txt: no such file or folder"),
        ("empty.txt", 2, "empty.txt: empty"),
        ("blank.txt", 2, "blank.txt: empty"),
        ("binary.txt", 2, "binary.txt: binary, not text (a NUL at byte 2)"),
        ("latin1.txt", 2, "latin1.txt: not UTF-8 at byte 7"),
        ("broken.jsonl", 3, "broken.jsonl line 2: not JSON"),
        ("keys.jsonl", 2, "keys.jsonl line 1: `text`, `prompt` and `completion`, or `messages` are expected"),
        ("broken.pdf", 3, "broken.pdf: not a readable PDF"),
        ("empty", 2, "empty: no file in this folder is of a kind that is read"),
        (os.devnull, 2, f"{os.devnull}: not a regular file"),
        ("x" * 300, 2, "no such file or folder"),
    ],
)
def test_texts_that_cannot_be_read(command: str, file: str, code: int, words: str) -> None:
    refused((*command.split(), file), code, words)


@pytest.mark.parametrize("command", ["learn -m m --steps 1 -", "eval -m m -"])
def test_stdin_that_cannot_be_read(command: str) -> None:
    refused(command, 2, "stdin: empty", b"")
    refused(command, 2, "stdin: not UTF-8 at byte 4", b"caf \xe9")
    refused(command, 2, "stdin: binary, not text (a NUL at character 1)", b"a\0b")


def test_an_argument_that_is_not_utf8() -> None:
    odd = os.fsdecode(b"caf\xe9")
    refused(("generate", "-m", "m", odd), 2, "lone surrogate (U+DCE9) at character 3")
    refused(("learn", "-m", "m", "--text", odd), 2, "half a surrogate pair at character 3")
    refused(("learn", "-m", "m", odd), 2, "caf\ufffd: no such file or folder")
    refused(("list", "-m", odd), 2, "does not exist")


def test_a_huge_line_is_learned_like_any_other() -> None:
    Path("line.txt").write_text("the key " * 4000)
    done = run("learn", "-m", "m", "line.txt", "--steps", "1", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["tokens"] > 4000


def test_a_loss_that_explodes_keeps_nothing() -> None:
    assert run("learn", "-m", "m", *LESSON, "--steps", "1").code == 0
    refused(("learn", "-m", "m", *LESSON, "--steps", "5", "--lr", "1e9"), 1, "try a lower --lr")


# -- model directories -------------------------------------------------------------------------------------------


def changed_config(**changes: Any) -> Callable[[Path], None]:
    """A change of keys in config.json."""

    def change(model: Path) -> None:
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | changes))

    return change


def written(name: str, content: str | bytes) -> Callable[[Path], None]:
    """A file with another content."""

    def write(model: Path) -> None:
        (model / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return write


def cut(name: str, length: int) -> Callable[[Path], None]:
    """A file's beginning (or with a negative length, all but its end)."""
    return lambda model: written(name, (model / name).read_bytes()[:length])(model)


def removed(*names: str) -> Callable[[Path], None]:
    """Files that are not there."""

    def remove(model: Path) -> None:
        for name in names:
            (model / name).unlink()

    return remove


def not_finite(model: Path) -> None:
    """NaN as the last weight, the header as before."""
    content = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(content[:-4] + b"\0\0\xc0\x7f")


@pytest.mark.parametrize(
    ("damage", "code", "words"),
    [
        (removed("config.json"), 2, "m/config.json: no such file"),
        (removed("tokenizer.json", "tokenizer.model"), 2, "m: no tokenizer.json"),
        (removed("model.safetensors"), 2, "m: no model.safetensors"),
        (cut("model.safetensors", 0), 3, "header of 0 bytes"),
        (cut("model.safetensors", 7), 3, "m/model.safetensors: header"),
        (cut("model.safetensors", -10), 3, "model.norm.weight ends at byte"),
        (written("model.safetensors", b"\xff" * 100), 3, "m/model.safetensors: header of"),
        (not_finite, 3, "model.norm.weight"),
        (changed_config(auto_map={"AutoModel": "x.py"}), 2, "auto_map names code to be run"),
        (changed_config(model_type="nonsense"), 2, "model_type is 'nonsense'"),
        (changed_config(num_hidden_layers=10**9), 3, "m/config.json: model configuration: num_layers = 1,000,000,000"),
        (changed_config(num_hidden_layers=900), 3, "and 8,072 more"),
        (changed_config(num_hidden_layers=-1), 3, "num_layers = -1 must be a whole number of at least 1"),
        (changed_config(hidden_size="32"), 3, "d_model = '32' must be a whole number"),
        (changed_config(hidden_size=2**30, head_dim=None), 3, "wrong shape: model.embed_tokens.weight is [400, 32]"),
        (changed_config(rms_norm_eps=float("nan")), 3, "norm_eps = nan must be a positive number"),
        (changed_config(rope_theta=float("inf")), 3, "rope_base = inf must be a positive number"),
        (changed_config(rope_theta=10**400), 3, "rope_base = 1000"),
        (changed_config(rope_theta="9" * 2000), 3, "rope_base = '9999"),
        (changed_config(rms_norm_eps=10**400), 3, "norm_eps = 1000"),
        (changed_config(hidden_act=["x" * 2000] * 9), 2, "hidden_act is ['xxxx"),
        (changed_config(rope_scaling={"rope_type": ["yarn"]}), 3, "rope_type ['yarn'] is not supported"),
        (changed_config(eos_token_id="</s>"), 3, "eos_token_id = '</s>' must be a token id"),
        (changed_config(vocab_size=2**31 - 1), 3, "the configuration says [2147483647, 32]"),
        (changed_config(quantization={"bits": 4}), 3, "4 bits in groups of None; there are 2, 3"),
        (changed_config(quantization={"mode": "mxfp4"}), 2, "quantization mode 'mxfp4'; only affine is read"),
        (changed_config(quantization_config={"quant_method": "awq"}), 2, "the weights are quantised by 'awq'"),
        (written("config.json", "{"), 3, "m/config.json: not valid JSON"),
        (written("config.json", b"\xff\xfe{}"), 3, "m/config.json: not valid JSON"),
        (written("config.json", "[" * 100_000), 3, "m/config.json: not valid JSON"),
        (written("config.json", f'{{"hidden_size": {"9" * 5000}}}'), 3, "m/config.json: not valid JSON"),
        (written("config.json", "[]"), 3, "a JSON object was expected, this is a list"),
        (written("tokenizer.json", "{}"), 3, "m/tokenizer.json: not a tokenizer.json"),
        (cut("tokenizer.json", 500), 3, "m/tokenizer.json: not"),
        (written("tokenizer_config.json", '{"auto_map": {"a": "b"}}'), 2, "auto_map names code to be run"),
        (written("tokenizer_config.json", '{"chat_template": 5}'), 3, "chat_template is no text"),
        (written("generation_config.json", "{"), 3, "m/generation_config.json: not valid JSON"),
    ],
)
def test_models_that_are_damaged_or_not_what_they_claim(
    damage: Callable[[Path], None], code: int, words: str, tmp_path: Path
) -> None:
    """Without a manifest, so that it is not the hashes that notice; and with `pull`, which must not copy it."""
    (tmp_path / "m" / modeldir.MANIFEST).unlink()
    damage(tmp_path / "m")
    refused("generate -m m hello --max-tokens 2", code, words)
    pulled = run("pull", "m")
    assert (pulled.code, pulled.out) == (code, "")
    assert tree(tmp_path / "home") == {}


def test_a_flipped_bit_in_the_weights_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "m" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    for command in ("generate -m m x", "eval -m m t.txt", "learn -m m t.txt", "pull m"):
        refused(command, 3, "m: model.safetensors has sha256")


def test_a_tokenizer_that_does_not_fit_the_model(tmp_path: Path) -> None:
    write_model(tmp_path / "small", vocab_size=tiny_tokenizer().vocab_size - 1)
    words = "the tokenizer has 400 ids and the model only 399 rows"
    for command in ("generate -m small x", "learn -m small t.txt", "pull small"):
        refused(command, 2, words)
    refused("train t.txt --out out --init small --tokenizer m", 2, words, keeping="home/cache/")


def test_lessons_of_another_base_and_a_damaged_store(tmp_path: Path) -> None:
    assert run("learn", "-m", "m", *LESSON, "--steps", "1").code == 0
    write_model(tmp_path / "other", d_model=48)
    refused("generate -m other x --store m/learner", 2, "belong to another base model")
    (adapter,) = (tmp_path / "m" / "learner").rglob("adapters.safetensors")
    adapter.write_bytes(adapter.read_bytes()[:-1] + b"\1")
    refused("generate -m m x --domain main", 3, "changed since it was learned")
    (tmp_path / "m" / "learner" / "learner.sqlite").write_bytes(b"no database" * 100)
    refused("list -m m", 3, "learner.sqlite")


def test_a_base_that_cannot_be_written_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests may run as root, whom no permission stops: the refusal is injected where the lock is taken."""

    def denied(path: str | Path, *rest: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr("mlx_impl.files.fcntl.flock", denied)
        words = "m/learner cannot be written to; keep lessons elsewhere with --store DIR"
        refused(("learn", "-m", "m", *LESSON, "--steps", "1"), 2, words)


# -- training configurations -------------------------------------------------------------------------------------

ALIASES = "\n".join(f"  x{n}: &x{n} [{', '.join([f'*x{n - 1}' if n else 'x'] * 9)}]" for n in range(7))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "the mappings `model:` and `train:` were expected"),
        ("- 1\n- 2", "the mappings `model:` and `train:` were expected"),
        ("modle: {}", "modle (unknown); known keys are model, train"),
        ("1: {}", "1 (unknown)"),
        ("model:\n\td_model: 32", "no valid YAML: while scanning"),
        ("model: {width: 32}", "model: width (unknown); known keys are vocab_size, "),
        ("model: {preset: huge}", "preset 'huge' is unknown; there are tiny, small, medium, large"),
        ("model: {preset: [tiny]}", "preset ['tiny'] is unknown"),
        ("model: {d_model: '32'}", "d_model ('32' is not a int)"),
        ("model: {preset: tiny, num_layers: 1000000000}", "num_layers = 1,000,000,000, at most 1,024"),
        ("model: {preset: tiny, num_layers: -1}", "num_layers = -1"),
        ("model: {preset: tiny, rope_scaling: 7}", "rope_scaling = 7 must be a mapping"),
        ("model: {preset: tiny, rope_scaling: {rope_type: [1]}}", "rope_type [1] is not supported"),
        ("model: {preset: tiny, eos_token_id: end}", "eos_token_id come from the tokenizer"),
        ("train: {lr: fast}", "lr ('fast' is not a float)"),
        ("train: {lr: .nan}", "lr = nan must be a positive number"),
        ("train: {steps: true}", "steps = True must be a whole number"),
        ("train: {eval_tokens: 0}", "eval_tokens = 0 must be a whole number of at least 1"),
        ("train: {seed: -5}", "seed = -5"),
        ("!!python/object/apply:os.system ['true']", "no valid YAML: could not determine a constructor"),
        ("[" * 3000, "no valid YAML"),
        (f"model:\n{ALIASES}\n  d_model: *x6", "d_model ([[[[[[[...], [...], ["),
        (b"\xff\0\1", "no valid YAML"),
    ],
)
def test_training_configurations(content: str | bytes, words: str) -> None:
    Path("c.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    done = refused("train t.txt --out out --config c.yaml --steps 1", 2, words)
    assert len(done.err) < 1000


# -- disks -------------------------------------------------------------------------------------------------------

# What is written, and by which command.
WRITERS = {
    "m/learner/": ("learn", "-m", "m", *LESSON, "--steps", "1", "--quiet"),
    "tok": ("tokenizer", "t.txt", "--out", "tok", "--vocab-size", "700"),
    "home/models/m": ("pull", "m"),
}


@pytest.mark.parametrize("where", WRITERS)
def test_a_full_disk_at_the_last_moment(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """fsync is where a file system that allocates late says that there was no room after all."""

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        done = refused(WRITERS[where], 1, "No space left on device; nothing was half-written, make room and try again")
    assert where in done.err
    assert run(*WRITERS[where]).code == 0


@pytest.mark.parametrize("where", WRITERS)
def test_a_file_that_may_not_grow(where: str) -> None:
    """A real refusal of the system in the middle of a write: no file may grow beyond 8 kB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    try:
        done = refused(WRITERS[where], 1, where)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "internal error" not in done.err
    assert run(*WRITERS[where]).code == 0


def full_when_saving(path: str, arrays: object) -> None:
    """MLX's writer does not say why it failed."""
    raise RuntimeError(f"[write] Unable to write 8192 bytes to {path}.")


@pytest.mark.parametrize("late", [False, True])
def test_a_run_that_cannot_begin_leaves_nothing_in_the_way(late: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk at the tokenizer, and at the first saved state. The cache of tokens is whole and may stay."""
    training = ("train", "t.txt", "--config", "tiny", "--vocab-size", "700", "--steps", "1", "--quiet", "--out", "run")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with monkeypatch.context() as patch:
        if late:
            patch.setattr(mx, "save_safetensors", full_when_saving)
        else:
            resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
        try:
            done = run(*training)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert done.code == 1
    assert done.err.startswith("error: run/")
    assert done.err.endswith("nothing was half-written, make room and try again\n")
    assert not Path("run").exists()
    assert run(*training).code == 0
