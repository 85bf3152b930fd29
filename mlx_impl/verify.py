"""What `verify` looks at: the base's hashes, the database, every version's files, and what lies about beside them.

Needs no lock, and a writer at work does not mislead it: rows and folders are looked at while writers are kept out for a
moment, or, where one is writing, what no row knows yet is taken for its work. A file that differs counts only if its
version is still there when it has been found.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from mlx_impl import files, modeldir
from mlx_impl.errors import DamagedFileError, InputError
from mlx_impl.store import Store, open_store
from mlx_impl.versions import Version


@dataclass
class Verification:
    """`problems`, one line each, and counts of what was looked at; `writer` is the pid of one at work."""

    problems: list[str] = field(default_factory=list)
    base_files: int = 0
    domains: int = 0
    versions: int = 0
    files: int = 0
    writer: str | None = None


def verify(model: Path, folder: Path | None = None) -> Verification:
    """Check a model directory and its lessons, kept in `folder` or in the directory's `learner`; changes nothing.

    Raises InputError where there is no model, or where the lessons are those of another one.
    """
    found = Verification()
    if (model / modeldir.MANIFEST).is_file():
        try:
            found.base_files = len(modeldir.verify_manifest(model)["files"])
        except DamagedFileError as error:
            found.problems.append(str(error))
    try:
        verify_lessons(open_store(model, folder), found)
    except DamagedFileError as error:
        found.problems.append(str(error))
    except InputError:
        if not found.problems:  # else it is what became of the damage above
            raise
    return found


def verify_lessons(store: Store, found: Verification) -> None:
    """Check what has been learned, adding to what was `found`. DamagedFileError: the rows cannot be read at all."""
    if store.database.exists():
        found.problems += store.database.problems()
    with store.looking() as found.writer:
        versions = store.versions()
        strays = list(_strays(store, versions)) if found.writer is None else []
    remedy = "if a crash left it, the next lesson removes it; else move it away"
    found.problems += [f"{path}: belongs to no lesson; {remedy}" for path in strays]
    for version in versions:
        found.problems += _damage(store, version)
    found.domains = len({version.domain for version in versions})
    found.versions = len(versions)
    found.files = sum(len(version.files) for version in versions)


def _damage(store: Store, version: Version) -> list[str]:
    """What is wrong with a version, nothing if it has been removed meanwhile."""
    try:
        store.heldout(version)
        store.replay(version)
        problems = list(store.damage(version))
    except DamagedFileError as error:
        problems = [str(error)]
    except FileNotFoundError:  # it goes while we look
        problems = []
    return problems if problems and version in store.versions(version.domain) else []


def _strays(store: Store, versions: list[Version]) -> Iterator[Path]:
    """What lies in the store and belongs to no version; hidden files of others are not ours to judge."""
    ours = {store.database.path} | {store.folder / version.domain for version in versions}
    ours |= {path for version in versions for path in store.paths(version)}

    def below(folder: Path) -> Iterator[Path]:
        for path in sorted(folder.iterdir()):
            if path not in ours:
                if not path.name.startswith(".") or path.name.startswith((files.TEMPORARY, files.REPLACED)):
                    yield path
            elif path.is_dir():
                yield from below(path)

    if store.folder.is_dir():
        yield from below(store.folder)
