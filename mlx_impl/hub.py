"""The folder of pulled models: which one is the default, and who may write there. No MLX, quick to import.

`HOME/models/NAME` holds one model directory each, `HOME/default` the path of the last one pulled. Pulls
exclude each other, so that one may sweep away what a killed one left.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from mlx_impl import files
from mlx_impl.errors import InputError


def default_model(home: Path | None = None) -> Path:
    """The model that commands use without `--model`: `MINIMAC_MODEL`, else the last one pulled.

    Raises InputError where there is none, or where the recorded one is gone.
    """
    named = os.environ.get("MINIMAC_MODEL")
    record = (home or files.home_path()) / "default"
    if not named and not record.is_file():
        raise InputError("no model yet: run `minimac-mlx pull`, or name one with --model")
    model = Path(named or record.read_text(encoding="utf-8", errors="replace").strip()).expanduser()
    if not model.is_dir():
        where = "MINIMAC_MODEL" if named else str(record)
        raise InputError(f"{model}: no such folder ({where} names it); run `minimac-mlx pull`, or use --model")
    return model


def pulled(name: str) -> Path | None:
    """The directory of the model that was pulled under this name, None where there is none."""
    folder = files.home_path() / "models" / name
    return folder if Path(name).name == name and folder.is_dir() else None


def set_default(model: Path, home: Path | None = None) -> None:
    """Make `model` what commands use from now on."""
    files.write_text((home or files.home()) / "default", f"{model.resolve()}\n")


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Hold `folder/.lock`, sweep what a crashed writer left. LockedError names the pid that holds it."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with files.locked(folder / ".lock", str(folder)):
        files.sweep(folder)
        yield
