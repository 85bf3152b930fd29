"""The arrows of the design: who may import whom, read from the source with `ast`, so that nothing is imported.

A module of mlx_impl imports only those above it in ORDER. Those in PLAIN import neither MLX nor torch and may be used
by torch_ref and convert. Imports inside functions count like any other.
"""

import ast
import subprocess
import sys
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
    "hub",
    "tokenizer_chat",
    "tokenizer_train",
    "tokenizer",
    "readers",
    "holdout",
    "data",
    "windows",
    "modeldir",
    "foreigndir",
    "pull",
    "database",
    "store",
    "verify",
    "matrix",
    "statistics",
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
    "reservoirs",
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

# What convert may know of mlx_impl: formats are checked there, models are not.
CONVERT_MAY = {"errors", "config", "modeldir", "files"}


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
    files = {p.stem for p in (ROOT / package).glob("*.py")}
    found = {name.split(".")[1] for name in imports(path) if name.startswith(f"{package}.")}
    return found & files


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).glob("*.py"))


def test_every_module_has_its_place() -> None:
    assert {path.stem for path in modules("mlx_impl")} == {*ORDER, "__init__"}
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
    """`minimac-mlx --help` is quick because of what it does not import."""
    code = (
        "import sys, cli\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({n.split('.')[0] for n in sys.modules} & {'mlx','numpy','torch','transformers','rich','yaml'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_public_names_resolve() -> None:
    import mlx_impl

    for name in mlx_impl.__all__:
        assert getattr(mlx_impl, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        mlx_impl.Nonsense  # noqa: B018
