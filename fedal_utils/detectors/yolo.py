"""YOLO of the shape published as YOLOv5s 5.0 (van Bommel 2021), and smaller, written from a description.

CSP blocks of 1911.11929, pyramid pooling of 1406.4729, path aggregation of 1803.01534.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import ModelConfig
from ..data import FILL, clip_boxes, flip_boxes
from .base import Detector, Inputs, RawDetections
from .yolo_loss import STRIDES, cells_of, decode, yolo_loss

ANCHORS = (  # width, height in pixels of a 640 px image, three a level; from released code, fitted to COCO
    ((10, 13), (16, 30), (33, 23)),
    ((30, 61), (62, 45), (59, 119)),
    ((116, 90), (156, 198), (373, 326)),
)
VIEWS = ((1.0, False), (0.83, True), (0.67, False))  # (scale, mirrored) of test-time augmentation; from released code


class ConvNorm(nn.Module):
    """Convolution without bias, normalisation (BatchNorm with the released code's constants), SiLU."""

    def __init__(self, inputs: int, outputs: int, side: int, norm: str, stride: int = 1):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, side, stride, side // 2, bias=False)
        batch = nn.BatchNorm2d(outputs, eps=1e-3, momentum=0.03)
        self.norm = batch if norm == "batch" else nn.GroupNorm(outputs // (4 if outputs % 8 else 8), outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x))
        return F.silu(x, inplace=not x.requires_grad)  # autograd would copy what is overwritten


class Bottleneck(nn.Module):
    """1x1 and 3x3 convolution, their input added if `shortcut`."""

    def __init__(self, channels: int, shortcut: bool, norm: str):
        super().__init__()
        self.narrow, self.wide = ConvNorm(channels, channels, 1, norm), ConvNorm(channels, channels, 3, norm)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        out = self.wide(self.narrow(x))
        return x + out if self.shortcut else out


class CSP(nn.Module):
    """Cross-stage partial block: one half of the channels goes through the bottlenecks, one half around them."""

    def __init__(self, inputs: int, outputs: int, repeats: int, shortcut: bool, norm: str):
        super().__init__()
        half = outputs // 2
        self.through, self.around = ConvNorm(inputs, half, 1, norm), ConvNorm(inputs, half, 1, norm)
        self.blocks = nn.Sequential(*(Bottleneck(half, shortcut, norm) for _ in range(repeats)))
        self.join = ConvNorm(2 * half, outputs, 1, norm)

    def forward(self, x: Tensor) -> Tensor:
        return self.join(torch.cat([self.blocks(self.through(x)), self.around(x)], dim=1))


class PyramidPooling(nn.Module):
    """The map beside its maxima over 5x5, 9x9 and 13x13 cells."""

    def __init__(self, channels: int, norm: str):
        super().__init__()
        self.enter = ConvNorm(channels, channels // 2, 1, norm)
        self.leave = ConvNorm(channels // 2 * 4, channels, 1, norm)

    def forward(self, x: Tensor) -> Tensor:
        views = [self.enter(x)]
        for _ in range(3):  # 5x5 over 5x5 is 9x9, and once more 13x13, at a third of the work
            views.append(F.max_pool2d(views[-1], 5, stride=1, padding=2))
        return self.leave(torch.cat(views, dim=1))


class Stem(nn.Module):
    """Pixels 0..255 to [0, 1], each 2x2 block of pixels to 12 channels, 3x3 convolution."""

    def __init__(self, outputs: int, norm: str):
        super().__init__()
        self.conv = ConvNorm(12, outputs, 3, norm)

    def forward(self, pixels: Tensor) -> Tensor:
        x = F.pixel_unshuffle(pixels, 2)  # (B, 12, H / 2, W / 2)
        # Channels last: a training step on a CPU takes 10 to 25 % less, and all later layers keep the format.
        return self.conv(x.to(self.conv.conv.weight.dtype, memory_format=torch.channels_last) / 255)


class Backbone(nn.Module):
    """Modules 0..9 of the published list; the maps after 4, 6 and 9 (strides 8, 16, 32) are handed out."""

    strides = STRIDES

    def __init__(self, channels: tuple[int, int, int, int, int], repeats: tuple[int, int], norm: str):
        super().__init__()
        (c1, c2, c3, c4, c5), (few, many) = channels, repeats
        stages = [Stem(c1, norm), ConvNorm(c1, c2, 3, norm, stride=2), CSP(c2, c2, few, True, norm)]  # stride 4
        stages += [ConvNorm(c2, c3, 3, norm, stride=2), CSP(c3, c3, many, True, norm)]  # 4, stride 8
        stages += [ConvNorm(c3, c4, 3, norm, stride=2), CSP(c4, c4, many, True, norm)]  # 6, stride 16
        stages += [ConvNorm(c4, c5, 3, norm, stride=2), PyramidPooling(c5, norm), CSP(c5, c5, few, False, norm)]  # 9
        self.stages = nn.ModuleList(stages)
        self.channels = (c3, c4, c5)

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        maps = [pixels]
        for stage in self.stages:
            maps.append(stage(maps[-1]))
        return maps[5], maps[7], maps[10]


class PathAggregation(nn.Module):
    """Top-down and then bottom-up exchange between the three maps; channels as they came in."""

    def __init__(self, channels: tuple[int, int, int], repeats: int, norm: str):
        super().__init__()
        c3, c4, c5 = channels
        self.enter5, self.down4 = ConvNorm(c5, c4, 1, norm), CSP(2 * c4, c4, repeats, False, norm)
        self.enter4, self.out3 = ConvNorm(c4, c3, 1, norm), CSP(2 * c3, c3, repeats, False, norm)
        self.up3, self.out4 = ConvNorm(c3, c3, 3, norm, stride=2), CSP(2 * c3, c4, repeats, False, norm)
        self.up4, self.out5 = ConvNorm(c4, c4, 3, norm, stride=2), CSP(2 * c4, c5, repeats, False, norm)

    def forward(self, maps: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        p3, p4, p5 = maps
        top5 = self.enter5(p5)
        top4 = self.enter4(self.down4(torch.cat([F.interpolate(top5, scale_factor=2.0), p4], dim=1)))
        out3 = self.out3(torch.cat([F.interpolate(top4, scale_factor=2.0), p3], dim=1))
        out4 = self.out4(torch.cat([self.up3(out3), top4], dim=1))
        return out3, out4, self.out5(torch.cat([self.up4(out4), top5], dim=1))


class YOLO(Detector):
    """The detector; depth_multiple 0.33 and width_multiple 0.5 are the published "s"; anchors x anchor_side / 10."""

    nms_iou, candidates = 0.6, 1000

    def __init__(self, config: ModelConfig, image_size: tuple[int, int], classes: int):
        super().__init__(config, image_size, classes)
        channels = tuple(math.ceil(c * config.width_multiple / 8) * 8 for c in (64, 128, 256, 512, 1024))
        few, many = (max(1, round(n * config.depth_multiple)) for n in (3, 9))
        self.backbone = Backbone(channels, (few, many), config.norm)
        self.neck = PathAggregation(self.backbone.channels, few, config.norm)
        scale = config.anchor_side / ANCHORS[0][0][0]
        anchors = torch.tensor(ANCHORS, dtype=torch.float32) * scale  # (L, P, 2)
        self.head = nn.ModuleList(nn.Conv2d(c, anchors.shape[1] * (5 + classes), 1) for c in self.backbone.channels)
        self.loss_weights, cells = config.loss_weights, cells_of(image_size, anchors)
        for name in ("anchors", "levels", "grid"):
            self.register_buffer(name, getattr(cells, name), persistent=False)
        self.counts = cells.counts
        # From released code, for 640 px: biases start at the logarithm of eight objects in an image of side x side px.
        for stride, layer in zip(STRIDES, self.head, strict=True):
            bias = layer.bias.data.view(-1, 5 + classes)
            bias[:, 4] = math.log(min(1.0, 8 / (640 * scale / stride) ** 2))
            bias[:, 5:] = math.log(0.6 / (classes - 0.99999))

    def raw(self, maps: tuple[Tensor, ...]) -> Tensor:
        """Outputs (B, A, 5 + C) float32 of the backbone's maps, of whatever size."""
        outputs = (layer(m) for layer, m in zip(self.head, self.neck(maps), strict=True))  # (B, P (5 + C), h, w)
        return torch.cat([o.permute(0, 2, 3, 1).reshape(len(o), -1, 5 + self.classes) for o in outputs], 1).float()

    def forward(self, inputs: Inputs) -> Tensor:
        return self.raw(self.maps(inputs))

    def loss(self, inputs: Inputs, boxes: Tensor, classes: Tensor, ignore: Tensor, generator=None) -> dict[str, Tensor]:
        """{"box", "objectness", "classification"}; see `yolo_loss`."""
        return yolo_loss(self(inputs), boxes, classes, ignore, self, self.loss_weights)

    def raw_detections(self, inputs: Inputs, views=((1.0, False),)) -> RawDetections:
        """All outputs as boxes; the score is objectness x class probability, background 1 - objectness.

        views: (scale, mirrored) of the images to predict on, see `VIEWS`; all of them go through one NMS.
        """
        parts = [self._view(inputs, scale, mirrored) for scale, mirrored in views]
        boxes, raw, level = (torch.cat(of_views, dim=1) for of_views in zip(*parts, strict=True))
        objectness = raw[..., 4:5].sigmoid()
        if self.classes == 1:  # its output was never trained
            probability = share = torch.ones_like(raw[..., 5:])
        else:
            probability = raw[..., 5:].sigmoid()
            share = F.logsigmoid(raw[..., 5:]).softmax(-1)  # p / sum p, also where every p is tiny
        probs = torch.cat([1 - objectness, objectness * share], dim=-1)  # (B, A, C + 1)
        return RawDetections(boxes, probs, objectness * probability, {"level": level})

    def _view(self, inputs: Inputs, scale: float, mirrored: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes (B, A, 4) in the frame of the full image, raw outputs (B, A, 5 + C) and levels (B, A) of one view."""
        height, width = self.image_size
        if scale == 1 and not mirrored:
            raw, grid = self(inputs), self.grid
            boxes = decode(raw, grid)
        else:
            pixels = inputs.flip(-1) if mirrored else inputs
            inner = (max(1, round(height * scale)), max(1, round(width * scale)))
            canvas = tuple(-(-side // STRIDES[-1]) * STRIDES[-1] for side in inner)
            if inner != self.image_size:
                pixels = F.interpolate(pixels.float(), inner, mode="bilinear", align_corners=False, antialias=True)
            pixels = F.pad(pixels, (0, canvas[1] - inner[1], 0, canvas[0] - inner[0]), value=FILL)
            raw, grid = self.raw(self.backbone(pixels)), cells_of(canvas, self.anchors).grid
            boxes = decode(raw, grid)
            boxes = boxes * boxes.new_tensor([width / inner[1], height / inner[0]] * 2)
            boxes = flip_boxes(boxes, width) if mirrored else boxes
        level = (grid[:, 2] / STRIDES[0]).log2().round().long()  # (A,) 0 = finest
        return clip_boxes(boxes, self.image_size), raw, level.expand(raw.shape[:2])
