"""Which chunks an origin has, and where: a copy of its packs' footers in a local SQLite file, so that chunks are stored once.

The file is a cache: it is brought up to date against the origin's list of packs each time, may be deleted at any time, and is
made anew if it is damaged. Belongs to one event loop; other processes may use the same file.
"""

import asyncio
import contextlib
import logging
import os
import sqlite3
from collections.abc import AsyncIterator, Iterable, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from vmthunder.errors import Corrupt, NotFound
from vmthunder.ids import ChunkId, PackId, digest
from vmthunder.image.pack import PackEntry
from vmthunder.origin.damage import trusted
from vmthunder.origin.origin import Origin, PackInfo

log = logging.getLogger(__name__)

FOOTERS_AT_ONCE: Final = 16
_VERSION: Final = 2
_SCHEMA: Final = """
    CREATE TABLE packs (number INTEGER PRIMARY KEY, pack BLOB UNIQUE NOT NULL, size INTEGER NOT NULL);
    CREATE TABLE chunks (
        chunk BLOB PRIMARY KEY, pack INTEGER NOT NULL, offset INTEGER NOT NULL, length INTEGER NOT NULL
    ) WITHOUT ROWID;
    CREATE INDEX chunks_of_pack ON chunks (pack);
"""


class Known(NamedTuple):
    """Where a chunk is."""

    pack: PackId
    offset: int
    encoded_bytes: int


class KnownChunks:
    """What an origin had when it was last asked, and what was added since."""

    def __init__(self, database: sqlite3.Connection) -> None:
        """Use `KnownChunks.refreshed`."""
        self._database = database

    @classmethod
    @contextlib.asynccontextmanager
    async def refreshed(cls, origin: Origin) -> AsyncIterator["KnownChunks"]:
        """What the origin has now. Hold a lock of the origin, or gc may take it away.

        Raises:
            OriginUnavailable, NotPermitted.
        """
        database = _open(_path(origin.url))
        try:
            known = cls(database)
            await known._refresh(origin)
            yield known
        finally:
            database.close()

    def find(self, chunk_id: ChunkId) -> Known | None:
        """Where the origin has a chunk, if it does."""
        row = self._database.execute(
            "SELECT packs.pack, offset, length FROM chunks JOIN packs ON packs.number = chunks.pack WHERE chunk = ?",
            (chunk_id,),
        ).fetchone()
        return Known(PackId(row[0]), row[1], row[2]) if row else None

    def has(self, packs: Iterable[PackId]) -> bool:
        """Whether the origin has all these packs, and none of them is known to be damaged."""
        return all(self._database.execute("SELECT 1 FROM packs WHERE pack = ?", (pack,)).fetchone() for pack in packs)

    def add(self, pack: PackId, size_bytes: int, entries: Iterable[PackEntry]) -> None:
        """A pack that is at the origin now."""
        with self._database:
            self._database.execute("INSERT OR IGNORE INTO packs (pack, size) VALUES (?, ?)", (pack, size_bytes))
            (number,) = self._database.execute("SELECT number FROM packs WHERE pack = ?", (pack,)).fetchone()
            self._database.executemany(
                "INSERT OR IGNORE INTO chunks VALUES (?, ?, ?, ?)",
                ((entry.chunk_id, number, entry.offset, entry.encoded_bytes) for entry in entries),
            )

    async def _refresh(self, origin: Origin) -> None:
        there = {(info.pack, info.size_bytes): info for info in await trusted(origin, await origin.packs())}
        rows = self._database.execute("SELECT pack, size, number FROM packs").fetchall()
        known = {(PackId(pack), size_bytes): number for pack, size_bytes, number in rows}
        with self._database:
            # Gone, found damaged, or no longer as long as when its footer was read.
            for number in (known[key] for key in known.keys() - there.keys()):
                self._database.execute("DELETE FROM chunks WHERE pack = ?", (number,))
                self._database.execute("DELETE FROM packs WHERE number = ?", (number,))
        new = [info for key, info in there.items() if key not in known]
        for at in range(0, len(new), FOOTERS_AT_ONCE):
            await self._learn(origin, new[at : at + FOOTERS_AT_ONCE])

    async def _learn(self, origin: Origin, packs: Sequence[PackInfo]) -> None:
        footers = await asyncio.gather(*map(origin.pack_entries, packs), return_exceptions=True)
        for info, entries in zip(packs, footers, strict=True):
            if isinstance(entries, Corrupt | NotFound):
                # What a power loss left of it: its chunks are stored anew, and gc removes it if no image names it.
                log.warning("event=pack_ignored reason=%s", entries)
            elif isinstance(entries, BaseException):
                raise entries
            else:
                self.add(info.pack, info.size_bytes, entries)


def _path(url: str) -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "vmthunder" / f"{digest(url.encode())[:16].hex()}.sqlite"


def _open(path: Path) -> sqlite3.Connection:
    """The file, made anew if it is damaged or of another version; in memory where none can be written."""
    for _ in range(2):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            return _prepared(sqlite3.connect(path, timeout=60))
        except (OSError, sqlite3.OperationalError) as error:
            log.warning("event=index_in_memory file=%s reason=%s", path, error)
            break
        except sqlite3.DatabaseError as error:
            log.warning("event=index_anew file=%s reason=%s", path, error)
            path.unlink(missing_ok=True)
    return _prepared(sqlite3.connect(":memory:"))


def _prepared(database: sqlite3.Connection) -> sqlite3.Connection:
    # It is a cache: what a crash takes from it is learned again.
    database.execute("PRAGMA synchronous = OFF")
    with database:
        database.execute("BEGIN IMMEDIATE")
        (version,) = database.execute("PRAGMA user_version").fetchone()
        if version not in (0, _VERSION):
            raise sqlite3.DatabaseError(f"version {version}")
        if version == 0:
            for statement in filter(str.strip, _SCHEMA.split(";")):
                database.execute(statement)
            database.execute(f"PRAGMA user_version = {_VERSION}")
    return database
