"""Labels from people: a store that loses nothing, persons for headless runs, and a page in the browser (Gradio).

A `Store` is one SQLite file: the questions, the classes, and every action of every person, appended and never changed.
Labels are class names (task "classes") or lists of {"class": name, "box": [x1, y1, x2, y2]} (task "boxes"), xyxy in
pixels of the original image, upright as its EXIF orientation says; an empty list says "nothing to see here".
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import html
import importlib.util
import io
import json
import math
import os
import secrets
import sqlite3
import string
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from .. import data
from ..seeding import rng_for

if TYPE_CHECKING:
    import pandas as pd

TASKS = ("classes", "boxes")
ACTIONS = ("label", "skip", "unknown", "undo")
MAX_PIXELS = 80_000_000  # of an image that is shown; a photograph has 50 million at most
HISTORY = (
    "id",
    "when",
    "who",
    "image",
    "cycle",
    "action",
    "label",
    "strategy",
    "score",
    "model",
    "suggestion",
    "suggestion_shown",
    "seconds",
    "note",
    "undoes",
    "undone",
)

_FORMAT = 1
_APPLICATION = 0x66654C62  # marks the file as ours
_SCHEMA = """
CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE classes (place INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, who TEXT, at TEXT NOT NULL);
CREATE TABLE questions (
    id INTEGER PRIMARY KEY, image TEXT NOT NULL, cycle INTEGER NOT NULL, file TEXT NOT NULL, strategy TEXT NOT NULL,
    score REAL, model TEXT NOT NULL, suggestion TEXT, place INTEGER NOT NULL, state TEXT NOT NULL DEFAULT 'waiting',
    holder TEXT, since REAL, until REAL, UNIQUE (image, cycle)
);
CREATE INDEX waiting ON questions (state, place);
CREATE INDEX held ON questions (holder) WHERE holder IS NOT NULL;
CREATE TABLE actions (
    id INTEGER PRIMARY KEY AUTOINCREMENT, at TEXT NOT NULL, who TEXT NOT NULL, image TEXT NOT NULL,
    cycle INTEGER NOT NULL, action TEXT NOT NULL, label TEXT, strategy TEXT, score REAL, model TEXT, suggestion TEXT,
    suggestion_shown INTEGER NOT NULL DEFAULT 0, seconds REAL, note TEXT NOT NULL DEFAULT '', undoes INTEGER
);
CREATE INDEX by_image ON actions (image, cycle);
CREATE INDEX by_who ON actions (who);
CREATE UNIQUE INDEX undone ON actions (undoes) WHERE undoes IS NOT NULL;
CREATE TRIGGER no_change BEFORE UPDATE ON actions BEGIN SELECT RAISE(ABORT, 'actions are only appended'); END;
CREATE TRIGGER no_removal BEFORE DELETE ON actions BEGIN SELECT RAISE(ABORT, 'actions are only appended'); END;
"""
_STANDING = "id NOT IN (SELECT undoes FROM actions WHERE undoes IS NOT NULL)"  # an action nobody took back


# ----------------------------------------------------------------------------------------------------------- the store


class NotHeld(ValueError):
    """The person does not hold this image: answered already, taken by somebody else, or never asked."""


@dataclass(frozen=True)
class Question:
    """One image to be labelled. image: its id; file: its name below the folder of images, "" if it has none.

    strategy, score, model: who asks and why (a score may be None); suggestion: a label, shown only if the page is told
    to; cycle: of the active-learning loop. Ids and file names are relative, without `..`.
    """

    image: str
    file: str = ""
    strategy: str = ""
    score: float | None = None
    model: str = ""
    suggestion: Any = None
    cycle: int = 0

    def __post_init__(self) -> None:
        safe_name(self.image, "image id")
        if self.file:
            safe_name(self.file, "file name")
        if self.score is not None and not math.isfinite(self.score):
            raise ValueError(f"image {self.image!r}: the score must be finite or None, got {self.score!r}")
        if isinstance(self.cycle, bool) or int(self.cycle) != self.cycle or self.cycle < 0:
            raise ValueError(f"image {self.image!r}: the cycle must be a whole number from 0 up, got {self.cycle!r}")


def safe_name(name: str, what: str = "image name") -> str:
    """The name if it stays below its folder; ValueError for absolute ones, `..` and control characters."""
    parts = PurePosixPath(name.replace("\\", "/")).parts if isinstance(name, str) else ()
    drive = bool(parts) and len(parts[0]) == 2 and parts[0][1] == ":"
    if not parts or parts[0] == "/" or drive or ".." in parts or any(ord(c) < 32 for c in name):
        raise ValueError(f"{what} {name!r} is not allowed: names are relative, without '..' or control characters")
    return name


def _class_name(name: Any) -> str:
    if not isinstance(name, str) or not name.strip() or len(name) > 100 or any(ord(c) < 32 for c in name):
        raise ValueError(f"a class name is text of 1 to 100 printable characters, got {name!r}")
    return name.strip()


def _person(who: Any) -> str:
    if not isinstance(who, str) or not who.strip() or len(who) > 100 or any(ord(c) < 32 for c in who):
        raise ValueError(f"a person's name is text of 1 to 100 printable characters, got {who!r}")
    return who.strip()


def _box(thing: Any, where: str, size: tuple[int, int] | None) -> list[float]:
    """Four finite numbers, cut to the image (0 is always its edge; height, width if known), 1 px or more a side."""
    numbers = thing if isinstance(thing, Sequence) and not isinstance(thing, str) else ()
    plain = [not isinstance(v, bool) and isinstance(v, (int, float, np.integer, np.floating)) for v in numbers]
    if len(numbers) != 4 or not all(plain) or not all(math.isfinite(v) for v in numbers):
        raise ValueError(f"{where}: a box is four finite numbers x1, y1, x2, y2, got {thing!r}")
    x1, y1, x2, y2 = (float(v) for v in numbers)
    if x2 <= x1 or y2 <= y1:
        raise ValueError(f"{where}: box {list(numbers)} is inverted or without area; x1 < x2 and y1 < y2 are needed")
    height, width = size or (math.inf, math.inf)
    inside = [max(x1, 0.0), max(y1, 0.0), min(x2, width), min(y2, height)]
    if inside[2] - inside[0] < 1 or inside[3] - inside[1] < 1:
        edge = "" if size is None else f", which is {size[0]} x {size[1]} (height x width)"
        raise ValueError(f"{where}: box {list(numbers)} has less than 1 pixel a side inside the image{edge}")
    return inside


def checked_label(
    label: Any, task: str, classes: Sequence[str], where: str, size: tuple[int, int] | None = None
) -> Any:
    """The label as it is stored: a class name, or a list of boxes cut to the image of `size` (height, width).

    ValueError that begins with `where` for an unknown class, a box that is not finite, inverted, outside or too small.
    """
    allowed = f"allowed are {', '.join(classes)}"
    if task == "classes":
        if label not in classes or not isinstance(label, str):
            raise ValueError(f"{where}: {label!r} is no class; {allowed}")
        return label
    if not isinstance(label, (list, tuple)):
        raise ValueError(f"{where}: a list of {{'class', 'box'}} is needed, got {label!r}")
    out = []
    for i, thing in enumerate(label):
        if not isinstance(thing, Mapping) or set(thing) != {"class", "box"}:
            raise ValueError(f"{where}: box {i} must have 'class' and 'box' and nothing else, got {thing!r}")
        if not isinstance(thing["class"], str) or thing["class"] not in classes:
            raise ValueError(f"{where}: box {i} has the class {thing['class']!r}; {allowed}")
        out.append({"class": thing["class"], "box": _box(thing["box"], where, size)})
    return out


class Store:
    """The questions, classes and actions of one labelling task in one SQLite file (WAL mode, synchronous=FULL).

    classes: names, in the order of their keys; None takes those of an existing file. New names are added to an existing
    file; one that was given before and is missing now is a ValueError, as is another task or a damaged file. An
    accepted action is on disk when the call returns. Any number of threads and processes may work in the file, on one
    machine: SQLite's WAL mode does not work on network drives. Whoever copies the file while it is open must copy the
    `-wal` file beside it too. lease_minutes: how long an image stays with the person who got it. clock: seconds since
    1970, UTC.
    """

    def __init__(
        self,
        path: str | Path,
        classes: Sequence[str] | None = None,
        task: str = "classes",
        lease_minutes: float = 30,
        clock: Callable[[], float] = time.time,
    ):
        if task not in TASKS:
            raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
        if isinstance(classes, str):
            raise ValueError(f"classes must be a list of names, got the text {classes!r}")
        if not lease_minutes > 0 or not math.isfinite(lease_minutes):
            raise ValueError(f"lease_minutes must be above 0, got {lease_minutes!r}")
        self.path, self.task, self.lease_seconds, self._clock = Path(path), task, 60.0 * lease_minutes, clock
        self._lock, self._connection, self._process = threading.RLock(), None, 0
        self._abandoned: list[sqlite3.Connection] = []
        names = None if classes is None else [_class_name(name) for name in classes]
        if names is not None and (not names or len(set(names)) != len(names)):
            raise ValueError(f"classes must be one or more different names, got {list(classes)}")
        new = not self.path.exists() or self.path.stat().st_size == 0
        if new and names is None:
            raise ValueError(f"{self.path} does not exist: classes are needed to make it")
        try:
            if not new:
                self._check_file()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._open(names)
        except sqlite3.OperationalError as error:  # locked, read-only, a full disk: nothing wrong with the file
            self.close()
            raise ValueError(f"{self.path} cannot be opened: {error}") from None
        except sqlite3.DatabaseError as error:
            self.close()
            raise self._damaged(error) from None
        except BaseException:
            self.close()
            raise

    # --- the file

    def _damaged(self, error: object) -> ValueError:
        return ValueError(
            f"{self.path} is damaged or no labelling store: {error}; nothing was written to it. "
            "Move it away, or put a copy in its place"
        )

    def _check_file(self) -> None:
        """Read the whole file once, without a right to write, before anything is written."""
        with open(self.path, "rb") as file:
            if file.read(16) != b"SQLite format 3\0":
                raise self._damaged("it does not begin as an SQLite file does")
        look = sqlite3.connect(f"{self.path.absolute().as_uri()}?mode=ro", uri=True, timeout=30)
        try:
            found = look.execute("PRAGMA quick_check(1)").fetchone()[0]
            if found != "ok":
                raise self._damaged(found)
            tables = look.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
            if tables and look.execute("PRAGMA application_id").fetchone()[0] != _APPLICATION:
                raise self._damaged("it is the file of another program")
        finally:
            look.close()

    def _db(self) -> sqlite3.Connection:
        """This process' connection: a fork must not use its parent's."""
        if self._connection is None or self._process != os.getpid():
            if self._connection is not None:
                self._abandoned.append(self._connection)  # closing it here would drop the parent's file locks
            self._connection = sqlite3.connect(self.path, timeout=60, isolation_level=None, check_same_thread=False)
            self._connection.row_factory = sqlite3.Row
            self._connection.execute("PRAGMA synchronous=FULL")
            self._process = os.getpid()
        return self._connection

    @contextlib.contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """One transaction that nobody else writes beside; committed, and flushed to disk, at the end."""
        with self._lock:
            db = self._db()
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
            except BaseException:
                db.execute("ROLLBACK")
                raise
            db.execute("COMMIT")

    def _rows(self, query: str, *values: Any) -> list[sqlite3.Row]:
        with self._lock:
            return self._db().execute(query, values).fetchall()

    def _open(self, names: list[str] | None) -> None:
        self._use_wal()
        with self._writing() as db:
            if not db.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchone():
                if names is None:
                    raise ValueError(f"{self.path} is empty: classes are needed to make it")
                for statement in _SCHEMA.replace("; END;", "\0END;").split(";\n"):
                    if statement.strip():
                        db.execute(statement.replace("\0", "; "))
                db.execute(f"PRAGMA application_id={_APPLICATION}")
                secret = secrets.token_hex(16)
                facts = {"format": str(_FORMAT), "task": self.task, "made": self._now(), "secret": secret}
                db.executemany("INSERT INTO facts VALUES (?, ?)", facts.items())
            facts = dict(db.execute("SELECT name, value FROM facts").fetchall())
            if facts.get("format") != str(_FORMAT):
                raise ValueError(f"{self.path} has the format {facts.get('format')!r}; this version reads {_FORMAT}")
            if facts["task"] != self.task:
                raise ValueError(f"{self.path} holds the task {facts['task']!r}, got {self.task!r}; use another file")
            self.secret = bytes.fromhex(facts["secret"])  # the page names images by it
            if names is None:
                return
            known = db.execute("SELECT name, who FROM classes ORDER BY place").fetchall()
            gone = [row["name"] for row in known if row["who"] is None and row["name"] not in names]
            if gone:
                raise ValueError(
                    f"{self.path} has the class {gone[0]!r}, which {names} leaves out; classes can be added, not "
                    f"removed: give at least {', '.join(row['name'] for row in known if row['who'] is None)}"
                )
            there = {row["name"] for row in known}
            for name in names:
                if name not in there:
                    db.execute("INSERT INTO classes (name, who, at) VALUES (?, NULL, ?)", (name, self._now()))

    def _use_wal(self) -> None:
        """Switch the file to WAL mode; SQLite does not wait by itself while another process does the same."""
        patience = time.monotonic() + 30
        while True:
            try:
                with self._lock:
                    mode = self._db().execute("PRAGMA journal_mode=WAL").fetchone()[0]
                break
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > patience:
                    raise
                time.sleep(0.02)
        if mode != "wal":
            raise ValueError(f"{self.path}: the drive does not allow SQLite's WAL mode (it says {mode!r}); use another")

    def close(self) -> None:
        """Let go of the file; nothing is pending."""
        with self._lock:
            if self._connection is not None and self._process == os.getpid():
                self._connection.close()
            self._connection = None

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _now(self) -> str:
        return datetime.fromtimestamp(self._clock(), timezone.utc).isoformat(timespec="milliseconds")

    # --- classes and questions

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in the order of their keys; those found on the way come last."""
        return tuple(row["name"] for row in self._rows("SELECT name FROM classes ORDER BY place"))

    def add_class(self, name: str, who: str = "") -> bool:
        """A class that nobody thought of; False if it is there already."""
        name, who = _class_name(name), _person(who) if who else ""
        with self._writing() as db:
            if db.execute("SELECT 1 FROM classes WHERE name = ?", (name,)).fetchone():
                return False
            db.execute("INSERT INTO classes (name, who, at) VALUES (?, ?, ?)", (name, who, self._now()))
        return True

    def queue(self, questions: Iterable[Question]) -> int:
        """Put questions at the end of the queue, the most wanted first; returns how many are new.

        One whose (image, cycle) is in the file already changes nothing.
        """
        rows, classes = [], self.classes
        for q in questions:
            suggestion = None
            if q.suggestion is not None:
                where = f"image {q.image!r}, suggestion"
                suggestion = json.dumps(checked_label(q.suggestion, self.task, classes, where))
            score = None if q.score is None else float(q.score)
            rows.append((q.image, int(q.cycle), q.file, q.strategy, score, q.model, suggestion))
        new = 0
        with self._writing() as db:
            place = db.execute("SELECT coalesce(max(place), 0) FROM questions").fetchone()[0]
            for row in rows:
                place += 1
                new += db.execute(
                    "INSERT OR IGNORE INTO questions (image, cycle, file, strategy, score, model, suggestion, place) "
                    "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                    (*row, place),
                ).rowcount
        return new

    # --- asking and answering

    def next(self, who: str, skipped: bool = False) -> Question | None:
        """The best waiting question, leased to this person, or the one they hold already; None if nothing waits.

        An image that somebody else holds is not given, in whatever cycle it is asked; a lease ends after
        `lease_minutes`. skipped: also those that this person skipped, after all others.
        """
        who, now = _person(who), self._clock()
        with self._writing() as db:
            row = self._held(db, who)
            if row is None:
                row = db.execute(
                    "SELECT q.*, EXISTS (SELECT 1 FROM actions a WHERE a.who = ? AND a.action = 'skip' "
                    f"    AND a.image = q.image AND a.cycle = q.cycle AND a.{_STANDING}) AS mine "
                    "FROM questions q WHERE q.state = 'waiting' AND (q.holder IS NULL OR q.until <= ?) "
                    "AND NOT EXISTS (SELECT 1 FROM questions o WHERE o.image = q.image AND o.id <> q.id "
                    "    AND o.state = 'waiting' AND o.holder IS NOT NULL AND o.until > ?) "
                    + ("ORDER BY mine, q.place, q.id LIMIT 1" if skipped else "AND NOT mine ORDER BY q.place LIMIT 1"),
                    (who, now, now),
                ).fetchone()
                if row is None:
                    return None
                self._lease(db, row["id"], who, now)
            db.execute("UPDATE questions SET until = ? WHERE id = ?", (now + self.lease_seconds, row["id"]))
        return _question(row)

    def held(self, who: str) -> Question | None:
        """What this person is looking at; None if nothing, or if somebody else has taken it since the lease ended."""
        with self._lock:
            row = self._held(self._db(), _person(who))
        return None if row is None else _question(row)

    def held_seconds(self, who: str) -> float:
        """Seconds since this person got the image they hold; 0 without one."""
        with self._lock:
            row = self._held(self._db(), _person(who))
        return 0.0 if row is None else max(0.0, self._clock() - row["since"])

    @staticmethod
    def _held(db: sqlite3.Connection, who: str) -> sqlite3.Row | None:
        return db.execute("SELECT * FROM questions WHERE holder = ? AND state = 'waiting'", (who,)).fetchone()

    def _lease(self, db: sqlite3.Connection, question: int, who: str, now: float) -> None:
        db.execute(
            "UPDATE questions SET holder = ?, since = ?, until = ? WHERE id = ?",
            (who, now, now + self.lease_seconds, question),
        )

    def answer(
        self,
        who: str,
        image: str,
        label: Any,
        seconds: float,
        note: str = "",
        suggestion_shown: bool = False,
        size: tuple[int, int] | None = None,
    ) -> None:
        """The person's label of the image they hold; on disk when this returns.

        size: (height, width) of the image; boxes are cut to it. `NotHeld` if it is not theirs (a lease that has run out
        is good until somebody else has the image); ValueError for a label that is not allowed. Nothing is stored then.
        """
        label = checked_label(label, self.task, self.classes, f"image {image!r}", size)
        self._act(who, image, "label", json.dumps(label), seconds, note, suggestion_shown)

    def skip(self, who: str, image: str, seconds: float = 0.0, note: str = "") -> None:
        """Not now: to the end of the queue, for others (and for `next(skipped=True)`)."""
        self._act(who, image, "skip", None, seconds, note, False)

    def unknown(
        self, who: str, image: str, seconds: float = 0.0, note: str = "", suggestion_shown: bool = False
    ) -> None:
        """Nobody can tell: out of the queue, without a label."""
        self._act(who, image, "unknown", None, seconds, note, suggestion_shown)

    def _act(self, who, image, action, label, seconds, note, shown) -> None:
        who = _person(who)
        if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 <= seconds < math.inf:
            raise ValueError(f"image {image!r}: seconds must be a number from 0 up, got {seconds!r}")
        if not isinstance(note, str) or len(note) > 10_000:
            raise ValueError(f"image {image!r}: a note is text of at most 10,000 characters, got {note!r:.60}")
        with self._writing() as db:
            row = self._held(db, who)
            if row is None or row["image"] != image:
                holds = "nothing" if row is None else repr(row["image"])
                raise NotHeld(f"{who!r} cannot {action} image {image!r} of {self.path}: {who!r} holds {holds}")
            self._append(
                db, who, row, action, label=label, suggestion_shown=int(shown), seconds=float(seconds), note=note
            )
            state = "waiting" if action == "skip" else {"label": "labelled"}.get(action, action)
            db.execute(
                "UPDATE questions SET state = ?, holder = NULL, since = NULL, until = NULL WHERE id = ?",
                (state, row["id"]),
            )
            if action == "skip":
                db.execute(
                    "UPDATE questions SET place = (SELECT max(place) + 1 FROM questions) WHERE id = ?", (row["id"],)
                )

    def _append(self, db: sqlite3.Connection, who: str, row: sqlite3.Row, action: str, **more: Any) -> None:
        told = {key: row[key] for key in ("image", "cycle", "strategy", "score", "model", "suggestion")}
        entry = {"at": self._now(), "who": who, **told, "action": action, **more}
        marks = ", ".join("?" * len(entry))
        db.execute(f"INSERT INTO actions ({', '.join(entry)}) VALUES ({marks})", tuple(entry.values()))

    def undo(self, who: str) -> Question | None:
        """Take back this person's latest standing action and give them its image again; None if there is none.

        What they held goes back to its place in the queue. A skip is passed over if somebody else has the image by now.
        """
        who, now = _person(who), self._clock()
        with self._writing() as db:
            row = db.execute(
                "SELECT a.id AS action_id, q.* FROM actions a JOIN questions q USING (image, cycle) "
                f"WHERE a.who = ? AND a.action <> 'undo' AND a.{_STANDING} AND (a.action <> 'skip' OR "
                "    q.state = 'waiting' AND (q.holder IS NULL OR q.holder = ? OR q.until <= ?)) "
                "AND NOT EXISTS (SELECT 1 FROM questions o WHERE o.image = q.image AND o.id <> q.id "
                "    AND o.state = 'waiting' AND o.holder <> ? AND o.until > ?) ORDER BY a.id DESC LIMIT 1",
                (who, who, now, who, now),
            ).fetchone()
            if row is None:
                return None
            self._append(db, who, row, "undo", undoes=row["action_id"])
            db.execute("UPDATE questions SET holder = NULL, since = NULL, until = NULL WHERE holder = ?", (who,))
            db.execute(
                "UPDATE questions SET state = 'waiting', place = (SELECT min(place) - 1 FROM questions) WHERE id = ?",
                (row["id"],),
            )
            self._lease(db, row["id"], who, now)
        return _question(row)

    # --- reading

    def taken_back(self, who: str, question: Question) -> Any:
        """The label of this question that the person took back, if they said nothing about it since; else None."""
        found = self._rows(
            "SELECT u.label FROM actions a LEFT JOIN actions u ON u.id = a.undoes WHERE a.who = ? AND a.image = ? "
            "AND a.cycle = ? ORDER BY a.id DESC LIMIT 1",
            _person(who),
            question.image,
            question.cycle,
        )
        return json.loads(found[0]["label"]) if found and found[0]["label"] is not None else None

    def labels(self) -> dict[str, Any]:
        """The last standing label of each image: {image: class name, or list of boxes}."""
        found = self._rows(f"SELECT image, label FROM actions WHERE action = 'label' AND {_STANDING} ORDER BY id")
        return {row["image"]: json.loads(row["label"]) for row in found}

    def progress(self) -> dict[str, int]:
        """Counts of questions: all, labelled, unknown, waiting; of the waiting ones, held and skipped by somebody."""
        row = self._rows(
            "SELECT count(*) AS 'all', coalesce(sum(state = 'labelled'), 0) AS labelled, "
            "coalesce(sum(state = 'unknown'), 0) AS unknown, coalesce(sum(state = 'waiting'), 0) AS waiting, "
            "coalesce(sum(state = 'waiting' AND holder IS NOT NULL AND until > ?), 0) AS held, "
            "coalesce(sum(state = 'waiting' AND EXISTS (SELECT 1 FROM actions a WHERE a.action = 'skip' "
            f"AND a.image = questions.image AND a.cycle = questions.cycle AND a.{_STANDING})), 0) AS skipped "
            "FROM questions",
            self._clock(),
        )[0]
        return dict(row)

    def history(self) -> pd.DataFrame:
        """Every action in order, columns `HISTORY`; labels as in `labels`, `undoes` the id that an undo takes back."""
        import pandas as pd

        found = [dict(row) for row in self._rows("SELECT * FROM actions ORDER BY id")]
        taken_back = {row["undoes"] for row in found}
        for row in found:
            row.update(when=row["at"], suggestion_shown=bool(row["suggestion_shown"]), undone=row["id"] in taken_back)
            for key in ("label", "suggestion"):
                row[key] = None if row[key] is None else json.loads(row[key])
        frame = pd.DataFrame({name: pd.Series([row[name] for row in found], dtype=object) for name in HISTORY})
        kinds = {"id": int, "cycle": int, "score": float, "seconds": float, "undoes": "Int64"}
        return frame.astype({**kinds, "suggestion_shown": bool, "undone": bool})


def _question(row: sqlite3.Row) -> Question:
    suggestion = None if row["suggestion"] is None else json.loads(row["suggestion"])
    return Question(
        row["image"], row["file"], row["strategy"], row["score"], row["model"], suggestion, int(row["cycle"])
    )


# ------------------------------------------------------------------------------------------- persons for headless runs


class Replay:
    """A person who answers as a recorded session did: `Replay(store.history())`.

    The last standing answer of each (image, cycle) counts, or else that of the image in any cycle; its seconds and note
    are recorded again.
    """

    def __init__(self, history: pd.DataFrame):
        missing = {"image", "cycle", "action", "label", "seconds", "note", "suggestion_shown", "undone"} - set(history)
        if missing:
            raise ValueError(f"a history has the columns {', '.join(HISTORY)}; missing {', '.join(sorted(missing))}")
        self._said: dict[Any, Mapping[str, Any]] = {}
        for row in history.to_dict("records"):
            if row["action"] in ("label", "unknown") and not row["undone"]:
                self._said[row["image"], int(row["cycle"])] = self._said[row["image"]] = row

    def answer_all(self, store: Store, who: str) -> int:
        """Answer until nothing waits for this person; returns how many. ValueError for an image the history lacks."""

        def reply(question: Question) -> None:
            said = self._said.get((question.image, question.cycle)) or self._said.get(question.image)
            if said is None:
                raise ValueError(f"the replayed history has no answer to image {question.image!r}")
            more = dict(note=said["note"], suggestion_shown=bool(said["suggestion_shown"]))
            if said["action"] == "unknown":
                store.unknown(who, question.image, float(said["seconds"]), **more)
            else:
                store.answer(who, question.image, said["label"], float(said["seconds"]), **more)

        return _answer_all(store, who, reply)


class Simulated:
    """A person who knows the truth and now and then names the wrong class.

    truth: {image: class name, or list of {"class", "box"}}. error: probability in [0, 1] that the class of an image, or
    of each of its boxes, is replaced by another one of the store's, drawn by image, so the order of the questions
    changes nothing. The seconds are made up: a look at the image, and the drawing of each box.
    """

    def __init__(
        self,
        truth: Mapping[str, Any],
        error: float = 0.0,
        seconds_per_image: float = 2.0,
        seconds_per_box: float = 7.0,
        seed: int = 0,
    ):
        if not 0 <= error <= 1:
            raise ValueError(f"error is a probability in [0, 1], got {error!r}")
        self.truth, self.error, self.seed = truth, error, seed
        self.seconds_per_image, self.seconds_per_box = seconds_per_image, seconds_per_box

    def label(self, image: str, task: str, classes: Sequence[str]) -> Any:
        """What this person says about an image; the same each time."""
        if image not in self.truth:
            raise ValueError(f"the truth has no image {image!r}")
        rng, truth = rng_for(self.seed, "annotator", image), self.truth[image]

        def named(name: str) -> str:
            slip, pick = rng.random(), rng.random()  # two draws in any case: the next box' do not depend on it
            others = [c for c in classes if c != name]
            return others[int(pick * len(others))] if slip < self.error and others else name

        return named(truth) if task == "classes" else [{**thing, "class": named(thing["class"])} for thing in truth]

    def answer_all(self, store: Store, who: str) -> int:
        """Answer until nothing waits for this person; returns how many. ValueError for an image the truth lacks."""

        def reply(question: Question) -> None:
            label = self.label(question.image, store.task, store.classes)
            boxes = len(label) if store.task == "boxes" else 0
            store.answer(who, question.image, label, self.seconds_per_image + boxes * self.seconds_per_box)

        return _answer_all(store, who, reply)


def _answer_all(store: Store, who: str, reply: Callable[[Question], None]) -> int:
    answered = 0
    while (question := store.next(who)) is not None:
        reply(question)
        answered += 1
    return answered


# -------------------------------------------------------------------------------------------------------------- images

Pictures = Mapping[str, Any]  # id -> path of a file, or uint8 (H, W, 3)


def find_images(folder: str | Path) -> dict[str, Path]:
    """Every image file below a folder, by its relative path, sorted; hidden ones left out. ValueError if none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"folder {folder} does not exist")
    found = {path.relative_to(folder).as_posix(): path for path in data.find_files(folder, *data.SUFFIXES)}
    if not found:
        raise ValueError(f"folder {folder} holds no image: no {', '.join(data.SUFFIXES)} file in it")
    return found


def read_image(source: str | Path | np.ndarray, name: str = "") -> Image.Image:
    """An image to look at, upright, 8-bit RGB. name: what to call an array in an error.

    ValueError that names the file if it is missing, no image, broken, has 16 bits or more than MAX_PIXELS pixels; these
    are counted before the pixels are decoded.
    """
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3 or 0 in source.shape:
            raise ValueError(f"image {name!r} must be uint8 (H, W, 3), got {source.dtype} {source.shape}")
        return Image.fromarray(source)
    path = Path(source)
    if not path.is_file():
        raise ValueError(f"image {path} does not exist or is no file")
    file = data.image_info(path)
    height, width = file.size
    if height * width > MAX_PIXELS:
        raise ValueError(
            f"image {path} has {height} x {width} pixels (height x width); at most {MAX_PIXELS:,} are allowed"
        )
    return data.read_upright(file)


@dataclass(frozen=True)
class _View:
    """An image as the page shows it: a data URL (no file, so no name); original and shown (height, width)."""

    url: str
    size: tuple[int, int]
    shown: tuple[int, int]


def _view(source: Any, name: str, least: int, most: int) -> _View:
    """Re-encoded, so that neither name nor metadata travel; the longer side between `least` and `most` pixels."""
    image = read_image(source, name)
    longer = max(image.size)
    factor = least / longer if longer < least else min(1.0, most / longer)
    shown = image
    if factor != 1:
        size = tuple(max(1, round(side * factor)) for side in image.size)
        shown = image.resize(size, Image.Resampling.BICUBIC if factor > 1 else Image.Resampling.LANCZOS)
    file = io.BytesIO()
    shown.save(file, "JPEG", quality=92, subsampling=0)
    url = "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
    return _View(url, (image.height, image.width), (shown.height, shown.width))


# ------------------------------------------------------------------------------------------------------------ the page

KEYS = "1234567890" + "".join(c for c in string.ascii_lowercase if c not in "cdeisu")  # those six do something else
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#7a5195", "#8c564b", "#2f4b7c")

_STYLE = """
<style>
.gradio-container { padding: 0 !important; }
.gradio-container > .main > .wrap { padding: 0 !important; }
.gradio-container main { max-width: 1600px !important; width: 100% !important; padding: 10px 18px !important;
    margin: 0 auto !important; }
.gradio-container main > .column { gap: 8px; }
#fedal-bar .html-container, #fedal-about .html-container, #fedal-message .html-container,
#fedal-picture .html-container, #fedal-hints .html-container, #fedal-left .html-container { padding: 0 !important; }
.gradio-container footer, .fedal-hidden { display: none !important; }
#fedal-bar { font-size: 14px; }
#fedal-bar .track { height: 6px; border-radius: 3px; background: var(--border-color-primary); overflow: hidden; }
#fedal-bar .track div { height: 100%; background: #009e73; transition: width .2s; }
#fedal-bar .line { display: flex; justify-content: space-between; gap: 16px; padding-top: 5px;
    opacity: .8; }
#fedal-bar b { color: var(--body-text-color); font-weight: 600; }
#fedal-picture .frame { display: flex; justify-content: center; align-items: center; height: calc(100vh - 76px);
    min-height: 280px; background: var(--background-fill-secondary); border-radius: 8px; overflow: hidden; }
#fedal-picture img { width: 100%; height: 100%; object-fit: contain; }
#fedal-picture .broken { padding: 24px; max-width: 60ch; }
#fedal-boxes { margin: 0 auto; border: 0; box-shadow: none; }
#fedal-boxes .canvas-control { border-top: 0; }
#fedal-boxes .annotator-container { outline: 0; }
#fedal-boxes button[aria-label^="Rotate"], #fedal-boxes label.float { display: none; }
#fedal-message { min-height: 0; }
#fedal-message .say { padding: 7px 11px; border-radius: 6px; background: #fdebd0; color: #6b3d00; font-size: 14px; }
#fedal-about { font-size: 13px; overflow-wrap: anywhere; opacity: .75; }
#fedal-classes { padding: 0; }
#fedal-classes .wrap { display: flex; flex-direction: column; gap: 5px; max-height: 46vh; overflow-y: auto;
    flex-wrap: nowrap; }
#fedal-classes label { width: 100%; padding: 8px 10px; border-width: 1.5px; }
#fedal-classes label span { overflow-wrap: anywhere; }
#fedal-classes label input { display: none; }
#fedal-classes label.selected { border-color: #0072b2; background: #0072b2; }
#fedal-classes label.selected span { color: #fff; }
#fedal-classes label::before, #fedal-hints kbd { display: inline-block; min-width: 22px; padding: 1px 5px;
    margin-right: 8px; border: 1px solid #9994; border-bottom-width: 2px; border-radius: 5px; font: 12px ui-monospace,
    monospace; text-align: center; color: var(--body-text-color); background: var(--background-fill-primary); }
#fedal-work button[id] { justify-content: flex-start; }
#fedal-submit::before, #fedal-undo::before, #fedal-skip::before, #fedal-unknown::before { display: inline-block;
    min-width: 22px; padding: 1px 5px; margin-right: 8px; border: 1px solid #9996; border-bottom-width: 2px;
    border-radius: 5px; font: 12px ui-monospace, monospace; }
#fedal-submit::before { content: "Enter"; }
#fedal-undo::before { content: "U"; }
#fedal-skip::before { content: "S"; }
#fedal-unknown::before { content: "?"; }
#fedal-submit, #fedal-submit:hover { background: #0072b2; color: #fff; border: 0; }
#fedal-side { gap: 10px; }
#fedal-small { gap: 5px; }
#fedal-small button { padding: 5px 10px; font-size: 14px; }
#fedal-begin { background: #0072b2; color: #fff; }
#fedal-hints { font-size: 13px; opacity: .75; }
#fedal-hints span { display: inline-block; margin-right: 12px; }
#fedal-hints kbd { margin-right: 5px; }
#fedal-start, #fedal-done { max-width: 460px; margin: 12vh auto 0; }
</style>
"""

# In the browser: keys, the time that a person spends, the name that a reload keeps, classes of boxes.
_SCRIPT = """
if (!window.fedal) {
  const find = (id) => document.getElementById(id);
  const fedal = window.fedal = { keys: KEYS, boxes: BOXES, busy: 0, spent: 0, from: null, shownKey: null };
  const memory = (() => { try { localStorage.getItem('fedal'); return localStorage; } catch (e) { return null; } })();
  fedal.remember = (who) => { if (memory) memory.setItem('fedal-who', who); return who; };
  fedal.who = () => (memory && memory.getItem('fedal-who')) || '';

  const stop = () => { if (fedal.from !== null) fedal.spent += performance.now() - fedal.from; fedal.from = null; };
  document.addEventListener('visibilitychange', () => {
    if (document.hidden) stop(); else if (fedal.shownKey) fedal.from = performance.now();
  });
  window.addEventListener('pagehide', () => {
    stop();
    try { sessionStorage.setItem('fedal-spent', JSON.stringify([fedal.shownKey, fedal.spent])); } catch (e) {}
  });
  fedal.shown = (key) => {  // the image that belongs to the key is on the screen
    fedal.busy = 0;
    if (key === fedal.shownKey) return;
    let before = null;
    try { before = JSON.parse(sessionStorage.getItem('fedal-spent')); } catch (e) {}
    fedal.shownKey = key;
    fedal.spent = before && before[0] === key ? before[1] : 0;
    fedal.from = document.hidden ? null : performance.now();
    fedal.touched = false;
    if (document.activeElement && document.activeElement.blur) document.activeElement.blur();
  };
  fedal.seconds = () => {
    stop();
    fedal.from = performance.now();
    return fedal.spent / 1000;
  };

  fedal.plain = (value) => JSON.stringify(!value || !value.boxes ? null : value.boxes.map((b) => {
    const j = b.toJSON ? b.toJSON() : b, f = j.scaleFactor || 1;
    return { label: j.label || '', box: [j.xmin / f, j.ymin / f, j.xmax / f, j.ymax / f] };
  }));
  fedal.colour = () => {  // of the chosen class
    const at = [...document.querySelectorAll('#fedal-classes input[type=radio]')].findIndex((c) => c.checked);
    return COLOURS[Math.max(at, 0) % COLOURS.length];
  };
  const rgb = (hex) => `rgb(${[1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16)).join(', ')})`;
  // Which box is selected is known to the canvas alone: it strokes that one with the thicker line, and the boxes in
  // reverse order.
  fedal.marked = -1;
  const watch = (canvas) => {
    const pen = canvas.getContext('2d');
    if (pen.fedal) return;
    pen.fedal = true;
    let count = 0;
    const { clearRect, rect, stroke } = pen;
    pen.clearRect = (...a) => { count = 0; fedal.marked = -1; return clearRect.apply(pen, a); };
    pen.rect = (...a) => { count += 1; return rect.apply(pen, a); };
    pen.stroke = (...a) => { if (pen.lineWidth === 4) fedal.marked = count - 1; return stroke.apply(pen, a); };
  };
  document.addEventListener('pointerdown', (event) => {
    fedal.down = true;
    if (event.target.matches('#fedal-boxes canvas')) { watch(event.target); fedal.touched = true; }
  }, true);
  for (const end of ['pointerup', 'pointercancel'])
    document.addEventListener(end, () => { fedal.down = false; }, true);

  fedal.name = (value, chosen, relabel) => {  // boxes without a class get the chosen one; so does a selected box
    const same = { __type__: 'update' };
    if (!value || !value.boxes || !chosen || fedal.down) return same;
    const moving = document.querySelector('#fedal-boxes button[aria-label="Drag boxes"].selected');
    const picked = relabel && moving && fedal.marked >= 0 ? value.boxes.length - 1 - fedal.marked : -1;
    let changed = false;
    const boxes = value.boxes.map((b, i) => {
      const box = b.toJSON ? b.toJSON() : b;
      if (box.label === chosen || (box.label && i !== picked)) return box;
      changed = true;
      return { ...box, label: chosen, color: rgb(fedal.colour()) };
    });
    return changed ? { ...value, boxes } : same;
  };

  const typing = (t) => t && t.closest && t.closest(
    'textarea, select, [contenteditable=""], [contenteditable="true"], input:not([type=radio]):not([type=checkbox])');
  const press = (id) => { const b = find(id); if (b && b.offsetParent !== null) { b.click(); return true; } };
  document.addEventListener('keydown', (event) => {
    const work = find('fedal-work');
    if (!work || work.offsetParent === null || typing(event.target) || event.isComposing) return;
    const key = event.key, low = key.toLowerCase(), ctrl = event.ctrlKey || event.metaKey;
    const take = () => { event.preventDefault(); event.stopPropagation(); };
    if (event.altKey || (ctrl && low !== 'z')) return;
    if (event.target.closest('button') && !event.target.closest('#fedal-work') && key === 'Enter') return;
    const job = { enter: 'fedal-submit', arrowright: 'fedal-submit', u: 'fedal-undo', s: 'fedal-skip',
                  i: 'fedal-unknown', '?': 'fedal-unknown' }[low];
    if (job || ctrl) {
      take();
      if (event.repeat || Date.now() - fedal.busy < 5000) return;
      press(ctrl ? 'fedal-undo' : job);
      return;
    }
    const place = fedal.keys.indexOf(low), choices = document.querySelectorAll('#fedal-classes input[type=radio]');
    if (low.length === 1 && place >= 0 && place < choices.length) {
      take();
      if (!event.repeat && Date.now() - fedal.busy >= 5000) { choices[place].click(); choices[place].blur(); }
      return;
    }
    const canvas = fedal.boxes && document.querySelector('#fedal-boxes .annotator-container');
    const sent = low === 'backspace' ? 'Delete' : key;
    if (canvas && ['c', 'd', 'Delete', ' '].includes(sent) && (event.target !== canvas || low !== sent.toLowerCase()
        || sent === 'Delete')) {
      if (event.fedal) return;
      take();
      if (sent === 'Delete' && !fedal.touched) return;  // nothing on this image was selected or drawn yet
      canvas.focus();
      const forward = new KeyboardEvent('keydown', { key: sent, bubbles: true, cancelable: true });
      forward.fedal = true;
      canvas.dispatchEvent(forward);
    }
  }, true);
}
"""


def need_gradio() -> None:
    """ImportError that says what to install, where the page's packages are missing."""
    for name in ("gradio", "gradio_image_annotation"):
        if importlib.util.find_spec(name) is None:
            raise ImportError(f"the labelling page needs {name}: pip install 'fedal[label]'")


def _gradio() -> Any:
    """The gradio module, its telemetry off."""
    need_gradio()
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    import gradio

    return gradio


def _bar(progress: Mapping[str, int], who: str) -> str:
    done = progress["labelled"] + progress["unknown"]
    share = 100 * done / progress["all"] if progress["all"] else 0
    said = [f"<b>{progress['labelled']:,}</b> of <b>{progress['all']:,}</b> labelled"]
    said += [
        f"{progress[key]:,} {word}" for key, word in (("unknown", "unknown"), ("skipped", "skipped")) if progress[key]
    ]
    person = f"<span>{html.escape(who)}</span>" if who else ""
    return (
        f"<div class='track'><div style='width:{share:.2f}%'></div></div>"
        f"<div class='line'><span>{' · '.join(said)}</span>{person}</div>"
    )


def _about(question: Question, show_suggestion: bool, show_names: bool) -> str:
    """Who asks, and why; the suggestion and the file's name only if they are to be seen."""
    said = []
    if question.strategy:
        said.append(html.escape(question.strategy))
    if question.score is not None:
        said.append(f"score {question.score:.4g}")
    if question.model:
        said.append(html.escape(question.model))
    if question.cycle:
        said.append(f"cycle {question.cycle}")
    lines = [" · ".join(said)] if said else []
    if show_names:
        lines.append(html.escape(question.file or question.image))
    if show_suggestion and isinstance(question.suggestion, str):
        lines.append(f"<span class='suggestion'>suggested: <b>{html.escape(question.suggestion)}</b></span>")
    return "<br>".join(lines)


def _say(text: str) -> str:
    return f"<div class='say'>{html.escape(text)}</div>" if text else ""


class _Desk:
    """What the page does with a click, apart from Gradio: plain values in, the parts of the screen that change out.

    A screen is {part: value}; parts are stage ("start", "work" or "done"), key, picture, classes, chosen, about, note,
    message, bar, left.
    """

    def __init__(self, store: Store, images: Pictures, show_suggestion: bool, show_names: bool):
        self.store, self.images = store, images
        self.show_suggestion, self.show_names = show_suggestion, show_names
        self._again: set[str] = set()  # who looks at what they skipped
        self._sizes: dict[str, tuple[tuple[int, int], tuple[int, int]]] = {}  # key -> size, shown of its view

    def key(self, question: Question) -> str:
        """Names a question in the browser without telling its image's name; the same after a restart."""
        text = f"{question.image}\0{question.cycle}".encode()
        return hmac.new(self.store.secret, text, hashlib.sha256).hexdigest()[:24]

    def view(self, question: Question) -> _View:
        """The picture of a question; ValueError (see `read_image`) if it cannot be shown."""
        if question.image not in self.images:
            raise ValueError(f"image {question.image!r} is queued in {self.store.path}, but not among the images given")
        least, most = (700, 1600) if self.store.task == "classes" else (900, 2000)
        view = _view(self.images[question.image], question.image, least, most)
        self._sizes[self.key(question)] = view.size, view.shown
        return view

    def start(self, who: str, message: str = "") -> dict[str, Any]:
        """The screen of a person who comes, or comes back: what they hold, or the next question."""
        try:
            who = _person(who)
        except ValueError as error:
            return {"stage": "start", "message": str(error) if who else "", "bar": _bar(self.store.progress(), "")}
        question = self.store.next(who, who in self._again)
        bar = _bar(self.store.progress(), who)
        if question is None:
            return {"stage": "done", "who": who, "key": "", "message": message, "bar": bar, "left": self._left(who)}
        screen = {"stage": "work", "who": who, "key": self.key(question), "note": "", "bar": bar, "chosen": None}
        screen["classes"] = self.store.classes
        screen["about"] = _about(question, self.show_suggestion, self.show_names)
        try:
            view = self.view(question)
        except ValueError as error:
            warnings.warn(str(error), stacklevel=2)  # the name is for whoever runs the page
            message = str(error) if self.show_names else "This image cannot be shown: press S or ?."
            return {**screen, "picture": None, "message": message}
        shown: list[dict[str, Any]] = []
        if self.store.task == "boxes":
            if len(screen["classes"]) == 1:
                screen["chosen"] = screen["classes"][0]
            before = self.store.taken_back(who, question)
            if before is None and self.show_suggestion:
                before = question.suggestion
            shown = before or []
        return {**screen, "picture": (view, shown), "message": message}

    def _left(self, who: str) -> str:
        counts = self.store.progress()
        if not counts["waiting"]:
            return "Everything is labelled. Thank you!" if counts["all"] else "The queue is empty."
        said = [f"{counts['held']:,} with somebody else"] if counts["held"] else []
        said += [f"{counts['skipped']:,} skipped"] if counts["skipped"] else []
        return f"Nothing is left for you now ({', '.join(said) or 'others are at work'})."

    def _held(self, who: str, key: str) -> Question | None:
        question = self.store.held(who) if who else None
        return question if question is not None and hmac.compare_digest(self.key(question), str(key)) else None

    def act(
        self, action: str, who: str, key: str, chosen: Any, note: str, seconds: Any, boxes: Any = None
    ) -> dict[str, Any]:
        """Submit, skip or "I don't know" for the image of this key; the next screen, or this one with a message."""
        question = self._held(who, key)
        if question is None:
            return self.start(who, "That image is no longer with you, nothing was stored. This is yours now.")
        spent, most = float(seconds or 0), self.store.held_seconds(who)
        spent = spent if 0 <= spent <= most else most  # no more than since it was handed out
        shown = self.show_suggestion and question.suggestion is not None
        try:
            if action == "skip":
                self.store.skip(who, question.image, spent, note or "")
            elif action == "unknown":
                self.store.unknown(who, question.image, spent, note or "", shown)
            else:
                label, size = self._label(question, chosen, boxes)
                self.store.answer(who, question.image, label, spent, note or "", shown, size)
        except NotHeld:
            return self.start(who, "That image is no longer with you, nothing was stored. This is yours now.")
        except ValueError as error:
            text = str(error)
            return {"message": text if self.show_names else text.replace(repr(question.image), "")}
        return self.start(who)

    def _label(self, question: Question, chosen: Any, boxes: Any) -> tuple[Any, tuple[int, int] | None]:
        """What was chosen or drawn, and the image's (height, width); boxes come in shown pixels."""
        if self.store.task == "classes":
            if not chosen:
                raise ValueError("Choose a class first.")
            return chosen, None
        if self.key(question) not in self._sizes:  # shown before a restart
            self.view(question)
        size, shown = self._sizes[self.key(question)]
        scale = [o / s for o, s in zip(size[::-1] * 2, shown[::-1] * 2, strict=True)]  # x, y, x, y
        label = []
        for thing in json.loads(boxes or "null") or []:
            if not thing["label"]:
                raise ValueError("A box has no class yet: choose one for it.")
            label.append({"class": thing["label"], "box": [v * f for v, f in zip(thing["box"], scale, strict=True)]})
        return label, size

    def undo(self, who: str) -> dict[str, Any]:
        """Take back the person's last action and show its image again."""
        if not who:
            return self.start(who)
        back = self.store.undo(who)
        return self.start(who, "" if back is not None else "There is nothing to take back.")

    def again(self, who: str) -> dict[str, Any]:
        """Also show what this person skipped."""
        self._again.add(who)
        return self.start(who)

    def add_class(self, name: str, who: str) -> dict[str, Any]:
        """A new class, from now on for everybody."""
        try:
            new = self.store.add_class(name, who)
        except ValueError as error:
            return {"message": str(error)}
        message = f"Class {name.strip()!r} added." if new else f"Class {name.strip()!r} is there already."
        return {"classes": self.store.classes, "message": message}


def colour_of(place: int) -> str:
    """#rrggbb of the class at this place, 0 and up; the first ten are told apart with any kind of colour vision."""
    return COLOURS[place % len(COLOURS)]


def _key_style(task: str) -> str:
    """The key of each class on its button; the colour of its boxes beside it."""
    rules = [
        f"#fedal-classes label:nth-of-type({i + 1})::before {{ content: '{key.upper()}'; }}"
        for i, key in enumerate(KEYS)
    ]
    if task == "boxes":
        rules += [
            f"#fedal-classes label:nth-of-type({len(COLOURS)}n+{i + 1}) {{ border-left: 8px solid {colour}; }}"
            for i, colour in enumerate(COLOURS)
        ]
    return "<style>" + "\n".join(rules) + "</style>"


def page(store: Store, images: Pictures | str | Path, show_suggestion: bool = False, show_names: bool = False) -> Any:
    """The labelling page as Gradio Blocks, for any number of people at once.

    images: {id: path of a file, or uint8 (H, W, 3)}, or the folder that the ids are relative to. show_suggestion: the
    model's label is told (classes) or drawn (boxes) before the person answers, which anchors them; off by default.
    show_names: file names, which often contain the class; off by default, and no name is in what the browser gets.
    Launch it with `launch`, which also asks for a token where strangers could come.
    """
    gr = _gradio()
    if isinstance(images, (str, Path)):
        images = find_images(images)
    desk = _Desk(store, images, show_suggestion, show_names)
    drawing = store.task == "boxes"
    script = _SCRIPT.replace("KEYS", json.dumps(KEYS), 1).replace("BOXES", json.dumps(drawing), 1)
    script = script.replace("COLOURS", json.dumps(list(COLOURS)))
    with gr.Blocks(title="Labelling", analytics_enabled=False, fill_width=True) as blocks:
        gr.HTML(_STYLE + _key_style(store.task), js_on_load=script, elem_classes="fedal-hidden")
        bar = gr.HTML(elem_id="fedal-bar")
        who = gr.Textbox(elem_classes="fedal-hidden", show_label=False, container=False)
        key = gr.Textbox(elem_classes="fedal-hidden", show_label=False, container=False)
        seconds = gr.Textbox(elem_classes="fedal-hidden", show_label=False, container=False)
        drawn = gr.Textbox(elem_classes="fedal-hidden", show_label=False, container=False)
        with gr.Column(visible=False, elem_id="fedal-start") as start_panel:
            gr.Markdown("### Who labels?\nYour name is stored with every label.")
            name = gr.Textbox(
                show_label=False, placeholder="Your name", max_lines=1, elem_id="fedal-name", container=False
            )
            begin = gr.Button("Start", variant="primary", elem_id="fedal-begin")
        with gr.Column(visible=False, elem_id="fedal-done") as done_panel:
            left = gr.HTML(elem_id="fedal-left")
            look = gr.Button("Look again", elem_id="fedal-look")
            again = gr.Button("Show what I skipped", elem_id="fedal-again")
            undo_done = gr.Button("Take back my last answer", elem_id="fedal-undo-done")
        with gr.Row(visible=False, elem_id="fedal-work") as work_panel:
            with gr.Column(scale=4, min_width=420):
                if drawing:
                    from gradio_image_annotation import image_annotator

                    fit = gr.HTML(elem_classes="fedal-hidden")
                    picture = image_annotator(
                        elem_id="fedal-boxes",
                        show_label=False,
                        container=False,
                        sources=[],
                        label_list=["box"],
                        label_colors=["#7f7f7f"],
                        disable_edit_boxes=True,
                        show_remove_button=True,
                        show_clear_button=False,
                        box_min_size=3,
                        show_download_button=False,
                        show_share_button=False,
                        boxes_alpha=0.12,
                        handle_size=9,
                    )
                else:
                    picture = gr.HTML(elem_id="fedal-picture")
            with gr.Column(scale=1, min_width=230, elem_id="fedal-side"):
                chosen = gr.Radio(
                    [(c, c) for c in store.classes], show_label=False, container=False, elem_id="fedal-classes"
                )
                submit = gr.Button("Submit", variant="primary", elem_id="fedal-submit")
                message = gr.HTML(elem_id="fedal-message")
                with gr.Column(elem_id="fedal-small"):
                    undo = gr.Button("Undo", elem_id="fedal-undo", size="sm")
                    skip = gr.Button("Skip", elem_id="fedal-skip", size="sm")
                    unknown = gr.Button("Don't know", elem_id="fedal-unknown", size="sm")
                if drawing:
                    gr.HTML(
                        "<span><kbd>C</kbd>draw</span><span><kbd>D</kbd>move</span><span><kbd>Del</kbd>remove</span>",
                        elem_id="fedal-hints",
                    )
                about = gr.HTML(elem_id="fedal-about")
                note = gr.Textbox(
                    show_label=False,
                    placeholder="Note (optional)",
                    lines=1,
                    max_lines=4,
                    elem_id="fedal-note",
                    container=False,
                )
                with gr.Accordion("More", open=False, elem_id="fedal-more"):
                    new_class = gr.Textbox(
                        show_label=False,
                        placeholder="Name of a new class",
                        max_lines=1,
                        elem_id="fedal-new",
                        container=False,
                    )
                    add = gr.Button("Add class", size="sm", elem_id="fedal-add")
                    leave = gr.Button("Somebody else labels", size="sm", elem_id="fedal-leave")

        parts = [start_panel, work_panel, done_panel, who, key, picture, chosen, about, note, message, bar, left]
        if drawing:
            parts.append(fit)

        def shown(screen: Mapping[str, Any]) -> list[Any]:
            """A screen as one update for each of `parts`; what it does not mention stays."""
            stage, stay = screen.get("stage"), gr.skip()
            out = [gr.update(visible=stage == s) if stage else stay for s in ("start", "work", "done")]
            out += [screen.get("who", stay), screen.get("key", stay)]
            told, fitting = screen.get("picture", stay), stay
            if told is not stay:
                view, boxes = told if told is not None else (None, [])
                told = _drawable(view, boxes, store.classes) if drawing else _picture(view)
                if view is not None:
                    fitting = (
                        "<style>#fedal-boxes { max-width: max(320px, calc((100vh - 130px) * "
                        f"{view.shown[1] / view.shown[0]:.4f})); }}</style>"
                    )
            out.append(told)
            choice = {"value": screen["chosen"]} if "chosen" in screen else {}
            if "classes" in screen:
                choice["choices"] = [(c, c) for c in screen["classes"]]
            out.append(gr.update(**choice) if choice else stay)
            out += [screen.get("about", stay), screen.get("note", stay), _say(screen.get("message", ""))]
            out += [screen.get("bar", stay), screen.get("left", stay)]
            return [*out, fitting] if drawing else out

        common = {
            "outputs": parts,
            "preprocess": False,
            "postprocess": False,
            "queue": False,
            "show_progress": "hidden",
            "api_visibility": "private",
            "trigger_mode": "once",
        }
        arrived = {"fn": None, "inputs": [key], "js": "(key) => { fedal.shown(key); }", "api_visibility": "private"}
        sent = [who, key, chosen, note, seconds, drawn]
        collect = "(who, key, chosen, note, seconds, drawn) => [who, key, chosen, note, fedal.seconds(), drawn]"
        draw = {"fn": None, "inputs": [picture], "outputs": [drawn], "api_visibility": "private"}
        draw["js"] = "(value) => { fedal.busy = Date.now(); return [fedal.plain(value)]; }"
        busy = "(who) => { fedal.busy = Date.now(); return [who]; }"
        remember = "(name) => [fedal.remember((name || '').trim())]"
        recall = "() => { try { return [localStorage.getItem('fedal-who') || '']; } catch (e) { return ['']; } }"

        def on(event: Callable, fn: Callable, inputs: list, js: str | None = None) -> None:
            event(fn=fn, inputs=inputs, js=js, **common).then(**arrived)

        on(blocks.load, lambda name: shown(desk.start(name)), [who], recall)
        for event in (begin.click, name.submit):
            on(event, lambda name: shown(desk.start(name)), [name], remember)
        for button, action in ((submit, "label"), (skip, "skip"), (unknown, "unknown")):
            first = button.click(**draw).then if drawing else button.click
            on(first, lambda *given, a=action: shown(desk.act(a, *given)), sent, collect)
        for button in (undo, undo_done):
            on(button.click, lambda who: shown(desk.undo(who)), [who], busy)
        on(look.click, lambda who: shown(desk.start(who)), [who])
        on(again.click, lambda who: shown(desk.again(who)), [who])
        on(leave.click, lambda who: shown(desk.start("")), [who], "() => [fedal.remember('')]")
        for event in (add.click, new_class.submit):
            event(
                fn=lambda name, who: [*shown(desk.add_class(name, who)), ""],
                inputs=[new_class, who],
                **{**common, "outputs": [*parts, new_class]},
            )
        if drawing:
            quiet = {"fn": None, "inputs": [picture, chosen], "outputs": [picture], "api_visibility": "private"}
            picture.change(js="(value, chosen) => [fedal.name(value, chosen, false)]", **quiet)
            chosen.input(js="(value, chosen) => [fedal.name(value, chosen, true)]", **quiet)
    return blocks


def _picture(view: _View | None) -> str:
    """The image of the class page."""
    if view is None:
        return "<div class='frame'><div class='broken'>This image cannot be shown.</div></div>"
    return f"<div class='frame'><img alt='' draggable='false' src='{view.url}'></div>"


def _drawable(view: _View | None, boxes: Sequence[Mapping[str, Any]], classes: Sequence[str]) -> dict[str, Any] | None:
    """The annotator's value: the picture as a data URL, boxes in shown pixels."""
    if view is None:
        return None
    scale = [s / o for o, s in zip(view.size[::-1] * 2, view.shown[::-1] * 2, strict=True)]  # x, y, x, y
    drawn = []
    for thing in boxes:
        colour = colour_of(classes.index(thing["class"]))
        x1, y1, x2, y2 = (v * f for v, f in zip(thing["box"], scale, strict=True))
        rgb = ", ".join(str(int(colour[i : i + 2], 16)) for i in (1, 3, 5))
        drawn.append({"label": thing["class"], "color": f"rgb({rgb})", "xmin": x1, "ymin": y1, "xmax": x2, "ymax": y2})
    return {"image": {"path": "", "url": view.url}, "boxes": drawn, "orientation": 0}


def launch(
    store: Store,
    images: Pictures | str | Path,
    *,
    show_suggestion: bool = False,
    show_names: bool = False,
    host: str = "127.0.0.1",
    port: int | None = None,
    share: bool = False,
    token: str | None = None,
    inline: bool | None = None,
    say: Callable[[str], None] = print,
) -> Any:
    """Serve the page and return its Blocks (`local_url`, `share_url`, `close()`); does not wait.

    host: this machine alone unless told otherwise. port: a free one from 7860 up. share: a public link through
    Gradio's servers. A public link, or another host, asks for a token: the one given, or a new one that is told once
    by `say`; another host is served without encryption, for a network that you trust. inline: show it in the notebook
    (Jupyter, Colab).
    """
    gr = _gradio()
    local = host in ("127.0.0.1", "localhost", "::1") and not share
    if token is not None and len(token) < 8:
        raise ValueError("a token needs 8 characters or more")
    made = None if local or token is not None else secrets.token_urlsafe(12)
    token = token or made
    blocks = page(store, images, show_suggestion, show_names)
    fonts = ["system-ui", "sans-serif"]
    wishes: dict[str, Any] = {
        "server_name": host,
        "server_port": port,
        "share": share,
        "inline": inline,
        "prevent_thread_lock": True,
        "quiet": True,
        "show_error": False,
        "footer_links": [],
        "max_file_size": 1024,
        "ssr_mode": False,
        "theme": gr.themes.Default(primary_hue="blue", font=fonts, font_mono=["ui-monospace", "monospace"]),
        "run_history": False,
        "height": 820,
    }
    if token is not None:
        secret = token.encode()
        wishes["auth"] = lambda user, password: secrets.compare_digest(password.encode(), secret)
        wishes["auth_message"] = "Any name, and the token as the password."
    blocks.launch(**wishes)
    say(f"labelling page: {blocks.share_url or blocks.local_url}")
    if made is not None:
        say(f"token (any user name, this as the password): {made}")
    return blocks
