"""What a model has learned, on disk: a SQLite commit log beside ordinary mlx-lm adapter folders.

A lesson is written to a temporary folder, fsynced and renamed; then ONE transaction moves the domain's head. A crash
leaves the old head or the new one, never a mixture. What a crashed or failed writer leaves lying about is swept: it is
known by a mark, so that nothing that somebody else put there is ever removed. Versions are immutable, and the hashes of
their files and rows are checked when they are read. Imports no MLX: arrays are files here.
"""

import contextlib
import errno
import json
import os
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mlx_impl import files, modeldir
from mlx_impl.data import Tokens
from mlx_impl.database import DATABASE, Database
from mlx_impl.errors import DamagedFileError, InputError, MiniMacError
from mlx_impl.reservoirs import window_id
from mlx_impl.tokenizer import tokenizer_file
from mlx_impl.versions import (
    HeldOut,
    Replay,
    Version,
    check_domain,
    digest_of,
    is_domain,
    is_version,
    mapping,
    version_name,
)

_COLUMNS = "domain, number, parent, depth, source, created, config, figures, files, rows, sha256"
_LOCK = ".lock"

PENDING = ".pending"
"""Lies in a version's folder until its row is committed, and again before that is deleted: without one nothing is
swept."""


class Store:
    """The `learner` folder of a model. Reading needs no lock; writing happens inside `writing()`.

    `base` and `tokenizer` are digests; a store that belongs to others is refused, because an adapter means nothing on
    another base. A store that has no lesson yet leaves nothing on the disk.
    """

    def __init__(self, folder: Path, base: str, tokenizer: str) -> None:
        self.folder = folder
        self.database = Database(folder / DATABASE, base, tokenizer)
        if self.database.exists():
            self.database.check()

    # -- reading ---------------------------------------------------------------------------------------------

    def domains(self) -> list[str]:
        """Names of the domains that have a lesson, sorted."""
        if not self.database.exists():
            return []
        with self.database.connected() as db:
            return [row[0] for row in db.execute("SELECT domain FROM heads ORDER BY domain")]

    def head(self, domain: str) -> Version | None:
        """The current version of a domain, None if it has none."""
        check_domain(domain)
        found = self._select("(domain, number) IN (SELECT domain, number FROM heads WHERE domain = ?)", domain)
        return found[0] if found else None

    def latest(self) -> str:
        """The domain that learned last; InputError where nothing was learned."""
        order = "ORDER BY created DESC, versions.rowid DESC LIMIT 1"
        row = None
        if self.database.exists():
            with self.database.connected() as db:
                row = db.execute(f"SELECT domain FROM versions JOIN heads USING (domain, number) {order}").fetchone()
        if row is None:
            raise InputError("nothing learned yet; teach it with `minimac-mlx learn`")
        return str(row[0])

    def require(self, domain: str) -> Version:
        """The current version of a domain; InputError naming the domains there are if it has none."""
        head = self.head(domain)
        if head is None:
            known = ", ".join(self.domains()) or "none yet; teach one with `minimac-mlx learn`"
            raise InputError(f"no domain called {domain!r}; there are: {known}")
        return head

    def overview(self) -> list[dict[str, Any]]:
        """What `list --json` prints: each domain with its current lesson."""
        heads = self._select("(domain, number) IN (SELECT domain, number FROM heads)")
        return [{"domain": v.domain, "lessons": v.depth, **v.as_json()} for v in heads]

    def versions(self, domain: str | None = None) -> list[Version]:
        """All versions there are, also those that no head stands on; by domain, then by number."""
        return self._select("1") if domain is None else self._select("domain = ?", domain)

    def history(self, domain: str) -> list[Version]:
        """The lessons that the domain's head stands on, first to last, from the oldest that was not pruned."""
        head = self.head(domain)
        if head is None:
            return []
        chain = [head]
        for version in reversed(self.versions(domain)):  # a parent is older than its children
            if version.number == chain[-1].parent:
                chain.append(version)
        return chain[::-1]

    def heldout(self, version: Version) -> HeldOut | None:
        """What was held out of the lesson's text, None if nothing was; DamagedFileError where it is not that."""
        with self.database.connected() as db:
            row = db.execute(
                "SELECT ids, trained, documents, bytes FROM heldout WHERE domain = ? AND number = ?",
                (version.domain, version.number),
            ).fetchone()
        found = None
        if row is not None:
            try:
                ids = np.frombuffer(row[0], "<i4").astype(np.int32)
                trained = None if row[1] is None else np.frombuffer(row[1], np.uint8).astype(bool)
            except (ValueError, TypeError) as error:
                raise self.damaged(version, f"its held-out text: {error}") from None
            found = HeldOut(ids, trained, row[2], row[3])
        self._compare(version, "heldout", found, "its held-out text")
        return found

    def probe(self, version: Version, vocab_size: int) -> Tokens | None:
        """What was held out, to measure it; DamagedFileError also for tokens that a model of so many does not have."""
        kept = self.heldout(version)
        if kept is None:
            return None
        if not len(kept.ids) or kept.ids.min() < 0 or kept.ids.max() >= vocab_size:
            raise self.damaged(version, "its held-out text has tokens that the model does not have")
        if kept.trained is not None and len(kept.trained) != len(kept.ids):
            raise self.damaged(version, f"its held-out text has {len(kept.ids)} tokens and {len(kept.trained)} marks")
        return Tokens(kept.ids, kept.trained, kept.documents, kept.bytes)

    def replay(self, version: Version) -> Replay | None:
        """The replay buffer as a version left it, with all of its windows; None if it left none.

        Raises DamagedFileError where a window is missing or anything is not what was written.
        """
        key = (version.domain, version.number)
        with self.database.connected() as db:
            row = db.execute(
                "SELECT counters, ids, priorities FROM replay WHERE domain = ? AND number = ?", key
            ).fetchone()
            stored = dict(db.execute("SELECT id, tokens FROM windows WHERE domain = ?", (version.domain,)))
        found = None
        if row is not None:
            try:
                ids = np.frombuffer(row[1], np.uint8).reshape(-1, 16)
                windows = {id.tobytes(): np.frombuffer(stored[id.tobytes()], "<i4").astype(np.int32) for id in ids}
                found = Replay(mapping(row[0]), ids, np.frombuffer(row[2], "<f8"), windows)
            except KeyError as error:
                raise self.damaged(version, f"its replay buffer lacks window {error.args[0].hex()}") from None
            except (ValueError, TypeError) as error:
                raise self.damaged(version, f"its replay buffer: {error}") from None
            for id, window in windows.items():
                if window_id(window) != id:
                    raise self.damaged(version, f"window {id.hex()} of its replay buffer has changed")
        self._compare(version, "replay", found, "its replay buffer")
        return found

    def _compare(self, version: Version, table: str, found: HeldOut | Replay | None, what: str) -> None:
        """DamagedFileError where a version's row in a table, or there being none, is not what was committed."""
        if version.rows is None:
            return
        if version.rows.get(table) != (found.digest() if found is not None else None):
            raise self.damaged(version, f"{what} has changed since it was learned")

    def damaged(self, version: Version, problem: str) -> DamagedFileError:
        """The error for what the database holds of a version."""
        where = f"{self.database.path}: {version.domain} {version.name}"
        return DamagedFileError(f"{where}: {problem}; {self.way_out(version)}")

    def files_of(self, version: Version) -> Path:
        """The version's folder, after comparing its files' hashes; DamagedFileError names the one that differs."""
        for problem in self.damage(version):
            if version not in self.versions(version.domain):
                name = f"{version.domain} {version.name}"
                raise InputError(f"{name} was removed by another process meanwhile; run this again")
            raise DamagedFileError(f"{problem}; {self.way_out(version)}")
        return self._folder(version)

    def way_out(self, version: Version) -> str:
        """What to do about a version that is damaged."""
        domain, head = version.domain, self.head(version.domain)
        if head is not None and head.number > version.number:
            return "later versions do without it: `minimac-mlx prune --keep N` deletes all but the last N"
        others = [other.number for other in self.versions(domain) if other.number != version.number]
        if version.parent in others:
            return f"`minimac-mlx undo {domain}` goes back a version"
        if others:
            return f"`minimac-mlx undo {domain} --to {version_name(others[-1])}` goes to another version"
        return f"there is no other version: restore it, or `minimac-mlx forget {domain}` removes the domain"

    def damage(self, version: Version) -> Iterator[str]:
        """Each file of a version that is not as it was learned, and how."""
        for name, digest in version.files.items():
            path = self._folder(version) / name
            if not path.is_file():
                yield f"{path}: missing"
            elif files.sha256(path) != digest:
                yield f"{path}: changed since it was learned"

    def paths(self, version: Version) -> list[Path]:
        """The version's folder and the files that belong into it."""
        return [self._folder(version), *(self._folder(version) / name for name in version.files)]

    def _folder(self, version: Version) -> Path:
        return self.folder / version.domain / version.name

    def copy_to(self, target: Path) -> Path:
        """A copy of the whole store in a folder that is not there yet, taken while no writer is at work; returns it.

        Raises InputError where the folder exists, lies in the store or nothing was learned, LockedError while a lesson
        is learned.
        """
        if target.exists():
            raise InputError(f"{target} exists already; name another folder or remove it first")
        if target.resolve().is_relative_to(self.folder.resolve()):
            raise InputError(f"{target} lies in {self.folder}, of which it is to be a copy; name a folder elsewhere")
        if not self.database.exists():
            raise InputError("nothing was learned yet, so there is nothing to save")
        with files.locked(self.folder / _LOCK, str(self.folder)), files.atomic_folder(target) as folder:
            shutil.copytree(self.folder, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(_LOCK))
        return target

    def beside(self, folder: Path) -> "Store":
        """The store in another folder, of the same base and tokenizer; InputError if it belongs to others."""
        return Store(folder, *self.database.owner)

    def size(self) -> int:
        """Bytes of all files in the folder."""
        return sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())

    @contextlib.contextmanager
    def looking(self) -> Iterator[str | None]:
        """Keep writers out for the block, which must be short, and yield None; where one is at work, yield its pid."""
        with files.unlocked(self.folder / _LOCK) as holder:
            yield holder

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
                stack.enter_context(files.locked(self.folder / _LOCK, str(self.folder)))
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                    raise
                raise InputError(
                    f"{self.folder} cannot be written to; keep lessons elsewhere with --store DIR"
                ) from None
            try:
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
        if self.database.exists() or not self.folder.exists():
            return False
        if not self.folder.is_dir():
            raise InputError(f"{self.folder} is no folder; lessons need one of their own, see --store")
        others = sorted(path.name for path in self.folder.iterdir() if not path.name.startswith("."))
        if others:
            raise InputError(
                f"{self.folder} holds {others[0]} but no {DATABASE}; lessons need a folder of their own, see --store"
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
        replay: Replay | None = None,
    ) -> Version:
        """Make a version of the files that `write` puts into a folder, and the domain's head; call inside `writing`."""
        check_domain(domain)
        if not self.database.exists():
            self.database.create()
        with self.database.connected() as db:
            latest = db.execute("SELECT latest FROM heads WHERE domain = ?", (domain,)).fetchone()
        number = latest[0] + 1 if latest else 1
        while os.path.lexists(folder := self.folder / domain / version_name(number)):
            number += 1  # somebody put it there; a database that was restored from a backup does not know it
        with files.atomic_folder(folder) as temporary:
            write(temporary)
            digests = {path.name: files.sha256(path) for path in sorted(temporary.iterdir())}
            (temporary / PENDING).touch()
        files.fsync(self.folder)  # the domain's folder may be new
        created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        place = (domain, number, parent.number if parent else None, parent.depth + 1 if parent else 1)
        rows = {name: part.digest() for name, part in (("heldout", heldout), ("replay", replay)) if part is not None}
        documents = [
            json.dumps(value, ensure_ascii=False, allow_nan=False) for value in (config, figures, digests, rows)
        ]
        row = [*place, source, created, *documents]
        with self.database.connected() as db, db:  # the second: one transaction
            marks = ", ".join("?" * (len(row) + 1))
            db.execute(f"INSERT INTO versions ({_COLUMNS}) VALUES ({marks})", [*row, digest_of(*row)])
            if heldout is not None:
                trained = None if heldout.trained is None else heldout.trained.astype(np.uint8).tobytes()
                kept = (domain, number, heldout.ids.astype("<i4").tobytes(), trained, heldout.documents, heldout.bytes)
                db.execute("INSERT INTO heldout VALUES (?, ?, ?, ?, ?, ?)", kept)
            if replay is not None:
                windows = [(domain, id, window.astype("<i4").tobytes()) for id, window in replay.windows.items()]
                db.executemany("INSERT OR IGNORE INTO windows VALUES (?, ?, ?)", windows)
                ids, priorities = replay.ids.astype(np.uint8).tobytes(), replay.priorities.astype("<f8").tobytes()
                counters = json.dumps(replay.counters, allow_nan=False)
                db.execute("INSERT INTO replay VALUES (?, ?, ?, ?, ?)", (domain, number, counters, ids, priorities))
            db.execute("INSERT OR REPLACE INTO heads VALUES (?, ?, ?)", (domain, number, number))
        (folder / PENDING).unlink()
        return self.require(domain)

    def undo(self, domain: str, to: int | None = None) -> Version | None:
        """Move a domain's head back one lesson, or to version number `to`; returns the new head.

        Undoing the first lesson removes the domain and its files and returns None. Raises InputError where the
        version is not there or was pruned. Call inside `writing`.
        """
        head = self.require(domain)
        number = head.parent if to is None else to
        if number is None:
            self._erase(domain)
            return None
        target = self._select("domain = ? AND number = ?", domain, number)
        if not target:
            raise self._missing(head, to)
        with self.database.connected() as db, db:
            db.execute("UPDATE heads SET number = ? WHERE domain = ?", (number, domain))
        return target[0]

    def _missing(self, head: Version, to: int | None) -> InputError:
        """The error for a version that `undo` cannot go to: the head's parent, or number `to`."""
        if to is None:
            return InputError(
                f"{head.name} is the oldest version of {head.domain} that is kept, the ones before were pruned; "
                f"`minimac-mlx forget {head.domain}` removes the domain"
            )
        with self.database.connected() as db:
            latest = db.execute("SELECT latest FROM heads WHERE domain = ?", (head.domain,)).fetchone()[0]
        known = ", ".join(version.name for version in self.versions(head.domain))
        if 1 <= to <= latest:
            return InputError(f"version {to} of domain {head.domain} was pruned; there are: {known}")
        return InputError(f"domain {head.domain} has no version {to}; there are: {known}")

    def forget(self, domain: str) -> list[Version]:
        """Erase a domain: its versions, which are returned, their files, labels and held-out tokens.

        Afterwards no file of the store holds anything of it, and all others are as if it had never been there. A crash
        leaves it whole, or gone but for a folder that the next writer sweeps. Call inside `writing`.
        """
        self.require(domain)
        versions = self.versions(domain)
        self._erase(domain)
        return versions

    def prune(self, keep: int) -> list[Version]:
        """Delete all versions but each domain's head and the `keep` - 1 that it stands on; returns the deleted ones.

        Their held-out tokens go with them. Raises InputError for `keep` below 1, and where a folder is a link. Call
        inside `writing`.
        """
        if keep < 1:
            raise InputError(f"--keep {keep}: at least the version that a domain is at stays, so 1 or more")
        kept = {
            (version.domain, version.number) for domain in self.domains() for version in self.history(domain)[-keep:]
        }
        pruned = [version for version in self.versions() if (version.domain, version.number) not in kept]
        if pruned:
            self._mark(map(self._folder, pruned))
            with self.database.rewriting() as db:
                for version in pruned:
                    db.execute("DELETE FROM versions WHERE domain = ? AND number = ?", (version.domain, version.number))
                for domain in {version.domain for version in pruned}:
                    _drop_unused_windows(db, domain)
            self._sweep()
        return pruned

    def _erase(self, domain: str) -> None:
        """Remove a domain's rows without a trace, then its folders, also those of a lesson that no row knows."""
        others = (path.parent for path in (self.folder / domain).glob("v*/adapters.safetensors"))
        self._mark([*map(self._folder, self.versions(domain)), *(path for path in others if is_version(path.name))])
        self.database.erase(domain)
        self._sweep()
        files.fsync(self.folder)

    def _mark(self, folders: Iterable[Path]) -> None:
        """Let `_sweep` remove these folders as soon as no row knows them; InputError for a link to one elsewhere."""
        there = [folder for folder in folders if os.path.lexists(folder)]
        for folder in there:
            if folder.is_symlink() or not folder.is_dir():
                raise InputError(f"{folder} is a link or a file, and what it stands for would not be erased; remove it")
        for folder in there:
            (folder / PENDING).touch()
            files.fsync(folder)

    def _sweep(self) -> None:
        """Remove what crashed and failed writers left: temporary files, marked folders, dead journals.

        Where a row knows a marked folder, it is the mark that was left.
        """
        if not self.folder.is_dir():
            return
        if self.database.exists():
            self.database.sweep()  # checks it too: another process may have begun it
        files.sweep(self.folder)
        known = {(v.domain, v.name) for v in self.versions()}
        for domain in [path for path in self.folder.iterdir() if is_domain(path.name) and path.is_dir()]:
            files.sweep(domain)
            for folder in [path for path in domain.iterdir() if is_version(path.name) and not path.is_symlink()]:
                unknown = (domain.name, folder.name) not in known
                if (folder / PENDING).is_file():
                    _remove(folder) if unknown else (folder / PENDING).unlink()
                elif unknown:
                    with contextlib.suppress(OSError):
                        folder.rmdir()  # only if nothing is in it: the mark goes last
            with contextlib.suppress(OSError):
                domain.rmdir()  # only if nothing is left in it

    def _remove_unused(self, keep_folder: bool) -> None:
        """Remove database and lock, which is held, if there is no lesson; the folder too if nothing is left in it."""
        ours = [self.folder / name for name in (f"{DATABASE}-journal", DATABASE, _LOCK)]
        others = [path for path in self.folder.iterdir() if path not in ours]
        if self.versions() or any(is_domain(path.name) for path in others):
            return
        for path in ours:
            path.unlink(missing_ok=True)
        if not keep_folder and not others:
            self.folder.rmdir()

    def _select(self, where: str, *values: Any) -> list[Version]:
        if not self.database.exists():
            return []
        with self.database.connected() as db:
            rows = db.execute(
                f"SELECT {_COLUMNS} FROM versions WHERE {where} ORDER BY domain, number", values
            ).fetchall()
        found = []
        for *row, digest in rows:
            where = f"version {row[1]} of {row[0]}"
            if digest is not None and digest != digest_of(*row):
                raise self.database.damaged(f"{where} has changed since it was learned")
            try:
                documents = [None if text is None else mapping(text) for text in row[6:]]
                found.append(Version(*row[:6], *documents))
            except (ValueError, TypeError) as error:
                raise self.database.damaged(f"{where}: {error}") from None
        return found


def _remove(folder: Path) -> None:
    """Remove a marked folder, its mark last: a crash on the way leaves a marked one."""
    for path in folder.iterdir():
        if path.name != PENDING:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    (folder / PENDING).unlink()
    folder.rmdir()


def _drop_unused_windows(db: sqlite3.Connection, domain: str) -> None:
    """Delete a domain's windows that no version's replay buffer holds any more."""
    used: set[bytes] = set()
    for (ids,) in db.execute("SELECT ids FROM replay WHERE domain = ?", (domain,)):
        used |= {ids[start : start + 16] for start in range(0, len(ids), 16)}
    known = [id for (id,) in db.execute("SELECT id FROM windows WHERE domain = ?", (domain,))]
    db.executemany("DELETE FROM windows WHERE domain = ? AND id = ?", [(domain, id) for id in known if id not in used])


def open_store(model: Path, folder: Path | None = None) -> Store:
    """The lessons of a model directory, kept in `folder` or in the directory's `learner`."""
    return Store(folder or model / "learner", modeldir.identity(model), files.sha256(tokenizer_file(model)))
