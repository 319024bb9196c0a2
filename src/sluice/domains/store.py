"""What a system keeps of its domains: identities that must stay the same over restarts.

A domain's number (qid) and uuid are made once. The store is SQLite with a write-ahead log, one
writer and a schema version; a store written by a newer Sluice is refused.
docs/spec/core-stack.md 3.2, 12.4.1.
"""

from __future__ import annotations

import sqlite3
import uuid
from dataclasses import dataclass
from pathlib import Path

from sluice.domains.model import MAX_QID
from sluice.errors import LocalError

SCHEMA_VERSION = 1

_SCHEMA = """
CREATE TABLE identity (
    name TEXT PRIMARY KEY,
    qid INTEGER NOT NULL UNIQUE CHECK (qid BETWEEN 1 AND 9999),
    uuid TEXT NOT NULL UNIQUE
) STRICT;
"""


@dataclass(frozen=True, slots=True)
class Identity:
    """The three names of one domain; none of them ever changes."""

    name: str
    qid: int
    uuid: str


class Store:
    """The database of one system. Use as a context manager, or call ``close``."""

    def __init__(self, path: Path | str) -> None:
        """Open or make the store. Raises LocalError for a newer schema or a broken file."""
        self._db = sqlite3.connect(path, isolation_level=None, timeout=5.0)
        try:
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._prepare(str(path))
        except sqlite3.DatabaseError as error:
            self._db.close()
            raise LocalError(f"{path}: cannot be used as the store: {error}") from error
        except LocalError:
            self._db.close()
            raise

    def _prepare(self, path: str) -> None:
        self._db.execute("BEGIN IMMEDIATE")
        version = int(self._db.execute("PRAGMA user_version").fetchone()[0])
        if version > SCHEMA_VERSION:
            self._db.execute("ROLLBACK")
            raise LocalError(
                f"{path}: was written by a newer Sluice (schema {version}, this one knows"
                f" {SCHEMA_VERSION})"
            )
        if version == 0:
            self._db.execute(_SCHEMA)
            self._db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        self._db.execute("COMMIT")

    def identity(self, name: str) -> Identity:
        """Return the identity of ``name``, made now if it has none.

        The number is the smallest that is free (3.2). Raises LocalError when all are taken.
        """
        self._db.execute("BEGIN IMMEDIATE")
        try:
            row = self._db.execute(
                "SELECT name, qid, uuid FROM identity WHERE name = ?", (name,)
            ).fetchone()
            if row is None:
                row = (name, self._free_qid(), str(uuid.uuid4()))
                self._db.execute("INSERT INTO identity VALUES (?, ?, ?)", row)
            self._db.execute("COMMIT")
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        return Identity(*row)

    def _free_qid(self) -> int:
        taken = {int(row[0]) for row in self._db.execute("SELECT qid FROM identity")}
        for qid in range(1, MAX_QID + 1):
            if qid not in taken:
                return qid
        raise LocalError(f"no number is free: {MAX_QID} domains exist")

    def forget(self, name: str) -> None:
        """Remove an identity; a later domain of that name is another domain."""
        self._db.execute("DELETE FROM identity WHERE name = ?", (name,))

    def identities(self) -> list[Identity]:
        """Return all identities, by number."""
        rows = self._db.execute("SELECT name, qid, uuid FROM identity ORDER BY qid")
        return [Identity(*row) for row in rows]

    def close(self) -> None:
        """Close the database."""
        self._db.close()

    def __enter__(self) -> Store:
        """Return the store itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the store."""
        self.close()
