"""The frozen dataclass of an experiment: what it refuses, and a digest that moves with every number that matters."""

import dataclasses
import json

import pytest

from fedal_utils import config, papers
from fedal_utils.config import Config, TrainingConfig, checked


def test_a_config_is_frozen_and_a_recipe():
    c = Config.of()
    assert isinstance(c, TrainingConfig)
    with pytest.raises(dataclasses.FrozenInstanceError):
        c.lr = 1.0


CHOICES = {
    "optimizer_state": "client",
    "on_failure": "skip",
    "box_loss": "extended_iou",
    "auxiliary_head": "sides",
    "vae_architecture": "published",
    "vae_images": "all",
    "standardise_by": "rank",
    "server_strategy": "fedadam",
    "privacy": "clip",
}


def another(name, value):
    """A different, allowed value of the same type."""
    if name == "profile":
        return "quick"
    if name == "too_large":
        return 2.0
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return value / 2 + 0.0625
    if name in CHOICES:
        return CHOICES[name]
    if name in ("cascade", "cascade_order"):
        return (5.0, *value[1:]) if name == "cascade" else value[::-1]
    if isinstance(value, str):
        return value + "x"
    if value is None:
        return 7
    return (*value, *value[-1:]) if value else ((1,),)


LISTS = ("methods", "seeds", "side_seeds")  # which runs there are, not what one of them does


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(Config) if f.name not in LISTS])
def test_every_number_moves_the_digest(field):
    base = Config.of()
    changed = dataclasses.replace(base, **{field: another(field, getattr(base, field))})
    assert getattr(changed, field) != getattr(base, field)
    assert changed.digest() != base.digest()


def test_methods_and_seeds_do_not_move_the_digest():
    base = Config.of()
    assert base.replace(methods=["random"], seeds=[5]).digest() == base.digest()
    assert int(base.digest(), 16) >= 0 and len(base.digest()) >= 8


@pytest.mark.parametrize(("data", "digest"), [("neu-det", "0362d65d"), ("carla", "022258fd")])
def test_runs_published_before_the_later_settings_keep_their_folder(data, digest):
    settings = papers.load("11_fedavg", "quick", data)
    assert settings.digest()[:8] == digest
    assert settings.replace(proximal=0.0, max_update_ratio=0.0).digest()[:8] == digest
    for later in ({"dropout_rate": 0.1}, {"proximal": 0.01}, {"max_update_ratio": 3.0}):
        assert settings.replace(**later).digest()[:8] != digest


def test_every_run_in_results_is_still_in_the_folder_of_its_config(root):
    """The config.json of a run, with the settings that came later at their defaults, gives the name of its folder."""
    stored = {p: json.loads(p.read_text()) for p in (root / "results" / "runs").glob("*/*/*/seed*/config.json")}
    known = set(config.fields()) - set(LISTS) - set(config._LATER)
    stored = {p: one for p, one in stored.items() if known <= set(one["config"])}  # what is left of drafts is older
    if not stored:
        pytest.skip("no results in this checkout")
    for path, one in stored.items():
        digest = Config.of(**checked(one["config"])).digest()
        assert digest == one["digest"] and digest[:8] == path.parts[-4], path


def test_a_config_goes_through_json_and_back():
    base = Config.of(missing_classes=((0, 1), (2,)), lr=1 / 3, seeds=(3,))
    there = checked(json.loads(json.dumps(base.as_dict())))
    assert Config.of(**there) == base
    assert Config.of(**there).digest() == base.digest()


def test_an_integer_for_a_float_is_the_same_config():
    assert checked({"lr": 1}) == {"lr": 1.0} and isinstance(checked({"lr": 1})["lr"], float)
    assert Config.of().replace(dirichlet_alpha=1).digest() == Config.of().replace(dirichlet_alpha=1.0).digest()
    assert Config.of().replace(zoom=[1, 2]).digest() == Config.of().replace(zoom=(1.0, 2.0)).digest()


def test_lists_become_tuples_all_the_way_down():
    assert checked({"missing_classes": [[0], [1, 2]], "image_size": [64, 96]}) == {
        "missing_classes": ((0,), (1, 2)),
        "image_size": (64, 96),
    }


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"roundz": 3}, "unknown parameter 'roundz'; did you mean 'rounds'"),
        ({"qqqqqq": 3}, "unknown parameter 'qqqqqq'.* Known: .*alpha"),
        ({"rounds": "3"}, "parameter 'rounds' must be int, got '3'"),
        ({"rounds": 3.0}, "parameter 'rounds' must be int, got 3.0"),
        ({"rounds": True}, "parameter 'rounds' must be int, got True"),
        ({"lr": "fast"}, "parameter 'lr' must be float, got 'fast'"),
        ({"frozen": 1}, "parameter 'frozen' must be bool, got 1"),
        ({"methods": "random"}, "parameter 'methods' must be tuple, got 'random'"),
        ({"methods": ["random", 3]}, "parameter 'methods' must hold values of type str"),
        ({"seeds": [0.5]}, "parameter 'seeds' must hold values of type int"),
        ({"image_size": 64}, "parameter 'image_size' must be tuple, got 64"),
        ({"dataset": None}, "parameter 'data' must be str, got None"),
    ],
)
def test_unknown_names_and_wrong_types_are_refused_with_a_hint(values, message):
    with pytest.raises(ValueError, match=message):
        checked(values)
    with pytest.raises(ValueError, match=message):
        Config.of().replace(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"profile": "huge"}, r"profile must be one of \('smoke', 'quick', 'paper'\), got 'huge'"),
        *(
            ({name: 0}, f"{name} must be 1 or more, got 0")
            for name in ("batch", "clients", "cycles", "rounds", "first", "budget")
        ),
        ({"initial_model_images": -1}, "start_images must be 0 or more, got -1"),
        ({"seeds": ()}, "seeds must be"),
        ({"seeds": (1, 1)}, "seeds must be a list of different integers"),
        ({"lr": 0.0}, "lr must be > 0, got 0.0"),
        ({"lr": float("nan")}, "lr must be > 0, got nan"),
        *(({name: 1.5}, rf"{name} must be in \[0, 1\], got 1.5") for name in ("flip", "score_above", "nms_iou")),
        *(({name: -0.1}, rf"{name} must be in \[0, 1\], got -0.1") for name in ("lost", "mosaic")),
        *(
            ({name: -1}, f"{name} must be 0 or more, got -1")
            for name in ("merge_images", "tail", "passes", "nominal", "warmup", "start_warmup")
        ),
        ({"first_pass_rounds": 0}, "first_pass and visit must be > 0, got 0 and 1.0"),
        ({"visit_fraction": 0.0}, "first_pass and visit must be > 0, got 10 and 0.0"),
        ({"optimizer_state": "lost"}, r"optimiser_state must be one of .*'travels'\), got 'lost'"),
        ({"on_failure": "retry"}, r"on_failure must be one of \('stop', 'skip'\), got 'retry'"),
        ({"round_lr_decay": 0.0}, r"anneal must be in \(0, 1\], got 0.0"),
        ({"feature_side": 0}, "feature_side must be 1 or more, got 0"),
        *(({name: 1.5}, rf"{name} must be in \[0, 1\], got 1.5") for name in ("annotator_error", "goal")),
        ({"goal": float("nan")}, r"goal must be in \[0, 1\], got nan"),
        ({"regularisation": 0.0}, "regularisation must be > 0, got 0.0"),
        ({"plateau": -0.5}, "plateau must be >= 0, got -0.5"),
        ({"proximal": -0.01}, "proximal must be >= 0, got -0.01"),
        ({"proximal": float("nan")}, "proximal must be >= 0, got nan"),
        *(
            ({"max_update_ratio": value}, rf"too_large must be 0 \(off\) or a finite number > 1, got {value}")
            for value in (-2.0, 0.5, 1.0, float("inf"), float("nan"))
        ),
        ({"client_fraction": 0.0}, r"fraction must be in \(0, 1\], got 0.0"),
        ({"client_fraction": 1.5}, r"fraction must be in \(0, 1\], got 1.5"),
    ],
)
def test_impossible_numbers_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Config.of(**values)


def test_labels_needed_is_the_first_ones_and_the_budget_of_every_later_cycle():
    assert Config.of(initial_labels=8, query_size=5, cycles=4).labels_needed() == 8 + 3 * 5
    assert Config.of(initial_labels=8, query_size=5, cycles=1).labels_needed() == 8
    assert (
        papers.load("12_chain", "paper", chain_passes=1).labels_needed() == 220
    )  # the chain's first visits ask for all


@pytest.mark.parametrize(
    ("change", "answer"),
    [
        ({}, False),
        ({"flip": 1.0}, False),
        ({"colour": 0.1}, True),
        ({"zoom": (0.9, 1.1)}, True),
        ({"shift": 0.1}, True),
    ],
)
def test_a_flip_alone_does_not_change_pixels(change, answer):
    assert TrainingConfig.of(**change).changes_pixels() is answer


def test_fields_lists_what_a_config_has():
    assert set(config.fields()) == {f.name for f in dataclasses.fields(Config)}


# --- load -------------------------------------------------------------------------------------------------------------


def test_a_profile_changes_numbers_and_data_bring_their_detector():
    smoke, quick = papers.load("00_start_here"), papers.load("00_start_here", "quick")
    assert (smoke.data, smoke.detector, quick.data, quick.detector) == ("digits", "ssd", "bccd", "ssd")
    assert (smoke.backbone, quick.backbone) == ("small", "lite0")
    assert papers.load("20_huale", "smoke", "bccd").frozen and papers.load("11_fedavg", "quick", "digits").scenes
    for number in ("10_centralised", "11_fedavg", "12_chain", "13_communication"):
        small, full = papers.load(number, clients=3), papers.load(number, "paper", clients=9)
        assert (small.detector, small.data, full.detector, full.data) == ("yolo", "digits", "yolo", "kitti-2")
    assert papers.load("11_fedavg", "paper").labels_needed() == 220  # released code: 22 cycles of 10
    assert papers.load("11_fedavg", "paper", "kitti").missing == papers.van_bommel.KITTI_MISSING
    assert papers.load("11_fedavg", "quick", "carla").partition == "natural"


def test_notebooks_11_to_13_share_their_runs():
    """The communication notebook reads the runs of the other two: one digest at every profile and data set."""
    for profile, data in (("smoke", None), ("quick", "bccd"), ("quick", "carla"), ("paper", None), ("paper", "kitti")):
        assert (
            len({papers.load(n, profile, data).digest() for n in ("11_fedavg", "12_chain", "13_communication")}) == 1
        )
    every = papers.load("13_communication").methods
    assert set(papers.load("11_fedavg").methods) | set(papers.load("12_chain").methods) == set(every)


def test_the_single_node_has_the_labels_and_steps_of_all_clients():
    one, many = papers.load("10_centralised"), papers.load("11_fedavg")
    assert one.clients == 1 and "centralised" not in one.methods
    assert one.labels_needed() == many.clients * many.labels_needed()
    assert one.iterations == many.clients * many.iterations


def test_overrides_have_the_last_word_and_unknown_names_are_refused():
    settings = papers.load("11_fedavg", "smoke", None, [3], clients=2, methods=["max"])
    assert (settings.seeds, settings.federation.clients, settings.methods) == ((3,), 2, ("max",))
    with pytest.raises(ValueError, match="unknown parameter 'client'; did you mean 'clients'"):
        papers.load("11_fedavg", client=2)
    with pytest.raises(ValueError, match="profile must be one of"):
        papers.load("11_fedavg", "huge")


@pytest.mark.parametrize(
    "values, message",
    [
        ({"box_loss": "giou"}, "box_loss must be one of .*smooth_l1.*'giou'"),
        ({"auxiliary_head": "both"}, "companion must be one of .*sides.*'both'"),
        (
            {"cascade_order": ("semantic", "overlap")},
            "cascade_order must name each of .* once, got .'semantic', 'overlap'",
        ),
        ({"cascade": (4.0, 3.0, 2.0)}, "cascade must be four numbers"),
        ({"cascade": (4.0, 5.0, 2.0, 1.5)}, "cascade must be four numbers >= 1 that do not grow"),
        ({"cascade": (4.0, 3.0, 2.0, 0.5)}, "cascade must be four numbers >= 1"),
        ({"quota": 1.5}, r"quota must be in \[0, 1\], got 1.5"),
        ({"reset_each_cycle": True, "optimizer_state": "client"}, "afresh=True .*'client' cannot live on"),
    ],
)
def test_a_setting_of_the_cascade_or_the_losses_is_checked_at_once(values, message):
    with pytest.raises(ValueError, match=message):
        Config.of(**values)


def test_notebook_20_has_sizes_of_its_own_and_photographs_without_an_entry_too():
    for profile, name in (
        ("smoke", None),
        ("quick", None),
        ("quick", "carla"),
        ("quick", "some/folder"),
        ("paper", "coco"),
    ):
        settings = papers.load("20_huale", profile, name)
        assert (settings.model.detector, settings.federation.clients, settings.federation.partition) == (
            "faster_rcnn",
            1,
            "iid",
        )
        assert (
            settings.federation.reset_each_cycle
            and settings.federation.rounds == 1
            and settings.federation.initial_model_images == 0
        )
        assert settings.methods == ("random", "entropy_max", "cald", "cascade")
    assert (
        papers.load("20_huale", "paper").data == "voc07" and papers.load("20_huale", "paper", "coco").scored == 10_000
    )
    assert papers.load("11_fedavg", "paper").data == "kitti-2"
    epochs = papers.load("20_huale", "paper", "voc12")
    assert (epochs.first, epochs.budget, epochs.cycles, epochs.epochs, epochs.step_at) == (500, 500, 7, 20, (0.8, 0.95))
