"""The commit log's database: its tables, connections whose errors are ours, and a rewriting that leaves no trace.

SQLite with a rollback journal, so that there is one file between transactions. Deleted rows are overwritten with zeros
(`secure_delete`), but copies of them can stay in the unused part of pages that SQLite rearranged earlier. What must be
gone is therefore deleted in a copy in memory, which is vacuumed and written over the file in one transaction.
"""

import contextlib
import errno
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from mlx_impl.errors import DamagedFileError, InputError
from mlx_impl.files import atomic_file

DATABASE = "learner.sqlite"
SCHEMA = 2
TABLES = """
CREATE TABLE base (sha256 TEXT NOT NULL, tokenizer TEXT NOT NULL);
CREATE TABLE versions (
    domain TEXT NOT NULL,
    number INTEGER NOT NULL,
    parent INTEGER,
    depth INTEGER NOT NULL,
    source TEXT NOT NULL,
    created TEXT NOT NULL,
    config TEXT NOT NULL,
    figures TEXT NOT NULL,
    files TEXT NOT NULL,
    rows TEXT,
    sha256 TEXT,
    PRIMARY KEY (domain, number)
);
CREATE TABLE heads (
    domain TEXT NOT NULL PRIMARY KEY,
    number INTEGER NOT NULL,
    latest INTEGER NOT NULL,
    FOREIGN KEY (domain, number) REFERENCES versions
);
CREATE TABLE heldout (
    domain TEXT NOT NULL,
    number INTEGER NOT NULL,
    ids BLOB NOT NULL,
    trained BLOB,
    documents INTEGER NOT NULL,
    bytes INTEGER NOT NULL,
    PRIMARY KEY (domain, number),
    FOREIGN KEY (domain, number) REFERENCES versions ON DELETE CASCADE
);
CREATE TABLE replay (
    domain TEXT NOT NULL,
    number INTEGER NOT NULL,
    counters TEXT NOT NULL,
    ids BLOB NOT NULL,
    priorities BLOB NOT NULL,
    PRIMARY KEY (domain, number),
    FOREIGN KEY (domain, number) REFERENCES versions ON DELETE CASCADE
);
CREATE TABLE windows (
    domain TEXT NOT NULL,
    id BLOB NOT NULL,
    tokens BLOB NOT NULL,
    PRIMARY KEY (domain, id)
) WITHOUT ROWID;
"""
"""Every table but `base` has a column `domain`, by which it is erased; what belongs to a version cascades from it.

`parent` is a number in the same domain and may have been pruned; `latest` is the highest number ever given out.
A version's replay buffer is a list of window ids, 16 bytes each; the windows, int32, are stored once a domain. `rows`
are digests of the version's rows in `heldout` and `replay`, by table; `sha256` is that of its other columns. A program
that knew schema 1 only wrote neither: SQLite itself keeps no checksums, so what it wrote cannot be checked.
"""

MIGRATIONS: dict[int, tuple[str, ...]] = {
    1: ("ALTER TABLE versions ADD COLUMN rows TEXT", "ALTER TABLE versions ADD COLUMN sha256 TEXT"),
}
"""What turns a database of schema n into one of n + 1, statement by statement, in one transaction."""

PATIENCE = 10.0
"""Seconds that a connection waits for another one that keeps it from writing."""

_HELD = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}
_OTHER_CAUSES = _HELD | {
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_PERM,
    sqlite3.SQLITE_READONLY,
}
"""Reasons for which a database that is not damaged cannot be read or written now."""


class Database:
    """The database at `path`, whether or not it exists yet, of the lessons on one base and tokenizer (digests)."""

    def __init__(self, path: Path, base: str, tokenizer: str) -> None:
        self.path = path
        self.owner = (base, tokenizer)
        """Digests of the base model and the tokenizer that the lessons belong to."""

    def exists(self) -> bool:
        """Whether there is one."""
        return self.path.is_file()

    def create(self) -> None:
        """Make an empty database of this base and tokenizer; it has its name only when it is whole."""
        with atomic_file(self.path) as temporary, self.connected(temporary) as db:
            db.executescript(TABLES)
            db.execute("INSERT INTO base VALUES (?, ?)", self.owner)
            db.execute(f"PRAGMA user_version = {SCHEMA}")
            db.commit()

    def sweep(self) -> None:
        """Remove the journal that a killed writer left, once SQLite has played back what it must; nobody may write."""
        self.check()
        self.path.with_name(f"{self.path.name}-journal").unlink(missing_ok=True)

    @contextlib.contextmanager
    def connected(self, path: Path | None = None) -> Iterator[sqlite3.Connection]:
        """A connection to the database, or to a new one at `path`, closed at the end.

        What SQLite finds wrong becomes an OSError or a DamagedFileError.
        """
        mode = "rwc" if path else "rw"  # without it, reading what was just removed would make an empty file
        where = f"{(path or self.path).absolute().as_uri()}?mode={mode}"
        try:
            with contextlib.closing(sqlite3.connect(where, timeout=PATIENCE, uri=True)) as db:
                db.execute("PRAGMA foreign_keys = ON")
                db.execute("PRAGMA synchronous = EXTRA")  # FULL, and the journal's end is on the disk too
                db.execute("PRAGMA secure_delete = ON")
                if sys.platform == "darwin":
                    db.execute("PRAGMA fullfsync = ON")
                yield db
        except (sqlite3.Error, UnicodeDecodeError) as error:  # the latter for a damaged schema's text
            code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF
            if code == sqlite3.SQLITE_FULL:
                raise OSError(errno.ENOSPC, str(error), str(self.path)) from None
            if code in _HELD:
                raise OSError(f"{self.path}: another program has it open ({error}); close it there") from None
            if code in _OTHER_CAUSES:
                raise OSError(f"{self.path}: {error}") from None
            raise self.damaged(error) from None

    @contextlib.contextmanager
    def rewriting(self) -> Iterator[sqlite3.Connection]:
        """Yield a copy in memory; when the block ends without an error, it becomes the database, in one transaction.

        Nothing of what was deleted in the copy is left in the file, in a page's unused part neither. Constraints are
        checked at the end. Raises what `connected` does; the file is then as before.
        """
        with self.connected() as db, contextlib.closing(sqlite3.connect(":memory:")) as copy:
            db.backup(copy, progress=_patience())
            copy.execute("PRAGMA foreign_keys = ON")
            copy.execute("BEGIN")
            copy.execute("PRAGMA defer_foreign_keys = ON")
            yield copy
            copy.commit()
            copy.execute("VACUUM")
            copy.backup(db, progress=_patience())

    def erase(self, domain: str) -> None:
        """Remove a domain from every table that has a column of that name, leaving no trace in the file."""
        tables = (
            "SELECT t.name FROM sqlite_master AS t JOIN pragma_table_info(t.name) AS c "
            "WHERE t.type = 'table' AND c.name = 'domain'"
        )
        with self.rewriting() as db:
            for (table,) in db.execute(tables).fetchall():
                db.execute(f"DELETE FROM {table} WHERE domain = ?", (domain,))

    def damaged(self, reason: object) -> DamagedFileError:
        """The error for a database that cannot be read as one."""
        return DamagedFileError(
            f"{self.path}: {reason}; restore it from a backup, or move {self.path.parent} away to start afresh"
        )

    def check(self) -> None:
        """Compare schema, base and tokenizer with what this program and this model have.

        One of an older schema is brought up to this one first. Raises InputError for those of others, DamagedFileError
        where there are none.
        """
        with self.connected() as db:
            version = _migrated(db)
            recorded = db.execute("SELECT sha256, tokenizer FROM base").fetchone() if version == SCHEMA else None
        if version > SCHEMA:
            raise InputError(
                f"{self.path}: written by a newer program (schema {version}, this one knows {SCHEMA}); update this one"
            )
        if recorded is None:
            raise self.damaged("no database of lessons")
        for what, old, new in zip(("base model", "tokenizer"), recorded, self.owner, strict=True):
            if old != new:
                raise InputError(
                    f"{self.path.parent}: these lessons belong to another {what} (sha256 {old:.12}, this one is "
                    f"{new:.12}); use --model with theirs, or --store with another folder"
                )

    def problems(self) -> list[str]:
        """What SQLite and the tables' own rules find wrong, one line each; a moment's view, also while one writes.

        SQLite keeps no checksums: a flipped bit inside a value is not seen here.
        """
        orphans = "SELECT DISTINCT domain FROM versions WHERE domain NOT IN (SELECT domain FROM heads)"
        with self.connected() as db:
            db.execute("BEGIN")
            found = [line for row in db.execute("PRAGMA integrity_check") for line in row[0].splitlines()]
            found = [] if found == ["ok"] else found
            for table, _, parent, _ in db.execute("PRAGMA foreign_key_check").fetchall():
                found.append(f"a row of {table} belongs to none of {parent}")
            found += [f"domain {row[0]!r} has versions and no head" for row in db.execute(orphans).fetchall()]
        return [f"{self.path}: {line}" for line in found]


def _patience() -> Callable[[int, int, int], None]:
    """For `Connection.backup`, which by itself tries for ever to write where another program reads, deaf to signals."""
    end = time.monotonic() + PATIENCE

    def look(status: int, remaining: int, total: int) -> None:
        if status in _HELD and time.monotonic() > end:
            error = sqlite3.OperationalError("database is locked")
            error.sqlite_errorcode = status
            raise error

    return look


def _migrated(db: sqlite3.Connection) -> int:
    """The schema's version, after what an older one lacks was done to it: all of it or, where that fails, nothing."""

    def version() -> int:
        return int(db.execute("PRAGMA user_version").fetchone()[0])

    if version() not in MIGRATIONS:
        return version()
    db.execute("BEGIN IMMEDIATE")
    found = version()  # another process may have been first
    while found in MIGRATIONS:
        for statement in MIGRATIONS[found]:
            db.execute(statement)
        found += 1
    db.execute(f"PRAGMA user_version = {found}")
    db.commit()
    return found
