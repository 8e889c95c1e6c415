"""Replies of endpoints, kept on disk under the whole request: what was paid for once is not asked again.

One SQLite file; an entry is there whole or not at all, whoever is killed, and several processes may share
it. Nothing in it says who asked: keys and entries hold the request and the reply only, never an API key.
"""

import hashlib
import json
import sqlite3
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hafrm.errors import CheckpointError


def request_key(request: Mapping[str, Any]) -> str:
    """Hexadecimal digest of a request; its keys' order does not count."""
    text = json.dumps(request, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


class ReplyCache:
    """A table of replies by the digest of their request; safe to use from several threads."""

    def __init__(self, file: Path) -> None:
        """Raises CheckpointError when the file cannot be opened, or is none of ours."""
        self.file = file
        self._lock = threading.Lock()
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            self._table = sqlite3.connect(
                file, timeout=60.0, isolation_level=None, check_same_thread=False
            )
            self._table.execute(
                "create table if not exists replies (key text primary key, request text, reply text)"
            )
        except (OSError, sqlite3.Error) as error:
            raise CheckpointError(
                f"the cache of replies {file} cannot be used ({error}): remove it, or set HAFRM_CACHE to "
                "a folder that can be written"
            ) from error

    def get(self, request: Mapping[str, Any]) -> Any:
        """The reply to an equal request, or None."""
        with self._lock:
            row = self._run("select reply from replies where key = ?", request_key(request))
        return None if row is None else json.loads(row[0])

    def put(self, request: Mapping[str, Any], reply: Any) -> None:
        """Keep a reply; a kill after this returns cannot lose it."""
        values = (request_key(request), json.dumps(request), json.dumps(reply))
        with self._lock:
            self._run("insert or replace into replies values (?, ?, ?)", *values)

    def close(self) -> None:
        """Let go of the file."""
        self._table.close()

    def _run(self, statement: str, *values: str) -> Any:
        try:
            return self._table.execute(statement, values).fetchone()
        except sqlite3.Error as error:
            raise CheckpointError(
                f"the cache of replies {self.file} cannot be used ({error}): see that its disk has room, "
                "or remove it"
            ) from error
