"""What is known of every trace, in a table on disk, and the rules that compare traces with each other.

A table of SQLite holds some hundred bytes of each trace, so that millions of them are sorted and counted within a
bounded memory. Whatever the order in which traces were entered, the rules decide the same.
"""

import contextlib
import sqlite3
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Self
from urllib.parse import quote

from bmjax.teach.settings import Selection

_COLUMNS = (
    "id TEXT", "domain TEXT", "reason TEXT", "cause TEXT", "question BLOB", "prompt BLOB", "text BLOB", "source TEXT",
    "answer BLOB", "passed INTEGER", "tokens INTEGER", "characters INTEGER", "part INTEGER", "offset INTEGER",
    "length INTEGER", "excerpt TEXT",
)  # fmt: skip
_CACHE_KIB = 128 * 1024
_FACTS = "text, prompt, tokens, characters, source, coalesce(cause, '')"  # what parts traces of the same id


class Trace(NamedTuple):
    """What decides about a trace.

    Attributes:
        reason, cause: why it is dropped whatever else there is, None when it may be kept.
        question: a digest of its prompt up to case, spaces and punctuation. prompt: of the prompt as it is.
        text: of prompt, reasoning and response. answer: of the answer that it states.
        passed: whether its prompt counts as solved by it; None where nobody knows.
        part, offset, length: where its row stands; length 0: nowhere.
        excerpt: JSON of the beginning and the end of a dropped one, for examples.
    """

    id: str
    domain: str
    reason: str | None
    cause: str | None
    question: bytes
    prompt: bytes
    text: bytes
    source: str
    answer: bytes
    passed: bool | None
    tokens: int | None
    characters: int
    part: int
    offset: int
    length: int
    excerpt: str


class Ledger:
    """The table of traces, and that of their distinct prompts. Used as a context manager."""

    def __init__(self, path: Path) -> None:
        self._database = sqlite3.connect(path, isolation_level=None)
        execute = self._database.execute
        for pragma in ("journal_mode = OFF", "synchronous = OFF", "temp_store = FILE", f"cache_size = -{_CACHE_KIB}"):
            execute(f"PRAGMA {pragma}")
        execute(f"CREATE TABLE IF NOT EXISTS trace ({', '.join(_COLUMNS)})")
        execute("CREATE TABLE IF NOT EXISTS prompt (key BLOB PRIMARY KEY, text TEXT) WITHOUT ROWID")
        execute("CREATE TABLE IF NOT EXISTS leak (reason TEXT, kind TEXT, key TEXT, domain TEXT, benchmark TEXT, "
                "question TEXT, rule TEXT, share REAL, span TEXT)")  # fmt: skip
        execute("CREATE TEMP TABLE verdict (key BLOB, cause TEXT)")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._database.close()

    def add(
        self, traces: Iterable[Trace], prompts: Iterable[tuple[bytes, str]], leaks: Iterable[tuple[Any, ...]]
    ) -> None:
        """Enter a batch of traces, their prompts, and what their texts hold of benchmarks."""
        self._database.execute("BEGIN")
        self._database.executemany(f"INSERT INTO trace VALUES ({','.join('?' * len(_COLUMNS))})", traces)
        self._database.executemany("INSERT OR IGNORE INTO prompt VALUES (?, ?)", prompts)
        self._database.executemany("INSERT INTO leak VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", leaks)
        self._database.execute("COMMIT")

    def add_leaks(self, leaks: Iterable[tuple[Any, ...]]) -> None:
        self._database.executemany("INSERT INTO leak VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", leaks)

    def join(self, path: Path, part: int) -> None:
        """Take over the ledger of a part."""
        columns = [name.split()[0] for name in _COLUMNS]
        values = [str(int(part)) if name == "part" else name for name in columns]
        self._database.execute("ATTACH ? AS piece", (str(path),))
        self._database.execute("BEGIN")
        self._database.execute(f"INSERT INTO trace SELECT {', '.join(values)} FROM piece.trace")
        self._database.execute("INSERT OR IGNORE INTO prompt SELECT * FROM piece.prompt")
        self._database.execute("INSERT INTO leak SELECT * FROM piece.leak")
        self._database.execute("COMMIT")
        self._database.execute("DETACH piece")

    @staticmethod
    def check(path: Path) -> None:
        """Raise sqlite3.DatabaseError for a file that is no ledger, or a damaged one."""
        with contextlib.closing(sqlite3.connect(f"file:{quote(str(path.absolute()))}?mode=ro", uri=True)) as database:
            for table in ("trace", "prompt", "leak"):
                database.execute(f"SELECT COUNT(*) FROM {table}").fetchone()

    def _all(self, query: str, *values: Any) -> list[Any]:
        return self._database.execute(query, values).fetchall()

    def domains(self) -> list[str]:
        return [name for (name,) in self._all("SELECT DISTINCT domain FROM trace ORDER BY domain")]

    def drop_duplicates(self) -> None:
        """Keep one of the traces of an id, then one of those of a text: one that nothing speaks against, if any."""
        for key, order in (("id", _FACTS), ("text", "id")):
            self._drop(
                f"SELECT rowid AS row, ROW_NUMBER() OVER (PARTITION BY domain, {key} "
                f"ORDER BY reason IS NOT NULL, {order}) AS rank FROM trace WHERE reason IS NOT 'duplicate'",
                "rank > 1", "duplicate",
            )  # fmt: skip
            if key == "id":
                # The same text twice are two samples all the same: they count for pass rates.
                self._database.execute("CREATE TEMP TABLE sample AS SELECT domain, question, answer, passed FROM trace "
                                       "WHERE reason IS NOT 'duplicate'")  # fmt: skip

    def drop_by_pass_rate(self, low: float, high: float) -> None:
        """Drop the traces of prompts that are solved too often or too seldom, or of which nobody knows."""
        self._database.execute(
            "CREATE TEMP TABLE rate AS SELECT domain, question, AVG(passed) AS share FROM sample GROUP BY 1, 2"
        )
        self._drop(
            "SELECT t.rowid AS row, r.share AS share FROM trace t JOIN rate r ON r.domain = t.domain "
            "AND r.question = t.question WHERE t.reason IS NULL",
            "share IS NULL OR share < ? OR share > ?", "pass rate", low - 1e-9, high + 1e-9,
        )  # fmt: skip

    def prompts(self, domain: str | None = None) -> Iterator[tuple[bytes, str]]:
        """Yield (key, text) of the prompts of traces that are not dropped, in the order of their keys."""
        condition, values = ("AND domain = ?", (domain,)) if domain is not None else ("", ())
        return iter(self._database.execute(
            "SELECT key, text FROM prompt WHERE key IN (SELECT prompt FROM trace WHERE reason IS NULL "
            f"{condition}) ORDER BY key", values,
        ))  # fmt: skip

    def questions(self, domain: str) -> Iterator[tuple[bytes, bytes]]:
        """Yield (question, prompt) of the traces that are not dropped, each pair once."""
        return iter(self._database.execute(
            "SELECT DISTINCT question, prompt FROM trace WHERE reason IS NULL AND domain = ? ORDER BY 1, 2", (domain,)
        ))  # fmt: skip

    def drop_prompts(self, reason: str, prompts: Iterable[tuple[bytes, str]], domain: str | None = None) -> None:
        """Drop the traces of some prompts. prompts: (key, cause)."""
        self._database.execute("DELETE FROM verdict")
        self._database.executemany("INSERT INTO verdict VALUES (?, ?)", prompts)
        condition, values = ("AND domain = ?", (domain,)) if domain is not None else ("", ())
        self._database.execute(
            "UPDATE trace SET reason = ?, cause = v.cause FROM verdict v WHERE trace.prompt = v.key AND reason IS NULL "
            + condition, (reason, *values),
        )  # fmt: skip

    def keep_best(self, settings: Selection) -> None:
        """Keep `per_prompt` traces of a question, those that `prefer` says."""
        length = "tokens IS NULL, tokens, characters, id"
        order = {"first": "id", "shortest": length, "most_agreed": f"-agreed, {length}"}[settings.prefer]
        self._database.execute(
            "CREATE TEMP TABLE agreement AS SELECT domain, question, answer, COUNT(*) AS agreed FROM sample "
            "WHERE answer IS NOT NULL GROUP BY 1, 2, 3"
        )
        self._drop(
            f"SELECT row, ROW_NUMBER() OVER (PARTITION BY domain, question ORDER BY {order}) AS rank FROM ("
            "SELECT t.rowid AS row, t.*, coalesce(a.agreed, 0) AS agreed FROM trace t LEFT JOIN agreement a "
            "ON a.domain = t.domain AND a.question = t.question AND a.answer = t.answer WHERE t.reason IS NULL)",
            "rank > ?", "enough", settings.per_prompt,
        )  # fmt: skip

    def all_sources(self) -> set[str]:
        return {name for (name,) in self._all("SELECT DISTINCT source FROM trace")}

    def keep_quota(self, quota: int | dict[str, int]) -> None:
        """Keep so many traces of a source, spread over its questions at random, the same ones every time."""
        names = quota if isinstance(quota, dict) else dict.fromkeys(self.all_sources(), quota)
        for name, size in names.items():
            self._drop(
                "SELECT rowid AS row, ROW_NUMBER() OVER (PARTITION BY domain ORDER BY rank, question, id) AS rank "
                "FROM ("
                "SELECT rowid, domain, question, id, ROW_NUMBER() OVER (PARTITION BY domain, question ORDER BY id) "
                "AS rank FROM trace WHERE reason IS NULL AND source = ?)", "rank > ?", "quota", name, size, cause=name,
            )  # fmt: skip

    def _drop(self, rows: str, condition: str, reason: str, *values: Any, cause: str | None = None) -> None:
        self._database.execute(
            f"UPDATE trace SET reason = ?, cause = ? WHERE rowid IN (SELECT row FROM ({rows}) WHERE {condition})",
            (reason, cause, *values),
        )

    def counts(self) -> list[tuple[str, str, str, int]]:
        """Return (domain, reason, cause, number); the reason of kept ones is 'kept'."""
        return self._all(
            "SELECT domain, coalesce(reason, 'kept'), coalesce(cause, ''), COUNT(*) FROM trace GROUP BY 1, 2, 3 "
            "ORDER BY 1, 2, 4 DESC, 3"
        )

    def kept(self, domain: str) -> Iterator[tuple[int, int, int]]:
        """Yield (part, offset, length) of the rows to keep, in the order of their ids."""
        return iter(self._database.execute(
            "SELECT part, offset, length FROM trace WHERE domain = ? AND reason IS NULL ORDER BY id", (domain,)
        ))  # fmt: skip

    def examples(self, domain: str, reason: str, number: int) -> list[tuple[str, str, int, int, int, str]]:
        """Return (id, cause, part, offset, length, excerpt) of some traces, the same ones every time."""
        return self._all(
            "SELECT id, coalesce(cause, ''), part, offset, length, excerpt FROM trace WHERE domain = ? "
            "AND coalesce(reason, 'kept') = ? ORDER BY text, id LIMIT ?", domain, reason, number,
        )  # fmt: skip

    def sources(self, domain: str) -> list[tuple[str, int]]:
        """Return (source, number of its traces kept), the most frequent first."""
        return self._all(
            "SELECT source, COUNT(*) FROM trace WHERE domain = ? AND reason IS NULL GROUP BY 1 ORDER BY 2 DESC, 1 "
            "LIMIT 20", domain,
        )  # fmt: skip

    def leaks(self) -> Iterator[tuple[Any, ...]]:
        """Yield what was met of held-out questions, in an order of its own."""
        return iter(self._database.execute(
            "SELECT reason, kind, key, domain, benchmark, question, rule, share, span FROM leak "
            "ORDER BY benchmark, question, kind, key, domain"
        ))  # fmt: skip
