"""Sets with one thing mutated: each is read, or refused by a ValueError that names its file; there is no third outcome.

FEDAL_FUZZ=20000 (`make fuzz N=20000`) asks for so many cases in all; without it the test takes a few seconds.
"""

import json
import os
import random
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from miniatures import KITTI, THREE, Picture, coco, kitti, voc, yolo

from fedal_utils import data

CASES = int(os.environ.get("FEDAL_FUZZ", "300")) // 5
WORDS = "nan -inf 1e999 -1 0 01 1_0 null cat .. ../../etc/passwd / \\ [ { < &amp; &b; <!-- * &a #x <object> train %"
ODD = ("", " ", "\0", "\r", "\x85", "\ud83d", "\ufeff", "\u0663", "9" * 30, "9" * 5000, "]" * 50, "[" * 2000, "a b")
TEXTS = st.sampled_from([*ODD, *WORDS.split()])
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXTS, st.just(10**400), st.just(1e308)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=2)),
    max_leaves=4,
)


def region(name: str, x: float) -> dict:
    value = {"x": x, "y": 5.0, "width": 20.5, "height": 30.0, "rotation": 0, "rectanglelabels": [name]}
    return {"type": "rectanglelabels", "original_width": 60, "original_height": 40, "value": value}


def studio(root: Path) -> Path:
    images = [{"image": f"/data/upload/1/0a1b2c3d-{i}.png"} for i in range(3)]
    annotations = [[{"id": i, "result": [region("cat", i)]}] for i in range(3)]
    tasks = [{"id": i, "data": images[i], "annotations": annotations[i]} for i in range(3)]
    root.mkdir()
    (root / "export.json").write_text(json.dumps(tasks))
    return root


KINDS = {
    "voc": (lambda root: voc(root, splits={"train": "ab", "test": "c"}, difficult=[1]), (".xml", ".txt")),
    "coco": (coco, (".json",)),
    "yolo": (lambda root: yolo(yolo(root, THREE, "train"), [Picture("d")], "val"), (".txt", ".yaml")),
    "kitti": (lambda root: kitti(root, KITTI[:4]), (".txt",)),
    "studio": (studio, (".json",)),
}


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    return {kind: write(tmp_path_factory.mktemp("fuzz") / kind) for kind, (write, _) in KINDS.items()}


def mutated_json(content, random: random.Random, value) -> object:
    """The content with one entry, drawn at any depth, replaced, removed or doubled."""
    at = content
    while True:
        keys = list(at) if isinstance(at, dict) else list(range(len(at)))
        if not keys:
            return value
        key = random.choice(keys)
        if isinstance(at[key], (dict, list)) and at[key] and random.random() < 0.8:
            at = at[key]
            continue
        how = random.randrange(4)
        if how == 0:
            del at[key]
        elif how == 1 and isinstance(at, list):
            at.append(at[key])
        else:
            at[key] = value
        return content


def mutated_bytes(raw: bytes, random: random.Random, text: str) -> bytes:
    """A piece cut out, put in, doubled, or another byte; at the borders of words half of the time."""
    put = text.encode("utf-8", "surrogatepass")
    borders = [i for i, byte in enumerate(raw) if byte in b' \n<>,:="'] or [0]
    i, j = sorted(random.choice(borders) + 1 if random.random() < 0.5 else random.randrange(len(raw) + 1) for _ in "ab")
    changed = (raw[:i] + put + raw[j:], raw[:i] + put + raw[i:], raw[:i], raw[:j] + raw[i:])
    return (*changed, raw.replace(raw[i:j], put, 1))[random.randrange(5)]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=CASES, suppress_health_check=list(HealthCheck), derandomize="FEDAL_FUZZ" not in os.environ)
@given(random=st.randoms(use_true_random=False), text=TEXTS, value=VALUES)
def test_a_mutated_set_is_read_or_refused_by_a_valueerror_that_names_its_file(
    kind, originals, tmp_path_factory, random, text, value
):
    folder = tmp_path_factory.mktemp("case") / kind
    shutil.copytree(originals[kind], folder)
    try:
        file = random.choice(sorted(p for p in folder.rglob("*") if p.suffix in KINDS[kind][1]))
        if file.suffix == ".json" and random.random() < 0.7:
            file.write_text(json.dumps(mutated_json(json.loads(file.read_text()), random, value)))
        else:
            file.write_bytes(mutated_bytes(file.read_bytes(), random, text))
        try:
            if kind == "studio":
                for record in data.read_label_studio(file):
                    for thing in record.objects or ():
                        (x1, y1, x2, y2), (height, width) = thing.box, record.size
                        assert thing.name and 0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height
            else:
                for side in data.load(str(folder), (24, 36)):
                    for row in side.labels.boxes if side.labels is not None else []:
                        assert ((row >= 0) & (row <= 36)).all()
        except ValueError as error:
            assert type(error) is ValueError and str(folder) in str(error), repr(error)
    finally:
        shutil.rmtree(folder.parent)
