"""What a model has learned, on disk: a SQLite commit log beside ordinary mlx-lm adapter folders.

A lesson is written to a temporary folder, fsynced and renamed; then ONE transaction moves the domain's head. A crash
leaves the old head or the new one, never a mixture. What a crashed or failed writer leaves lying about is swept.
Versions are immutable and their files' hashes are checked when they are read. Imports no MLX: arrays are files here.
"""

import contextlib
import errno
import json
import re
import shutil
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlx_impl import files, modeldir
from mlx_impl.errors import DamagedFileError, InputError, MiniMacError
from mlx_impl.tokenizer import Tokenizer

SCHEMA = 1
_TABLES = """
CREATE TABLE base (sha256 TEXT NOT NULL, tokenizer TEXT NOT NULL);
CREATE TABLE versions (
    id INTEGER PRIMARY KEY,
    domain TEXT NOT NULL,
    number INTEGER NOT NULL,
    parent INTEGER REFERENCES versions (id),
    depth INTEGER NOT NULL,
    source TEXT NOT NULL,
    created TEXT NOT NULL,
    config TEXT NOT NULL,
    figures TEXT NOT NULL,
    files TEXT NOT NULL,
    UNIQUE (domain, number)
);
CREATE TABLE heads (domain TEXT PRIMARY KEY, version INTEGER NOT NULL REFERENCES versions (id));
CREATE TABLE heldout (
    version INTEGER PRIMARY KEY REFERENCES versions (id) ON DELETE CASCADE,
    ids BLOB NOT NULL,
    trained BLOB,
    documents INTEGER NOT NULL,
    bytes INTEGER NOT NULL
);
"""
_COLUMNS = "id, domain, number, parent, depth, source, created, config, figures, files"
_DATABASE = "learner.sqlite"
_OTHER_CAUSES = {
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_PERM,
    sqlite3.SQLITE_READONLY,
}
"""Reasons for which a database that is not damaged cannot be read or written now."""


def check_domain(name: str) -> str:
    """The name itself, if it can be a folder everywhere; InputError says what is allowed."""
    if not _is_domain(name):
        raise InputError(
            f"{name!r} cannot name a domain: up to 64 of a-z, 0-9, dot, dash and underscore, first a letter or digit"
        )
    if name in ("auto", "none") or name.startswith(_DATABASE):
        raise InputError(f"{name!r} cannot name a domain: the word has another meaning here; choose another")
    return name


def _is_domain(name: str) -> bool:
    return re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,63}", name) is not None


@dataclass(frozen=True)
class HeldOut:
    """Tokens kept from a lesson's text for measuring: ids (N,) int32, trained (N,) bool or None for all."""

    ids: np.ndarray
    trained: np.ndarray | None
    documents: int
    bytes: int


@dataclass(frozen=True)
class Version:
    """One committed lesson. `depth` counts the lessons on the way to it; `number` names its folder for good."""

    id: int
    domain: str
    number: int
    parent: int | None
    depth: int
    source: str
    created: str
    config: dict[str, Any]
    figures: dict[str, Any]
    files: dict[str, str]

    @property
    def name(self) -> str:
        """Folder name, v0001 and so on."""
        return f"v{self.number:04d}"


class Store:
    """The `learner` folder of a model. Reading needs no lock; writing happens inside `writing()`.

    `base` and `tokenizer` are digests; a store that belongs to others is refused, because an adapter means nothing on
    another base. A store that has no lesson yet leaves nothing on the disk.
    """

    def __init__(self, folder: Path, base: str, tokenizer: str) -> None:
        self.folder = folder
        self._base = (base, tokenizer)
        if self._database.is_file():
            with self._connected() as db:
                self._check(db)

    @property
    def _database(self) -> Path:
        return self.folder / _DATABASE

    # -- reading ---------------------------------------------------------------------------------------------

    def domains(self) -> list[str]:
        """Names of the domains that have a lesson, sorted."""
        if not self._database.is_file():
            return []
        with self._connected() as db:
            return [row[0] for row in db.execute("SELECT domain FROM heads ORDER BY domain")]

    def head(self, domain: str) -> Version | None:
        """The current version of a domain, None if it has none."""
        check_domain(domain)
        found = self._select("id = (SELECT version FROM heads WHERE domain = ?)", domain)
        return found[0] if found else None

    def require(self, domain: str) -> Version:
        """The current version of a domain; InputError naming the domains there are if it has none."""
        head = self.head(domain)
        if head is None:
            known = ", ".join(self.domains()) or "none yet; teach one with `minimac-mlx learn`"
            raise InputError(f"no domain called {domain!r}; there are: {known}")
        return head

    def overview(self) -> list[dict[str, Any]]:
        """What `list --json` prints: each domain with its current lesson."""
        heads = self._select("id IN (SELECT version FROM heads)")
        return [
            {
                "domain": v.domain,
                "version": v.name,
                "lessons": v.depth,
                "source": v.source,
                "created": v.created,
                **v.figures,
            }
            for v in sorted(heads, key=lambda v: v.domain)
        ]

    def history(self, domain: str) -> list[Version]:
        """The lessons that the domain's head stands on, first to last."""
        head = self.head(domain)
        if head is None:
            return []
        chain = [head]
        for version in reversed(self._select("domain = ?", domain)):  # a parent is older than its children
            if version.id == chain[-1].parent:
                chain.append(version)
        return chain[::-1]

    def heldout(self, version: Version) -> HeldOut | None:
        """What was held out of the lesson's text, None if nothing was."""
        with self._connected() as db:
            row = db.execute(
                "SELECT ids, trained, documents, bytes FROM heldout WHERE version = ?", (version.id,)
            ).fetchone()
        if row is None:
            return None
        try:
            ids = np.frombuffer(row[0], "<i4").astype(np.int32)
            trained = None if row[1] is None else np.frombuffer(row[1], np.uint8).astype(bool)
        except (ValueError, TypeError) as error:
            raise self._damaged(error) from None
        return HeldOut(ids, trained, row[2], row[3])

    def files_of(self, version: Version) -> Path:
        """The version's folder, after comparing its files' hashes; DamagedFileError names the one that differs."""
        folder = self.folder / version.domain / version.name
        for name, digest in version.files.items():
            path = folder / name
            if not path.is_file():
                raise DamagedFileError(f"{path}: missing; `minimac-mlx undo {version.domain}` goes back a version")
            if files.sha256(path) != digest:
                raise DamagedFileError(
                    f"{path}: changed since it was learned; `minimac-mlx undo {version.domain}` goes back a version"
                )
        return folder

    # -- writing ---------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the store's lock; sweeps what crashed writers left. LockedError names the pid that holds it.

        Where the block fails, nothing of what it wrote is left but what it committed. A store that ends up without a
        lesson is removed. Raises InputError where the folder cannot be written to or holds something else.
        """
        empty = self._refuse_others()
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(files.locked(self.folder / ".lock", str(self.folder)))
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                    raise
                raise InputError(
                    f"{self.folder} cannot be written to; keep lessons elsewhere with --store DIR"
                ) from None
            try:
                if self._database.is_file():
                    with self._connected() as db:
                        self._check(db)  # another process may have begun it
                self._sweep()
                yield
            except BaseException:
                with contextlib.suppress(MiniMacError, OSError):  # the first error is the one to tell
                    self._sweep()
                raise
            finally:
                with contextlib.suppress(MiniMacError, OSError):
                    self._remove_unused(keep_folder=empty)

    def _refuse_others(self) -> bool:
        """Whether the folder is there and empty; InputError where what is in it is not ours, and might be swept."""
        if self._database.is_file() or not self.folder.exists():
            return False
        if not self.folder.is_dir():
            raise InputError(f"{self.folder} is no folder; lessons need one of their own, see --store")
        others = sorted(path.name for path in self.folder.iterdir() if not path.name.startswith("."))
        if others:
            raise InputError(
                f"{self.folder} holds {others[0]} but no {_DATABASE}; lessons need a folder of their own, see --store"
            )
        return True

    def commit(
        self,
        domain: str,
        parent: Version | None,
        write: Callable[[Path], None],
        *,
        source: str,
        config: dict[str, Any],
        figures: dict[str, Any],
        heldout: HeldOut | None,
    ) -> Version:
        """Make a version of the files that `write` puts into a folder, and the domain's head; call inside `writing`."""
        check_domain(domain)
        if not self._database.is_file():
            self._create()
        with self._connected() as db:
            highest = db.execute("SELECT max(number) FROM versions WHERE domain = ?", (domain,)).fetchone()[0]
        number = (highest or 0) + 1
        folder = self.folder / domain / f"v{number:04d}"
        with files.atomic_folder(folder) as temporary:
            write(temporary)
            digests = {path.name: files.sha256(path) for path in sorted(temporary.iterdir())}
        files.fsync(self.folder)  # the domain's folder may be new
        created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        row = (
            domain,
            number,
            parent.id if parent else None,
            parent.depth + 1 if parent else 1,
            source,
            created,
        )
        documents = tuple(
            json.dumps(value, ensure_ascii=False, allow_nan=False) for value in (config, figures, digests)
        )
        with self._connected() as db, db:  # the second: one transaction
            key = db.execute(
                f"INSERT INTO versions ({_COLUMNS.removeprefix('id, ')}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                row + documents,
            ).lastrowid
            if heldout is not None:
                trained = None if heldout.trained is None else heldout.trained.astype(np.uint8).tobytes()
                kept = (key, heldout.ids.astype("<i4").tobytes(), trained, heldout.documents, heldout.bytes)
                db.execute("INSERT INTO heldout VALUES (?, ?, ?, ?, ?)", kept)
            db.execute("INSERT OR REPLACE INTO heads VALUES (?, ?)", (domain, key))
        return self._select("id = ?", key)[0]

    def undo(self, domain: str, to: int | None = None) -> Version | None:
        """Move a domain's head back one lesson, or to version number `to`; returns the new head.

        Undoing the first lesson removes the domain and its files and returns None. Call inside `writing`.
        """
        head = self.require(domain)
        if to is None and head.parent is None:
            self._erase(domain)
            return None
        if to is None:
            target = self._select("id = ?", head.parent)
        else:
            target = self._select("domain = ? AND number = ?", domain, to)
        if not target:
            known = ", ".join(version.name for version in self._select("domain = ?", domain))
            raise InputError(f"domain {domain} has no version {to}; there are: {known}")
        with self._connected() as db, db:
            db.execute("UPDATE heads SET version = ? WHERE domain = ?", (target[0].id, domain))
        return target[0]

    def _erase(self, domain: str) -> None:
        """Remove a domain's rows, then its folder. SQLite overwrites the rows' space (secure_delete)."""
        with self._connected() as db, db:
            db.execute("DELETE FROM heads WHERE domain = ?", (domain,))
            db.execute("DELETE FROM versions WHERE domain = ?", (domain,))
        self._sweep()
        files.fsync(self.folder)

    def _sweep(self) -> None:
        """Remove temporary files and version folders that no row knows: what crashed and failed writers left."""
        if not self.folder.is_dir():
            return
        files.sweep(self.folder)
        known = {(v.domain, v.name) for v in self._select("1")}
        for domain in [path for path in self.folder.iterdir() if _is_domain(path.name)]:
            if domain.is_symlink() or not domain.is_dir():
                continue
            files.sweep(domain)
            for folder in domain.iterdir():
                if re.fullmatch(r"v\d{4,}", folder.name) and (domain.name, folder.name) not in known:
                    shutil.rmtree(folder)
            with contextlib.suppress(OSError):
                domain.rmdir()  # only if nothing is left in it

    def _remove_unused(self, keep_folder: bool) -> None:
        """Remove database and lock, which is held, if there is no lesson; the folder too if nothing is left in it."""
        ours = [*sorted(self.folder.glob(f"{_DATABASE}*"), reverse=True), self.folder / ".lock"]  # the journal first
        others = [path for path in self.folder.iterdir() if path not in ours]
        if self._select("1") or any(_is_domain(path.name) for path in others):
            return
        for path in ours:
            path.unlink(missing_ok=True)
        if not keep_folder and not others:
            self.folder.rmdir()

    # -- database --------------------------------------------------------------------------------------------

    def _create(self) -> None:
        """Make an empty database of this base and tokenizer; it has its name only when it is whole."""
        with files.atomic_file(self._database) as temporary, self._connected(temporary) as db:
            db.executescript(_TABLES)
            db.execute("INSERT INTO base VALUES (?, ?)", self._base)
            db.execute(f"PRAGMA user_version = {SCHEMA}")
            db.commit()

    @contextlib.contextmanager
    def _connected(self, path: Path | None = None) -> Iterator[sqlite3.Connection]:
        """A connection to the database, or to a new one at `path`, closed at the end.

        What SQLite finds wrong becomes an OSError or a DamagedFileError.
        """
        mode = "rwc" if path else "rw"  # without it, reading what was just removed would make an empty file
        where = f"{(path or self._database).absolute().as_uri()}?mode={mode}"
        try:
            with contextlib.closing(sqlite3.connect(where, timeout=10, uri=True)) as db:
                db.execute("PRAGMA foreign_keys = ON")
                db.execute("PRAGMA synchronous = FULL")
                db.execute("PRAGMA secure_delete = ON")
                if sys.platform == "darwin":
                    db.execute("PRAGMA fullfsync = ON")
                yield db
        except (sqlite3.Error, UnicodeDecodeError) as error:  # the latter for a damaged schema's text
            code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF
            if code == sqlite3.SQLITE_FULL:
                raise OSError(errno.ENOSPC, str(error), str(self._database)) from None
            if code in _OTHER_CAUSES:
                raise OSError(f"{self._database}: {error}") from None
            raise self._damaged(error) from None

    def _damaged(self, reason: object) -> DamagedFileError:
        return DamagedFileError(
            f"{self._database}: {reason}; restore it from a backup, or move {self.folder} away to start afresh"
        )

    def _check(self, db: sqlite3.Connection) -> None:
        """Compare schema, base and tokenizer with what this program and this model have."""
        version = db.execute("PRAGMA user_version").fetchone()[0]
        if version > SCHEMA:
            raise InputError(
                f"{self._database}: written by a newer program (schema {version}, this one knows {SCHEMA}); "
                "update this one"
            )
        recorded = db.execute("SELECT sha256, tokenizer FROM base").fetchone() if version == SCHEMA else None
        if recorded is None:
            raise self._damaged("no database of lessons")
        for what, old, new in zip(("base model", "tokenizer"), recorded, self._base, strict=True):
            if old != new:
                raise InputError(
                    f"{self.folder}: these lessons belong to another {what} (sha256 {old:.12}, this one is {new:.12}); "
                    "use --model with theirs, or --store with another folder"
                )

    def _select(self, where: str, *values: Any) -> list[Version]:
        if not self._database.is_file():
            return []
        with self._connected() as db:
            rows = db.execute(f"SELECT {_COLUMNS} FROM versions WHERE {where} ORDER BY id", values).fetchall()
        try:
            return [Version(*row[:7], *(json.loads(text) for text in row[7:])) for row in rows]
        except (ValueError, TypeError) as error:
            raise self._damaged(error) from None


def open_store(model: Path, folder: Path | None = None) -> Store:
    """The lessons of a model directory, kept in `folder` or in the directory's `learner`."""
    return Store(folder or model / "learner", modeldir.identity(model), Tokenizer.load(model).digest)


def version_number(name: str) -> int:
    """2 for "v0002" and for "2"; InputError for anything else."""
    if not re.fullmatch(r"v?\d{1,9}", name):
        raise InputError(f"{name!r} is no version; they are called v0001, v0002 and so on")
    return int(name.removeprefix("v"))
