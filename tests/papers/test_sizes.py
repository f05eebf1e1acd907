"""`papers.load`: sizes by notebook, profile and data set, and the last word of overrides."""

import json

import pytest

from fedal_utils import config, papers

NOTEBOOKS = ("00", "10", "11", "12", "13", "14", "20", "30", "40", "50", "50b", "60")
WITHIN = {"11_fedavg", "12_chain", "13_communication"}


def names(notebook: str, profile: str = "smoke", data: str | None = None) -> tuple[str, str, str]:
    loaded = papers.load(notebook, profile, data)
    return loaded.data.dataset, loaded.model.classifier or loaded.model.detector, loaded.model.backbone


def test_a_profile_changes_numbers_and_data_bring_their_detector():
    assert names("00_start_here") == ("digits", "ssd", "small")
    assert names("00_start_here", "quick") == ("bccd", "ssd", "lite0")
    assert names("00_start_here", "quick", "some/folder") == ("some/folder", "ssd", "lite0")
    for number in ("10_centralised", *WITHIN):
        assert names(number)[:2] == ("digits", "yolo") and names(number, "paper")[:2] == ("kitti-2", "yolo")
    assert names("20_huale") == ("digits", "faster_rcnn", "lite0")
    assert names("20_huale", "paper") == ("voc07", "faster_rcnn", "resnet50")
    kafal = [names("30_kafal", profile)[:2] for profile in config.PROFILES]
    assert kafal == [("digit-images", "resnet8"), ("cifar10", "mlp"), ("cifar10", "resnet8")]
    days = papers.load("11_fedavg", "quick", "hit-uav")
    assert (days.federation.partition, days.federation.clients) == ("natural", 9) and days.labels_needed() <= 100
    assert papers.load("11_fedavg", "paper").labels_needed() == 220  # released code: 22 cycles of 10
    missing = papers.load("11_fedavg", "paper", "kitti").federation
    assert (missing.partition, missing.missing_classes) == ("missing", papers.van_bommel.KITTI_MISSING)
    huale = papers.load("20_huale", "paper", "coco")
    assert (huale.query.pool_subset_size, huale.query.initial_labels, huale.training.epochs) == (10_000, 5000, 20)


@pytest.mark.parametrize("profile", config.PROFILES)
@pytest.mark.parametrize("number", NOTEBOOKS)
def test_every_notebook_has_all_sizes_for_all_data(number, profile):
    """Known names and folders, through JSON and back; each method is there once."""
    for data in (None, "digits", "bccd", "voc07", "hit-uav", "some/folder"):
        loaded = papers.load(f"{number}_x", profile, data)
        assert loaded.profile == profile and len(set(loaded.methods)) == len(loaded.methods) > 0
        assert config.Config.of(**json.loads(json.dumps(loaded.flat()))) == loaded


def test_notebooks_11_to_13_share_their_runs():
    """The communication notebook reads the runs of the other two: one digest at every profile and data set."""
    for profile, data in (("smoke", None), ("quick", "bccd"), ("paper", None), ("paper", "kitti")):
        assert len({papers.load(n, profile, data).digest() for n in WITHIN}) == 1
    every = papers.load("13_communication").methods
    assert set(papers.load("11_fedavg").methods) | set(papers.load("12_chain").methods) == set(every)


def test_the_single_node_has_the_labels_and_steps_of_all_clients():
    one, many = papers.load("10_centralised"), papers.load("11_fedavg")
    clients = many.federation.clients
    assert one.federation.clients == 1 and "centralised" not in one.methods
    assert one.labels_needed() == clients * many.labels_needed()
    assert one.federation.iterations == clients * many.federation.iterations
    assert papers.load("10_centralised", clients=2).federation.clients == 2  # who asks for clients gets them


def test_overrides_have_the_last_word_and_unknown_names_are_refused():
    loaded = papers.load("11_fedavg", "smoke", None, [3], clients=2, methods=["max"])
    assert (loaded.seeds, loaded.federation.clients, loaded.methods) == ((3,), 2, ("max",))
    with pytest.raises(ValueError, match="unknown parameter 'client'; did you mean 'clients'"):
        papers.load("11_fedavg", client=2)
    with pytest.raises(ValueError, match="profile must be one of"):
        papers.load("11_fedavg", "huge")
