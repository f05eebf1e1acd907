"""The questions and every answer of one labelling task in one SQLite file, `labels.sqlite`, which loses nothing.

A label is a class name (task "classes"), or a list of {"class": name, "box": [x1, y1, x2, y2]} (task "boxes"), xyxy in
pixels of the original upright image; an empty list says "nothing to see here".
"""

import contextlib
import functools
import json
import math
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

TASKS = ("classes", "boxes")
HISTORY = "id when who image cycle action label size strategy score seconds undone"
_APPLICATION = 0x66654C64  # marks the file as ours
_TABLES = """
    CREATE TABLE IF NOT EXISTS questions (id INTEGER PRIMARY KEY, image TEXT NOT NULL, cycle INTEGER NOT NULL,
        question TEXT NOT NULL, place INTEGER NOT NULL, state TEXT NOT NULL DEFAULT 'waiting', holder TEXT, since REAL,
        UNIQUE (image, cycle));
    CREATE TABLE IF NOT EXISTS actions (id INTEGER PRIMARY KEY AUTOINCREMENT, at TEXT NOT NULL, who TEXT NOT NULL,
        question INTEGER, action TEXT NOT NULL, told TEXT NOT NULL, undoes INTEGER UNIQUE)
"""  # who holds which image; what anybody did, only ever appended: first (without a question) the task and its classes
_JOINED = "FROM actions a JOIN questions q ON q.id = a.question"
_STANDING = "a.id NOT IN (SELECT undoes FROM actions WHERE undoes IS NOT NULL)"  # nobody took it back
_FREE = "q.state = 'waiting' AND (q.holder IS NULL OR q.since <= ?)"
_LAST = "(SELECT coalesce(max(place), 0) + 1 FROM questions)"


@dataclass(frozen=True)
class Question:
    """One image to be labelled."""

    image: str  # its id
    strategy: str = ""  # why it was selected
    score: float | None = None
    cycle: int = 0
    size: Sequence[int] | None = None  # height, width
    id: int = field(default=0, compare=False)  # its number in the store


def store_path(folder: str | Path) -> Path:
    """Where the labels of a folder of images, or of a run's folder, lie: `labels.sqlite` in it."""
    return Path(folder) / "labels.sqlite"


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str) or not value.strip() or len(value) > 100 or any(ord(c) < 32 for c in value):
        raise ValueError(f"{what} is text of 1 to 100 printable characters, got {value!r}")
    return value.strip()


class Store(contextlib.AbstractContextManager):
    """One labelling task in one file: what a call accepted is on disk when it returns.

    Any number of threads and processes of one machine may work in it (WAL mode, so not on network drives).
    classes: names in the order of their keys, None = those of the file; an existing file takes new ones.
    task: "classes" or "boxes", None = that of the file, or "classes" for a new one.
    """

    lease_seconds = 1800.0  # how long an image stays with the person who got it
    clock = staticmethod(time.time)

    def __init__(self, path: str | Path, classes: Sequence[str] | None = None, task: str | None = None):
        names = [_text(name, "a class name") for name in classes or ()]
        unclear = classes is not None and (isinstance(classes, str) or not names or len(set(names)) != len(names))
        if unclear or task not in (None, *TASKS):
            raise ValueError(f"classes are different names, the task is one of {TASKS}, got {classes!r}, {task!r}")
        self.path, self._lock = Path(path), threading.RLock()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = not self.path.is_file() or not self.path.stat().st_size
        where = f"{self.path.absolute().as_uri()}?mode={'rwc' if names else 'rw'}"  # made only where classes are told
        try:
            self._db = sqlite3.connect(where, uri=True, timeout=60, isolation_level=None, check_same_thread=False)
            self._db.row_factory = sqlite3.Row
            if new:
                with contextlib.suppress(sqlite3.OperationalError):  # somebody else is just setting it
                    self._db.execute("PRAGMA journal_mode=WAL")
            with self._writing():
                self.task, self.classes = self._open(names, task)
        except (sqlite3.Error, OSError, ValueError) as error:
            raise ValueError(f"{self.path} cannot be used as a labelling store: {error}") from None

    def _open(self, names: list[str], task: str | None) -> tuple[str, tuple[str, ...]]:
        """The task and the classes of the file, new classes added; one that is damaged or another's is refused."""
        (found,) = self._db.execute("PRAGMA quick_check(1)").fetchone()
        (tables,) = self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if tables and self._db.execute("PRAGMA application_id").fetchone()[0] != _APPLICATION:
            found = "it is the file of another program"
        if found != "ok":
            raise ValueError(found)
        for statement in (*_TABLES.split(";"), f"PRAGMA application_id={_APPLICATION}"):
            self._db.execute(statement)
        row = self._db.execute("SELECT told FROM actions WHERE action = 'task' ORDER BY id DESC LIMIT 1").fetchone()
        if row is None and not names:
            raise ValueError("it is empty, so classes are needed")
        kept = json.loads(row["told"]) if row else {"task": task or TASKS[0], "classes": []}
        if task not in (None, kept["task"]):
            raise ValueError(f"it holds the task {kept['task']!r}, got {task!r}")
        classes = tuple(dict.fromkeys([*kept["classes"], *names]))
        if len(classes) > len(kept["classes"]):
            self._append("", None, "task", {**kept, "classes": classes})
        return kept["task"], classes

    @contextlib.contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """One transaction that nobody else writes beside; committed, and flushed to disk, at the end."""
        try:
            with self._lock, self._db:
                self._db.execute("BEGIN IMMEDIATE")
                yield self._db
        except sqlite3.OperationalError as error:  # such as a full disk
            raise OSError(f"{self.path}: {error}") from None

    def _rows(self, query: str) -> list[sqlite3.Row]:
        with self._lock:
            return self._db.execute(query).fetchall()

    def _append(self, who: str, question: int | None, action: str, told: Mapping, undoes: int | None = None) -> None:
        at = datetime.fromtimestamp(self.clock(), timezone.utc).isoformat(timespec="milliseconds")
        into = "INSERT INTO actions (at, who, question, action, told, undoes) VALUES (?, ?, ?, ?, ?, ?)"
        self._db.execute(into, (at, who, question, action, json.dumps(told), undoes))

    def close(self, *_: object) -> None:
        """Let go of the file; nothing is pending."""
        with self._lock:
            self._db.close()

    __exit__ = close

    def queue(self, questions: Iterable[Question]) -> int:
        """Put questions of a new (image, cycle) at the end of the queue, the most wanted first; returns how many."""
        rows = [(q.image, int(q.cycle), json.dumps(asdict(q))) for q in questions]
        into = f"INSERT OR IGNORE INTO questions (image, cycle, question, place) VALUES (?, ?, ?, {_LAST})"
        with self._writing() as db:
            return max(0, db.executemany(into, rows).rowcount)

    def next(self, who: str, image: str | None = None) -> Question | None:
        """The first waiting question, leased to this person, or the one they hold already; None if nothing waits.

        An image that somebody else holds is not given until its lease has ended. image: this one and no other.
        """
        who = _text(who, "a person's name")
        with self._writing() as db:
            row = self._held(who)
            if row is None or image not in (None, row["image"]):
                query = f"SELECT * FROM questions q WHERE {_FREE} AND image = coalesce(?, image) ORDER BY place LIMIT 1"
                row = db.execute(query, (self.clock() - self.lease_seconds, image)).fetchone()
                if row is not None:
                    self._give(row, who)
        return None if row is None else _question(row)

    def _held(self, who: str) -> sqlite3.Row | None:
        query = "SELECT * FROM questions WHERE holder = ? AND state = 'waiting'"
        return self._db.execute(query, (who.strip(),)).fetchone()

    def _give(self, row: sqlite3.Row, who: str) -> None:
        lease = "UPDATE questions SET state = 'waiting', holder = ?, since = ? WHERE id = ?"
        self._db.execute("UPDATE questions SET holder = NULL WHERE holder = ?", (who,))
        self._db.execute(lease, (who, self.clock(), row["id"]))

    def answer(
        self, who: str, image: str, label: Any, size: Sequence[int] | None = None, action="label", seconds=None
    ) -> None:
        """The person's label of the image that they hold; ValueError if it is not theirs, or no label of this task.

        size: (height, width) of the image, where the question did not tell; boxes are cut to it. action: or "skip" (to
        the end of the queue), "unknown" (nobody can tell). seconds: what it took; else since the image was handed out.
        """
        if seconds is not None and (isinstance(seconds, (bool, str)) or not 0 <= seconds < math.inf):
            raise ValueError(f"image {image!r}: seconds must be a number from 0 up, got {seconds!r}")
        with self._writing() as db:
            row = self._held(who)
            if row is None or row["image"] != image:
                raise ValueError(f"{who!r} does not hold image {image!r} of {self.path}, so nothing was stored")
            size = size or _question(row).size
            if action == "label":
                label = self._checked(label, size or (math.inf, math.inf))
            seconds = max(0.0, self.clock() - row["since"]) if seconds is None else float(seconds)
            self._append(row["holder"], row["id"], action, {"label": label, "size": size, "seconds": seconds})
            state = {"label": "labelled", "skip": "waiting"}.get(action, action)
            db.execute(
                f"UPDATE questions SET state = ?, holder = NULL, place = {_LAST} WHERE id = ?", (state, row["id"])
            )

    skip = functools.partialmethod(answer, label=None, action="skip")
    unknown = functools.partialmethod(answer, label=None, action="unknown")

    def _checked(self, label: Any, size: Sequence[float]) -> Any:
        """The label as it is stored: a class name, or a list of boxes cut to the image of `size`."""
        if self.task == "classes":
            if label not in self.classes:
                raise ValueError(f"the class must be one of {', '.join(self.classes)}, got {label!r}")
            return label
        try:
            corners = np.array([one["box"] for one in label], dtype=np.float64).reshape(len(label), 4)
            inside = np.clip(corners, 0, [*size[::-1], *size[::-1]])
            if not np.isfinite(corners).all() or (inside[:, 2:] - inside[:, :2] < 1).any():
                raise ValueError("a box is 4 finite numbers, 1 pixel a side or more inside the image")
            if wrong := {one["class"] for one in label} - set(self.classes):
                raise ValueError(f"{wrong} not in {self.classes}")
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{label!r} is no list of boxes with classes: {error}") from None
        return [{"class": one["class"], "box": box} for one, box in zip(label, inside.tolist(), strict=True)]

    def undo(self, who: str) -> tuple[Question, Any] | None:
        """Take back this person's latest standing action and give them its image again, with what they had said.

        A skip is passed over if somebody else has the image by now.
        """
        who = _text(who, "a person's name")
        with self._writing() as db:
            mine = (
                f"a.who = ? AND a.action <> 'undo' AND {_STANDING} AND (a.action <> 'skip' OR q.holder = ? OR {_FREE})"
            )
            query = f"SELECT a.id AS last, a.told, q.* {_JOINED} WHERE {mine} ORDER BY a.id DESC LIMIT 1"
            row = db.execute(query, (who, who, self.clock() - self.lease_seconds)).fetchone()
            if row is None:
                return None
            self._append(who, row["id"], "undo", {}, row["last"])
            self._give(row, who)
        return _question(row), json.loads(row["told"])["label"]

    def cycles(self) -> dict[str, int]:
        """Image -> the last cycle in which it was asked, in the order of the images' first questions."""
        return dict(map(tuple, self._rows("SELECT image, max(cycle) FROM questions GROUP BY image ORDER BY min(id)")))

    def labels(self) -> dict[str, Any]:
        """The last standing label of each image: {image: class name, or list of boxes}."""
        found = self._rows(f"SELECT q.image, a.told {_JOINED} WHERE a.action = 'label' AND {_STANDING} ORDER BY a.id")
        return {row["image"]: json.loads(row["told"])["label"] for row in found}

    def progress(self) -> dict[str, int]:
        """How many questions are labelled, unknown and waiting, and how many there are in all."""
        found = dict(map(tuple, self._rows("SELECT state, count(*) FROM questions GROUP BY state")))
        return {"labelled": 0, "unknown": 0, "waiting": 0, **found, "all": sum(found.values())}

    def history(self) -> pd.DataFrame:
        """Every answer, skip and undo in order, with the columns of `HISTORY`; labels as in `labels`."""
        told = f'a.id, a.at AS "when", a.who, a.action, q.question, a.told, NOT ({_STANDING}) AS undone'
        found = self._rows(f"SELECT {told} {_JOINED} ORDER BY a.id")
        rows = [{**json.loads(row["question"]), **json.loads(row["told"]), **dict(row)} for row in found]
        frame = pd.DataFrame(rows, columns=HISTORY.split(), dtype=object)
        return frame.astype({"id": int, "cycle": int, "score": float, "seconds": float, "undone": bool})


def _question(row: sqlite3.Row) -> Question:
    return Question(**{**json.loads(row["question"]), "id": row["id"]})
