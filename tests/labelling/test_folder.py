"""A user's own photographs, from folder to curve to the next cycle: by the commands, and with each way to label."""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from fedal_utils import __main__ as command
from fedal_utils import data, federation, labelling, papers, record
from fedal_utils.labelling import OwnFolder, Simulated, Store, pictures, store_path, truth_of
from fedal_utils.sampling import Unanswered

SMALL = dict(
    **dict(image_size=(64, 64), backbone="small", pretrained=False, frozen=False, flip=0.0),
    **dict(rounds=1, epochs=1, threads=1, clients=2),
)
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def photographs(tmp_path, monkeypatch):
    """A checkout to work in, a folder of 24 pictures in it without labels, and who knows them: p00 has no object."""
    house = tmp_path / "house"
    (house / "notebooks").mkdir(parents=True), (house / "pyproject.toml").touch()
    shutil.copy(ROOT / "notebooks" / "05_your_own_images.ipynb", house / "notebooks")
    monkeypatch.setenv("FEDAL_HOME", str(house)), monkeypatch.chdir(house)
    known, _ = data.load("digits", 64, digits=data.Digits((24, 1), 2))
    truth, folder = truth_of(known, "boxes"), tmp_path / "photos"
    folder.mkdir()
    for number, (id_, picture) in enumerate(pictures(known.images).items()):
        Image.fromarray(picture).save(folder / f"p{number:02d}.png")
        truth[f"p{number:02d}.png"] = truth.pop(id_) if number else []
    return folder, truth


def test_the_whole_way_by_the_commands(photographs, capsys):
    folder, truth = photographs
    settings = [word for name, value in SMALL.items() for word in ("--set", f"{name}={value!r}")]
    run = ["run", "05", "--profile", "smoke", "--data", str(folder), *settings]

    def said(*words: str) -> str:
        assert command.main(list(words)) == 0
        return capsys.readouterr().out

    report = json.loads(said("inspect", str(folder), "--json"))
    assert report["format"] == "images without labels" and report["splits"]["train"]["not_labelled"] == 23
    out = said(*run)
    assert f"label --data {folder} --task boxes" in out
    tables = folder.parent / "house" / "results" / "tables"
    table = tables / "05_your_own_images-photos-smoke-next.csv"
    first = pd.read_csv(table, dtype=str)
    assert list(first["client"].unique()) == ["test", "00", "01"] and str(table) in out
    with Store(store_path(folder), ["0", "1"], "boxes") as store:
        rest = [{"client": "01", "id": name} for name in sorted(truth) if name not in set(first["id"])]
        asked = pd.concat([first, pd.DataFrame(rest)])[:12]
        assert labelling.queue(store, asked, dict.fromkeys(truth, (64, 64))) == 12 == store.progress()["waiting"]
        assert labelling.queue(store, asked) == 0  # what was asked is not asked again
        Simulated(truth).answer_all(store, "simulated")
    said("export", str(store_path(folder)), "--format", "yolo", str(folder.parent / "yolo"))
    assert len(list((folder.parent / "yolo" / "labels").glob("*.txt"))) == 12
    out = said(*run)
    assert "12 images not labelled" in out and "ap50" in out and "--queried" in out
    assert len(pd.read_csv(tables / "05_your_own_images-photos-smoke-curve.csv")) == 1
    queries = pd.read_csv(table, dtype=str)
    assert set(queries["client"]) == {"00", "01"} and not set(queries["id"]) & set(asked["id"])


def beside(folder: Path, truth: dict, ids: list[str], form: str) -> None:
    """Label these images with a tool that writes this format."""
    path, out = folder.parent / "other.sqlite", folder.parent / "out"
    with Store(store_path(folder) if form == "store" else path, ["0", "1"], "boxes") as store:
        names = [f"{Path(id_).stem}.png" for id_ in ids]
        labelling.queue(store, pd.DataFrame({"id": names}), dict.fromkeys(names, (64, 64)))
        Simulated(truth).answer_all(store, "simulated")
        if form == "store":
            return
        shutil.rmtree(out, ignore_errors=True), (folder / "labels.json").unlink(missing_ok=True)
        labelling.export(store, form, folder / "labels.json" if form == "coco" else out)
    for file in out.rglob("*.*") if out.exists() else ():
        shutil.copy(file, folder)


@pytest.mark.parametrize("form", ["store", "voc", "yolo", "coco"])
def test_labels_that_come_continue_the_loop(photographs, form, tmp_path, capsys):
    folder, truth = photographs
    config = papers.load("05_your_own_images", "smoke", str(folder), **SMALL)
    setup = federation.prepare(config, "cpu")
    queries, points = federation.first_queries(setup), []
    assert set(queries["id"][queries["client"] == "test"]) == set(setup.test.images.ids)
    known = [*queries["id"], *({"p00.png", "p01.png"} - set(queries["id"]))]
    held = set(map(stem, setup.test.images.ids))
    for _ in range(2):
        beside(folder, truth, known, form), OwnFolder(folder)
        setup = federation.prepare(config, "cpu")
        train, test = setup.photos
        assert test.labelled is None and held <= set(map(stem, test.images.ids))
        held = set(map(stem, test.images.ids))
        labelled = {stem(id_) for id_, there in zip(train.images.ids, train.labelled.tolist(), strict=True) if there}
        assert labelled | held == set(map(stem, known)) and len(train) + len(test) == 24
        with pytest.raises(Unanswered, match=r"\d images wait for labels: label them, then run the same") as caught:
            for run in federation.runs(setup, "own"):
                experiment = federation.start(run, setup)
                for _ in experiment.advance():
                    pass
        begun = [c.pool.ids[p] for c in experiment.clients for p in c.pool.labelled()]
        assert set(map(stem, begun)) == labelled  # all that there are, in cycle 0
        waiting = caught.value.queries
        assert {row["client"] for row in waiting} == {"00", "01"}
        assert not {stem(row["id"]) for row in waiting} & (labelled | held)
        points.append(record.table(setup.config, "own", fingerprint=setup.fingerprint).query("client == 'server'"))
        known += [row["id"] for row in waiting]
    assert len(points[0]) == len(points[1]) == 1 and points[1]["images"].item() > points[0]["images"].item()
    assert capsys.readouterr().out.count("starts anew") == 1  # said once, and no warning


def stem(id_: str) -> str:
    return Path(id_).stem


def test_a_store_beside_other_labels_is_refused(photographs):
    folder, truth = photographs
    beside(folder, truth, ["p01.png"], "store")
    (folder / "p02.txt").write_text("")
    with pytest.raises(ValueError, match=r"has a store and other labels, such as p02\.txt: put them into the store"):
        OwnFolder(folder)
