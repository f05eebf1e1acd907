"""Clients that lie, break or vanish: each is refused by name, the others go on."""

import numpy as np
import pytest
import small_run

from fedal_utils import record

flower = pytest.importorskip("fedal_utils.flower")
app = pytest.importorskip("flwr.app")

BAD = 102  # the node of client 01


@pytest.fixture(scope="module")
def setup():
    return small_run.prepared(
        **dict(methods=("avg",), clients=3, on_failure="skip", max_update_ratio=20.0),
        **dict(cycles=1, rounds=1, extra_rounds=0, first_pass_rounds=1, iterations=1, initial_model_iterations=1),
    )


@pytest.fixture(scope="module")
def place(setup, tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    flower.deal(setup, folder)
    return folder


def status_of_01(meddle, setup, place) -> set[str]:
    """The status of client 01's rows where `meddle` changes what it answers; the others must have gone on."""
    number = len(list((place / "server" / "runs").glob("*/*")))
    config = setup.config.replace(score_above=0.05 + 1e-6 * number)  # a run of its own

    def lie(message):
        answer = message.metadata.src_node_id == BAD and not message.has_error()
        return meddle(message, message.metadata.message_type) if answer else message

    rows = record.table(config, "small", root=flower.in_process(config, "small", place, meddle=lie, wait=1.0))
    assert rows[rows["client"] == "server"]["steps"].gt(0).all()
    assert rows[rows["client"].isin(["00", "02"])]["status"].fillna("").eq("").all()
    return set(rows[rows["client"] == "01"]["status"].fillna(""))


def answering(kind, change):
    """A lie in answers of this kind."""

    def meddle(message, its_kind):
        if its_kind == kind:
            change(message.content)
        return message

    return meddle


def arrays(change):
    """A lie about the weights: `change` of their NumPy arrays by name."""

    def lie(content):
        found = {name: array.numpy() for name, array in content["arrays"].items()}
        content["arrays"] = app.ArrayRecord({name: app.Array(value) for name, value in change(found).items()})

    return answering("train", lie)


def first(change):
    """A lie about the first array."""
    return arrays(lambda found: {**found, next(iter(found)): change(next(iter(found.values())))})


def count(kind, name, value):
    return answering(kind, lambda content: content["counts"].update({name: value}))


def said(name, value):
    return answering("query.select", lambda content: content["said"].update({name: value(list(content["said"][name]))}))


LIES = {
    "other names": (arrays(lambda found: {f"x{name}": value for name, value in found.items()}), "wrong shape"),
    "a missing entry": (arrays(lambda found: dict(list(found.items())[1:])), "wrong shape"),
    "one more entry": (arrays(lambda found: {**found, "more": np.zeros(3, np.float32)}), "wrong shape"),
    "another shape": (first(lambda value: value[None]), "wrong shape"),
    "70 dimensions": (first(lambda value: np.zeros((1,) * 30, np.float32)), "wrong shape"),
    "integers": (first(lambda value: value.astype(np.int64)), "wrong shape"),
    "objects": (first(lambda value: value.astype("S3")), "wrong shape"),
    "NaN": (first(lambda value: value * np.nan), "not finite"),
    "infinite": (first(lambda value: value + np.inf), "not finite"),
    "a thousand times as far": (first(lambda value: value + 1e6), "too large"),
    "no weights": (answering("train", lambda content: content.pop("arrays")), "wrong shape"),
    "no counts": (answering("train", lambda content: content.pop("counts")), "refused"),
    "a huge number of steps": (count("train", "steps", 10**9), "refused"),
    "no steps": (count("train", "steps", 0), "refused"),
    "a loss that is NaN": (count("train", "loss", float("nan")), "refused"),
    "another round": (count("train", "round", 7), "refused"),
    "a huge number of boxes": (count("query.select", "boxes", 10**8), "refused"),
    "fewer boxes than none": (count("query.select", "boxes", -1), "refused"),
    "ids of another client": (said("id", lambda ids: ["not mine", *ids[1:]]), "refused"),
    "an id twice": (said("id", lambda ids: [ids[0], *ids[:-1]]), "refused"),
    "more than was granted": (said("id", lambda ids: ids * 100), "refused"),
    "lost": (lambda message, kind: None if kind == "train" else message, "no answer"),
}


@pytest.mark.parametrize("name", LIES)
def test_what_cannot_be_believed_is_left_out_by_name_and_what_was_not_granted_counts_nothing(name, setup, place):
    meddle, status = LIES[name]
    assert status_of_01(meddle, setup, place) == {status}


@pytest.mark.parametrize("claimed", ["00", "/home/someone", ["01"]])
def test_a_name_that_is_taken_or_nobodys_is_refused(claimed, setup, place, capsys):
    hello = answering("query.hello", lambda content: content.update({"said": app.ConfigRecord({"name": claimed})}))
    assert status_of_01(hello, setup, place) == {"away"}
    told = capsys.readouterr().out
    assert "/home" not in told and "a node was refused that claims to be client" in told


def test_an_error_reaches_the_server_without_paths(setup, place, capsys):
    file = place / "clients" / "01" / "annotations.json"
    file.rename(file.with_name("gone"))
    try:
        assert status_of_01(lambda message, kind: message, setup, place) == {"failed"}
    finally:
        file.with_name("gone").rename(file)
    told = capsys.readouterr().out
    assert "nothing from client 01" in told and str(place) not in told


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"methods": ("local-first+avg",)}, r"'local-first\+avg' needs what a client does not have"),
        ({"methods": ("model_outlier",)}, "'model_outlier' needs what a client does not have"),
        ({"optimizer_state": "travels"}, "cannot be had with clients elsewhere"),
        ({"aggregation_weights": "boxes"}, "cannot be had with clients elsewhere"),
    ],
)
def test_what_needs_one_process_is_refused(changes, text, setup):
    with pytest.raises(ValueError, match=text):
        flower.check(setup.config.replace(**changes))
