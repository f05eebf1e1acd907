"""What a config builds, from one generator; and what it cannot build, with the reason."""

import pytest
import torch

from fedal_utils.config import Config
from fedal_utils.detectors import build, build_vae
from fedal_utils.seeding import torch_rng_for


def made(seed=0, classes=3, **options):
    rng = torch_rng_for(seed, "weights")
    return build_vae(Config.of(**options), rng) if "vae_size" in options else build(Config.of(**options), classes, rng)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"detector": "faster_rcnn"},
        {"detector": "yolo", "width_multiple": 0.125},
        {"classifier": "resnet8"},
        {"vae_size": (16, 16), "latent": 4},
    ],
)
def test_weights_come_from_the_generator_and_the_global_one_is_left_alone(options):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    a, b, c = (made(seed, **options).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a[k], b[k]) for k in a) and not all(torch.equal(a[k], c[k]) for k in a)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": 0}, "at least one class, got 0"),
        ({"backbone": "vgg16", "detector": "faster_rcnn"}, "'faster_rcnn' takes a backbone of .* got 'vgg16'"),
        ({"backbone": "vgg16"}, r"SSD300 needs \(300, 300\), got \(64, 64\)"),
        ({"image_size": (64, 80)}, r"multiples of 32, got \(64, 80\)"),
        ({"frozen": True}, "frozen, layers of 'small' would stay random"),
        ({"box_loss": "efficient_iou"}, "'ssd' has no RoI heads for box_loss"),
        ({"detector": "yolo", "box_loss_head": True}, "'yolo' has no box_loss_head"),
        ({"detector": "faster_rcnn", "image_loss_head": True}, "'faster_rcnn' has no image_loss_head: use 'ssd'"),
        ({"classifier": "resnet9"}, "resnet9"),
        ({"classifier": "conv4", "image_size": (15, 16)}, r"sides >= 16, got \(15, 16\)"),
        ({"vae_architecture": "published", "vae_size": (300, 299)}, r"\(300, 300\) and nothing else.*\(300, 299\)"),
        *(({"vae_size": size}, "multiples of 8 in 16..256") for size in ((20, 16), (16, 20), (8, 16), (16, 264))),
    ],
)
def test_what_cannot_be_built_is_an_error_that_says_why(options, message):
    with pytest.raises(ValueError, match=message):
        made(**options)
