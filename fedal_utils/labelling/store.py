"""The questions and every answer of one labelling task in one SQLite file, `labels.sqlite`, which loses nothing.

Two tables: `questions` (who holds which image) and `actions` (what anybody did, only ever appended). A label is a class
name (task "classes"), or a list of {"class": name, "box": [x1, y1, x2, y2]} (task "boxes"), xyxy in pixels of the
original upright image; an empty list says "nothing to see here".
"""

import contextlib
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
HISTORY = (
    "id when who image cycle action label size strategy score model suggestion suggestion_shown seconds note undone"
)
_APPLICATION = 0x66654C64  # marks the file as ours
_TABLES = (
    "CREATE TABLE IF NOT EXISTS questions (id INTEGER PRIMARY KEY, image TEXT NOT NULL, cycle INTEGER NOT NULL, "
    "question TEXT NOT NULL, place INTEGER NOT NULL, state TEXT NOT NULL DEFAULT 'waiting', holder TEXT, since REAL, "
    "UNIQUE (image, cycle))",
    "CREATE INDEX IF NOT EXISTS queue ON questions (state, place)",
    # the first rows have no question: action 'task' tells the task and its classes
    "CREATE TABLE IF NOT EXISTS actions (id INTEGER PRIMARY KEY AUTOINCREMENT, at TEXT NOT NULL, who TEXT NOT NULL, "
    "question INTEGER, action TEXT NOT NULL, told TEXT NOT NULL, undoes INTEGER UNIQUE)",
)
_JOINED = "FROM actions a JOIN questions q ON q.id = a.question"
_STANDING = "a.id NOT IN (SELECT undoes FROM actions WHERE undoes IS NOT NULL)"  # nobody took it back


class NotHeld(ValueError):
    """The person does not hold this image: answered already, taken by somebody else, or never asked."""


@dataclass(frozen=True)
class Question:
    """One image to be labelled."""

    image: str  # its id
    strategy: str = ""  # why it was selected
    score: float | None = None
    model: str = ""
    suggestion: Any = None  # a label; the page shows it only if told to
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


def checked_label(label: Any, task: str, classes: Sequence[str], where: str, size: Sequence[int] | None = None) -> Any:
    """The label as it is stored: a class name, or a list of boxes cut to the image of `size` (height, width).

    ValueError that begins with `where` for an unknown class, a box that is not finite, inverted, outside or too small.
    """
    boxes = [{"class": label}] if task == "classes" else label
    listed = isinstance(boxes, (list, tuple)) and all(isinstance(one, Mapping) for one in boxes)
    if not listed or any(one.get("class") not in classes for one in boxes):
        raise ValueError(f"{where}: {label!r} is no label of this task; classes allowed are {', '.join(classes)}")
    if task == "classes":
        return label
    height, width = size or (math.inf, math.inf)  # 0 is the edge in any case
    try:
        corners = np.array([one["box"] for one in boxes], dtype=np.float64).reshape(len(boxes), 4)
        inside = np.clip(corners, 0, [width, height, width, height])
        fine = np.isfinite(corners).all() and (inside[:, 2:] - inside[:, :2] >= 1).all()
    except (KeyError, TypeError, ValueError):
        fine = False
    if not fine:
        raise ValueError(f"{where}: a box is 4 finite numbers, 1 pixel a side or more inside the image, got {label!r}")
    return [{"class": one["class"], "box": box} for one, box in zip(boxes, inside.tolist(), strict=True)]


class Store(contextlib.AbstractContextManager):
    """One labelling task in one file (WAL mode, synchronous=FULL): what a call accepted is on disk when it returns.

    Any number of threads and processes of one machine may work in it; WAL mode does not work on network drives.
    classes: names in the order of their keys, None = those of the file; an existing file takes new ones.
    task: "classes" or "boxes", None = that of the file, or "classes" for a new one.
    """

    lease_seconds = 1800.0  # how long an image stays with the person who got it
    clock = staticmethod(time.time)

    def __init__(self, path: str | Path, classes: Sequence[str] | None = None, task: str | None = None):
        names = [_text(name, "a class name") for name in classes or ()]
        if classes is not None and (isinstance(classes, str) or not names or len(set(names)) != len(names)):
            raise ValueError(f"classes must be one or more different names, got {classes!r}")
        if task not in (None, *TASKS):
            raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
        self.path, self._lock = Path(path), threading.RLock()
        if not names and not self.path.is_file():
            raise ValueError(f"{self.path} does not exist: classes are needed to make it")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._db = sqlite3.connect(self.path, timeout=60, isolation_level=None, check_same_thread=False)
        except sqlite3.OperationalError as error:
            raise OSError(f"{self.path}: {error}") from None
        self._db.row_factory = sqlite3.Row
        try:
            self._check()
            with self._writing() as db:
                for table in _TABLES:
                    db.execute(table)
                db.execute(f"PRAGMA application_id={_APPLICATION}")
                self.task, self.classes = self._settle(task, names)
        except (sqlite3.DatabaseError, OSError, ValueError) as error:
            self.close()
            raise ValueError(f"{self.path} cannot be used as a labelling store: {error}") from None

    def _check(self) -> None:
        """Refuse a file that is damaged or another's before anything is written."""
        found = self._db.execute("PRAGMA quick_check(1)").fetchone()[0]
        tables = self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if tables and self._db.execute("PRAGMA application_id").fetchone()[0] != _APPLICATION:
            found = "it is the file of another program"
        if found != "ok":
            raise sqlite3.DatabaseError(found)
        for _ in range(200):  # SQLite does not wait by itself to change this mode
            with contextlib.suppress(sqlite3.OperationalError):
                self._db.execute("PRAGMA journal_mode=WAL")
                break
            time.sleep(0.05)
        self._db.execute("PRAGMA synchronous=FULL")

    def _settle(self, task: str | None, names: list[str]) -> tuple[str, tuple[str, ...]]:
        """The task and the classes of the file, new classes added."""
        row = self._db.execute("SELECT told FROM actions WHERE action = 'task' ORDER BY id DESC LIMIT 1").fetchone()
        if row is None and not names:
            raise ValueError("it is empty, so classes are needed")
        kept = json.loads(row["told"]) if row else {"task": task or TASKS[0], "classes": []}
        if task not in (None, kept["task"]):
            raise ValueError(f"it holds the task {kept['task']!r}, got {task!r}")
        classes = (*kept["classes"], *(name for name in names if name not in kept["classes"]))
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

    def _rows(self, query: str, *values: Any) -> list[sqlite3.Row]:
        with self._lock:
            return self._db.execute(query, values).fetchall()

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
        last = "(SELECT coalesce(max(place), 0) + 1 FROM questions)"
        into = f"INSERT OR IGNORE INTO questions (image, cycle, question, place) VALUES (?, ?, ?, {last})"
        with self._writing() as db:
            before = db.total_changes
            db.executemany(into, rows)
            return db.total_changes - before

    def next(self, who: str, image: str | None = None) -> Question | None:
        """The first waiting question, leased to this person, or the one they hold already; None if nothing waits.

        An image that somebody else holds is not given until its lease has ended. image: this one and no other.
        """
        with self._writing() as db:
            row = self._held(who)
            if row is None or image not in (None, row["image"]):
                free = "state = 'waiting' AND (holder IS NULL OR since <= ?) AND image = coalesce(?, image)"
                query = f"SELECT * FROM questions WHERE {free} ORDER BY place LIMIT 1"
                row = db.execute(query, (self.clock() - self.lease_seconds, image)).fetchone()
                if row is not None:
                    self._give(row, who)
        return None if row is None else _question(row)

    def _held(self, who: str) -> sqlite3.Row | None:
        query = "SELECT * FROM questions WHERE holder = ? AND state = 'waiting'"
        return self._db.execute(query, (_text(who, "a person's name"),)).fetchone()

    def _give(self, row: sqlite3.Row, who: str) -> None:
        who, lease = who.strip(), "UPDATE questions SET state = 'waiting', holder = ?, since = ? WHERE id = ?"
        self._db.execute("UPDATE questions SET holder = NULL WHERE holder = ?", (who,))
        self._db.execute(lease, (who, self.clock(), row["id"]))

    def answer(self, who: str, image: str, label: Any, size: Sequence[int] | None = None, **told: Any) -> None:
        """The person's label of the image they hold; on disk when this returns.

        `NotHeld` if it is not theirs (a lease that has run out is good until somebody else has the image); ValueError
        for a label that is not allowed. size: of the image, where the question did not tell; boxes are cut to it.
        told: seconds (what it took; else since the image was handed out), note, suggestion_shown.
        """
        self._act(who, image, "label", label, size, **told)

    def skip(self, who: str, image: str, **told: Any) -> None:
        """Not now: to the end of the queue. told: as of `answer`."""
        self._act(who, image, "skip", **told)

    def unknown(self, who: str, image: str, **told: Any) -> None:
        """Nobody can tell: out of the queue, without a label. told: as of `answer`."""
        self._act(who, image, "unknown", **told)

    def _act(self, who, image, action, label=None, size=None, *, seconds=None, note="", suggestion_shown=False) -> None:
        if seconds is not None and (isinstance(seconds, (bool, str)) or not 0 <= seconds < math.inf):
            raise ValueError(f"image {image!r}: seconds must be a number from 0 up, got {seconds!r}")
        with self._writing() as db:
            row = self._held(who)
            if row is None or row["image"] != image:
                holds = "nothing" if row is None else repr(row["image"])
                raise NotHeld(f"{who!r} cannot {action} image {image!r} of {self.path}: {who!r} holds {holds}")
            size = size or _question(row).size
            if action == "label":
                label = checked_label(label, self.task, self.classes, f"image {image!r}", size)
            told = {"label": label, "size": size, "note": str(note), "suggestion_shown": bool(suggestion_shown)}
            told["seconds"] = max(0.0, self.clock() - row["since"]) if seconds is None else float(seconds)
            self._append(row["holder"], row["id"], action, told)
            state = {"label": "labelled", "skip": "waiting"}.get(action, action)
            last = "(SELECT max(place) + 1 FROM questions)" if action == "skip" else "place"
            after = f"UPDATE questions SET state = ?, holder = NULL, place = {last} WHERE id = ?"
            db.execute(after, (state, row["id"]))

    def undo(self, who: str) -> tuple[Question, Any] | None:
        """Take back this person's latest standing action and give them its image again, with what they had said.

        A skip is passed over if somebody else has the image by now. None if there is nothing to take back.
        """
        who = _text(who, "a person's name")
        with self._writing() as db:
            mine = f"a.who = ? AND a.action <> 'undo' AND {_STANDING}"
            free = "(a.action <> 'skip' OR q.state = 'waiting' AND (q.holder IS NULL OR q.holder = ? OR q.since <= ?))"
            query = f"SELECT a.id AS last, a.told, q.* {_JOINED} WHERE {mine} AND {free} ORDER BY a.id DESC LIMIT 1"
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
        counts = dict.fromkeys(("labelled", "unknown", "waiting"), 0)
        counts.update(map(tuple, self._rows("SELECT state, count(*) FROM questions GROUP BY state")))
        return {**counts, "all": sum(counts.values())}

    def history(self) -> pd.DataFrame:
        """Every answer, skip and undo in order, with the columns of `HISTORY`; labels as in `labels`."""
        told = f'a.id, a.at AS "when", a.who, a.action, q.question, a.told, NOT ({_STANDING}) AS undone'
        found = self._rows(f"SELECT {told} {_JOINED} ORDER BY a.id")
        rows = [{**json.loads(row["question"]), **json.loads(row["told"]), **dict(row)} for row in found]
        columns = HISTORY.split()
        frame = pd.DataFrame([[row.get(name) for name in columns] for row in rows], columns=columns, dtype=object)
        return frame.astype({"id": int, "cycle": int, "score": float, "seconds": float, "undone": bool})


def _question(row: sqlite3.Row) -> Question:
    return Question(**{**json.loads(row["question"]), "id": row["id"]})
