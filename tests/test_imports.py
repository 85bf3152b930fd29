"""The arrows of the design: who may import whom, read from the source with `ast`, so that nothing is imported.

A module of mlx_impl imports only those above it in ORDER. Those in PLAIN import neither MLX nor torch and may be used
by torch_ref and convert. Imports inside functions count like any other.
"""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

ORDER = [
    "errors",
    "blas",
    "config",
    "chips",
    "packing",
    "files",
    "hashes",
    "hub",
    "tokenizer_chat",
    "tokenizer_train",
    "tokenizer",
    "readers",
    "holdout",
    "ngrams",
    "turns",
    "data",
    "windows",
    "modeldir",
    "foreigndir",
    "pull",
    "database",
    "reservoirs",
    "versions",
    "store",
    "verify",
    "matrix",
    "statistics",
    "results",
    "console",
    "shell",
    "conversion",
    "plots",
    "arrays",
    "device",
    "cache",
    "kernels",
    "memory",
    "quantised",
    "model",
    "check",
    "base",
    "foreign",
    "exchange",
    "lora",
    "adapters",
    "fusing",
    "loss",
    "ewc",
    "replay",
    "optim",
    "checkpoint",
    "evaluate",
    "decoder",
    "generate",
    "train",
    "recipe",
    "states",
    "router",
    "past",
    "moving",
    "session",
    "lesson",
    "learner",
    "report",
    "answers",
    "chat",
    "terminal",
    "demo",
]
PLAIN = set(ORDER[: ORDER.index("arrays")])

# Names that users of the original call as methods of the model, and that need what is built on it.
ALLOWED_UPWARD = {("model", "generate")}

# The modules of mlx_impl/commands stand above all of mlx_impl. Each imports of the others only what all of them share.
SHARED_BY_COMMANDS = {"options", "inputs"}
THEMES = {"models", "learning", "using", "lessons", "exchange", "machine"}

# The packages besides mlx_impl that a theme's commands call.
COMMANDS_MAY = {"exchange": {"convert", "torch_ref"}, "machine": {"benchmarks"}}

PACKAGES = ["mlx_impl", "torch_ref", "convert", "benchmarks"]

# What convert may know of mlx_impl: formats are checked there, models are not.
CONVERT_MAY = {"errors", "config", "modeldir", "files"}


@cache
def imports(path: Path) -> set[str]:
    """Dotted names of all modules that a file imports; of `from a import b` both a and a.b."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; flat absolute ones are the rule"
            names |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def own(path: Path, package: str) -> set[str]:
    """Modules of `package` that a file imports, without the package's name."""
    found = {name.removeprefix(f"{package}.").split(".")[0] for name in imports(path) if name.startswith(f"{package}.")}
    return found & {p.stem for p in modules(package)}


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package.replace(".", "/")).glob("*.py"))


def test_every_module_has_its_place() -> None:
    assert {path.stem for path in modules("mlx_impl")} == {*ORDER, "__init__"}
    assert {path.stem for path in modules("mlx_impl.commands")} == {*THEMES, *SHARED_BY_COMMANDS, "__init__"}
    assert {path.parent.name for path in (ROOT / "mlx_impl").rglob("*.py")} == {"mlx_impl", "commands"}
    assert not (ROOT / "__init__.py").exists()


@pytest.mark.parametrize("path", modules("mlx_impl"), ids=lambda path: path.stem)
def test_mlx_impl_imports_only_what_stands_above(path: Path) -> None:
    if path.stem == "__init__":
        assert own(path, "mlx_impl") == {"blas"}
        return
    below = {name for name in own(path, "mlx_impl") if ORDER.index(name) >= ORDER.index(path.stem)}
    assert {name for name in below if (path.stem, name) not in ALLOWED_UPWARD} == set()


@pytest.mark.parametrize("path", modules("mlx_impl"), ids=lambda path: path.stem)
def test_the_plain_modules_know_no_framework(path: Path) -> None:
    frameworks = {name.split(".")[0] for name in imports(path)} & {"mlx", "mlx_lm", "torch", "torch_ref"}
    allowed = set() if path.stem in PLAIN or path.stem == "__init__" else {"mlx"}
    assert frameworks <= allowed | ({"mlx_lm"} if path.stem == "foreign" else set())
    if path.stem in PLAIN:
        assert own(path, "mlx_impl") <= PLAIN


@pytest.mark.parametrize("path", modules("mlx_impl.commands"), ids=lambda path: path.stem)
def test_commands_import_downwards(path: Path) -> None:
    assert own(path, "mlx_impl.commands") <= (SHARED_BY_COMMANDS if path.stem in THEMES else set())
    others = {name.split(".")[0] for name in imports(path)} & {"mlx", "mlx_lm", "torch", *PACKAGES, "cli"}
    assert others <= {"mlx_impl"} | COMMANDS_MAY.get(path.stem, set())


def test_only_the_command_line_imports_commands() -> None:
    assert "mlx_impl.commands" in imports(ROOT / "cli.py")
    for path in [path for package in PACKAGES for path in modules(package)]:
        assert not {name for name in imports(path) if name.startswith("mlx_impl.commands")}, path


@pytest.mark.parametrize("path", modules("torch_ref"), ids=lambda path: path.stem)
def test_the_reference_is_independent(path: Path) -> None:
    assert not {name.split(".")[0] for name in imports(path)} & {"mlx", "mlx_lm", "transformers", "peft", "convert"}
    assert own(path, "mlx_impl") <= PLAIN


@pytest.mark.parametrize("path", modules("convert"), ids=lambda path: path.stem)
def test_converters_know_no_model(path: Path) -> None:
    frameworks = {name.split(".")[0] for name in imports(path)} & {"mlx", "mlx_lm", "torch", "torch_ref"}
    assert frameworks <= ({"torch"} if path.stem == "legacy" else set())  # .pt files are PyTorch's
    assert own(path, "mlx_impl") <= CONVERT_MAY


def test_help_needs_nothing_heavy() -> None:
    """`minimac-mlx --help` is quick because of what it does not import, the commands included."""
    code = (
        "import sys, cli\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({n.split('.')[0] for n in sys.modules} & {'mlx','numpy','torch','transformers','rich','yaml'}))\n"
        "print([n for n in sys.modules if n.startswith('mlx_impl.commands.')])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-2:] == ["[]", "[]"]


def test_public_names_resolve() -> None:
    import mlx_impl

    for name in mlx_impl.__all__:
        assert getattr(mlx_impl, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        mlx_impl.Nonsense  # noqa: B018
