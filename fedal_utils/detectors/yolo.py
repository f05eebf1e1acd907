"""YOLO: a one-stage detector with anchors, of the shape that was published as YOLOv5s 5.0 and in smaller sizes.

Same interface as `detectors.SSD`: `features`, `loss`, `predict`, a backbone that can be frozen. Written from a
description of the architecture (the detector of van Bommel 2021); the CSP blocks are of 1911.11929, the pyramid pooling
of 1406.4729, the path aggregation head of 1803.01534, the CIoU loss of 1911.08287. "From released code" marks a number
or formula that no paper states.

Raw outputs are (B, A, 5 + C): x, y, w, h, objectness, classes; A runs over levels (stride 8, 16, 32), rows, columns and
the three anchors of a cell, the anchor fastest. Boxes are xyxy pixels, sides and centres too.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import complete_box_iou_loss

from ..data.augment import FILL
from ..data.boxes import Detections, clip_boxes, flip_boxes
from ..seeding import borrowed_global_rng
from .backbones import norm_layer
from .base import Detector, Inputs, select_detections

STRIDES = (8, 16, 32)
ANCHORS = (  # width, height in pixels of a 640 px image, three a level; from released code, fitted to COCO
    ((10, 13), (16, 30), (33, 23)),
    ((30, 61), (62, 45), (59, 119)),
    ((116, 90), (156, 198), (373, 326)),
)
MATCH_RATIO = 4.0  # a box and an anchor whose sides differ by this factor or more have nothing to do with each other
BALANCE = (4.0, 1.0, 0.4)  # of the levels' objectness, finest first; from released code
VIEWS = ((1.0, False), (0.83, True), (0.67, False))  # (scale, mirrored) of test-time augmentation; from released code

# ------------------------------------------------------------------------------------------------------- architecture


def _normalisation(norm: str, channels: int) -> nn.Module:
    """BatchNorm with the released code's constants, or GroupNorm of 8 channels a group (4 where 8 do not divide)."""
    if norm == "batch":
        return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.03)
    if norm == "group" and channels % 8:
        return nn.GroupNorm(channels // 4, channels)
    return norm_layer(norm, channels)


class ConvNorm(nn.Module):
    """Convolution without bias, normalisation, SiLU; `fold` moves the normalisation into the convolution."""

    def __init__(self, inputs: int, outputs: int, side: int, norm: str, stride: int = 1):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, side, stride, side // 2, bias=False)
        self.norm = _normalisation(norm, outputs)

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
        x = x.to(self.conv.conv.weight.dtype, memory_format=torch.channels_last)
        return self.conv(x / 255)


class Backbone(nn.Module):
    """Modules 0..9 of the published list; the maps after 4, 6 and 9 (strides 8, 16, 32) are handed out."""

    strides = STRIDES

    def __init__(self, channels: tuple[int, int, int, int, int], repeats: tuple[int, int], norm: str):
        super().__init__()
        c1, c2, c3, c4, c5 = channels
        few, many = repeats
        self.stages = nn.ModuleList(
            [
                Stem(c1, norm),  # 0, stride 2
                ConvNorm(c1, c2, 3, norm, stride=2),
                CSP(c2, c2, few, True, norm),  # 2, stride 4
                ConvNorm(c2, c3, 3, norm, stride=2),
                CSP(c3, c3, many, True, norm),  # 4, stride 8
                ConvNorm(c3, c4, 3, norm, stride=2),
                CSP(c4, c4, many, True, norm),  # 6, stride 16
                ConvNorm(c4, c5, 3, norm, stride=2),
                PyramidPooling(c5, norm),
                CSP(c5, c5, few, False, norm),  # 9, stride 32
            ]
        )
        self.channels = (c3, c4, c5)

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        if pixels.shape[-2] % STRIDES[-1] or pixels.shape[-1] % STRIDES[-1]:
            raise ValueError(f"YOLO needs image sides that are multiples of 32, got {tuple(pixels.shape[-2:])}")
        maps, x = [], pixels
        for number, stage in enumerate(self.stages):
            x = stage(x)
            if number in (4, 6, 9):
                maps.append(x)
        return tuple(maps)


class PathAggregation(nn.Module):
    """Top-down and then bottom-up exchange between the three maps; channels as they came in."""

    def __init__(self, channels: tuple[int, int, int], repeats: int, norm: str):
        super().__init__()
        c3, c4, c5 = channels
        self.enter5 = ConvNorm(c5, c4, 1, norm)
        self.down4 = CSP(2 * c4, c4, repeats, False, norm)
        self.enter4 = ConvNorm(c4, c3, 1, norm)
        self.out3 = CSP(2 * c3, c3, repeats, False, norm)
        self.up3 = ConvNorm(c3, c3, 3, norm, stride=2)
        self.out4 = CSP(2 * c3, c4, repeats, False, norm)
        self.up4 = ConvNorm(c4, c4, 3, norm, stride=2)
        self.out5 = CSP(2 * c4, c5, repeats, False, norm)

    def forward(self, maps: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        p3, p4, p5 = maps
        top5 = self.enter5(p5)
        top4 = self.enter4(self.down4(torch.cat([F.interpolate(top5, scale_factor=2.0), p4], dim=1)))
        out3 = self.out3(torch.cat([F.interpolate(top4, scale_factor=2.0), p3], dim=1))
        out4 = self.out4(torch.cat([self.up3(out3), top4], dim=1))
        return out3, out4, self.out5(torch.cat([self.up4(out4), top5], dim=1))


# ------------------------------------------------------------------------------------------------------ boxes and cells


def cell_grid(image_size: tuple[int, int], anchors: Tensor) -> Tensor:
    """What every output needs to become a box: (A, 5) origin x, origin y, stride, anchor width, anchor height, pixels.

    anchors (L, P, 2). The origin is half a cell left of and above the cell: a centre may lie from there to half a cell
    beyond the other side, so that a neighbouring cell can answer for an object.
    """
    parts = []
    for stride, own in zip(STRIDES, anchors, strict=True):
        y, x = torch.meshgrid(
            *(torch.arange(side // stride, device=anchors.device, dtype=anchors.dtype) for side in image_size),
            indexing="ij",
        )
        cells = torch.stack([(x - 0.5) * stride, (y - 0.5) * stride, torch.full_like(x, stride)], dim=-1)  # (h, w, 3)
        shape = (*x.shape, len(own))
        parts.append(torch.cat([cells[:, :, None].expand(*shape, 3), own.expand(*shape, 2)], dim=-1).flatten(0, 2))
    return torch.cat(parts)  # (A, 5)


def _map_of(grid: Tensor) -> Tensor:
    """Number of the map that each row of `cell_grid` belongs to, 0 = finest: (A,)."""
    return (grid[:, 2] / STRIDES[0]).log2().round().long()


def decode(raw: Tensor, grid: Tensor) -> Tensor:
    """xyxy pixels of raw outputs (..., 4 or more): centre = (2 s - 0.5 + cell) stride, side = (2 s)^2 anchor.

    s: sigmoid of the output; grid: the rows of `cell_grid` that belong to raw, (..., 5). From released code.
    """
    twice = 2 * raw[..., :4].sigmoid()
    centre = twice[..., :2] * grid[..., 2:3] + grid[..., :2]
    half = twice[..., 2:].square() * grid[..., 3:] / 2
    return torch.cat([centre - half, centre + half], dim=-1)


def claim_cells(
    boxes: Tensor, classes: Tensor, ignore: Tensor, anchors: Tensor, image_size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Which outputs each box claims: index into A and whether it does, both (B, K, L, P, 3); 0 where it does not.

    A box claims an anchor if neither side differs by `MATCH_RATIO` or more; of that anchor's level it claims the cell
    its centre lies in, and the neighbour beyond the nearer border in x and the one in y, if there is one.
    Several boxes may claim one output. Example, centre (3.2, 5.9) in cells: claims (3, 5), (2, 5) and (3, 6).
    A border exactly as far as the other draws no neighbour: its cell could not reach the centre.
    """
    device, per_cell = boxes.device, anchors.shape[1]
    # rows of (width, height) in cells, one a level: built on the host, then one copy
    table = [[image_size[1] // s, image_size[0] // s, s] for s in STRIDES]
    firsts = [0]
    for width, height, _ in table[:-1]:
        firsts.append(firsts[-1] + width * height * per_cell)
    facts = torch.tensor([[*row, first] for row, first in zip(table, firsts, strict=True)], device=device)  # (L, 4)
    size, stride, first = facts[:, :2], facts[:, 2:3], facts[:, 3:]

    sides = boxes[..., 2:] - boxes[..., :2]  # (B, K, 2)
    ratio = sides[:, :, None, None] / anchors  # (B, K, L, P, 2)
    # Negated, so that a box that is not a number claims and its loss shows it; a plain < would drop it in silence.
    fits = ~(torch.maximum(ratio, 1 / ratio) >= MATCH_RATIO).any(-1)
    wanted = (classes > 0) & ~ignore & ~(sides <= 0).any(-1)
    fits = fits & wanted[..., None, None]  # (B, K, L, P)

    place = ((boxes[..., :2] + boxes[..., 2:]) / 2)[:, :, None] / stride  # (B, K, L, 2) centre in cells
    cell = torch.minimum(place.floor().long().clamp_(min=0), size - 1)
    beyond = place - cell - 0.5
    step = (beyond > 0).long() - (beyond < 0).long()  # towards the nearer border
    there = cell + step
    inside = (step != 0) & (there >= 0) & (there < size)  # (B, K, L, 2)

    x, y = cell.unbind(-1)
    columns = torch.stack([x, there[..., 0], x], dim=-1)  # (B, K, L, 3)
    rows = torch.stack([y, y, there[..., 1]], dim=-1)
    exists = torch.cat([torch.ones_like(inside[..., :1]), inside], dim=-1)  # (B, K, L, 3)
    index = first + (rows * size[:, :1] + columns) * per_cell  # (B, K, L, 3)
    claimed = fits[..., None] & exists[..., None, :]  # (B, K, L, P, 3)
    index = index[..., None, :] + torch.arange(per_cell, device=device)[:, None]
    return index * claimed, claimed


def yolo_loss(
    raw: Tensor,
    boxes: Tensor,
    classes: Tensor,
    ignore: Tensor,
    anchors: Tensor,
    image_size: tuple[int, int],
    gains: tuple[float, float, float] = (0.05, 1.0, 0.5),
    times_batch: bool = True,
) -> dict[str, Tensor]:
    """Box (CIoU), objectness and class loss of raw outputs (B, A, 5 + C) float32; their sum is to be minimised.

    In each level the box and class losses are means over the claims of the batch, objectness is one over all outputs,
    towards the CIoU of the box that the output predicts (0 where it is claimed by none or the CIoU is negative, the
    largest where it is claimed by several); levels are added, objectness in the proportions `BALANCE`. Outputs that no
    box claims and whose cell's centre lies in an ignored box do not count.
    gains: box, objectness, classes (the last for 80 classes: it is multiplied by C / 80; one class has no class loss).
    times_batch: multiplied by B, as in the released code, whose lr of 0.01 for SGD is meant for it.
    """
    count, _, columns = raw.shape
    number = columns - 5
    grid = cell_grid(image_size, anchors)
    if boxes.shape[1] == 0:  # a set without a single object has no column of boxes: give it one of padding
        boxes, classes, ignore = F.pad(boxes, (0, 0, 0, 1)), F.pad(classes, (0, 1)), F.pad(ignore, (0, 1))
    index, claimed = claim_cells(boxes, classes, ignore, anchors, image_size)
    levels, of_level = claimed.shape[2], claimed.flatten(3)  # (B, K, L, 3 P)
    index, claims = index.flatten(1), claimed.flatten(1)  # (B, R), R = K * L * 3 P
    claims_in_level = of_level.sum((0, 1, 3)).clamp(min=1)  # (L,)
    per_box = index.shape[1] // boxes.shape[1]

    def level_means(values: Tensor) -> Tensor:
        """Sum over levels of the means over claims; values (B, R)."""
        return ((values.view_as(of_level) * of_level).sum((0, 1, 3)) / claims_in_level).sum()

    own = raw.gather(1, index[..., None].expand(-1, -1, columns))  # (B, R, 5 + C)
    target = boxes.float().repeat_interleave(per_box, dim=1)  # (B, R, 4)
    found = decode(own, grid[index])
    # Where nothing is claimed the box is its own target: the 0 / 0 of a padding row would spoil the gradient.
    ciou_loss = complete_box_iou_loss(found, torch.where(claims[..., None], target, found.detach()))  # (B, R)
    box = level_means(ciou_loss)

    classification = raw.new_zeros(())
    if number > 1:
        one_hot = F.one_hot((classes - 1).clamp(min=0), number).to(raw.dtype).repeat_interleave(per_box, dim=1)
        wrong = F.binary_cross_entropy_with_logits(own[..., 5:], one_hot, reduction="none").mean(-1)
        classification = level_means(wrong)

    with torch.no_grad():
        quality = (1 - ciou_loss).clamp(min=0) * claims
        wanted = torch.zeros_like(raw[..., 4]).scatter_reduce(1, index, quality, "amax")  # in any order the same
        counts = torch.ones_like(wanted)
        ignored = ignore & (classes > 0)
        if ignored.is_cuda or bool(ignored.any()):  # on a GPU, looking costs more than doing
            middle = grid[:, :2] + grid[:, 2:3]  # (A, 2) origin + half a cell + half a cell
            x1, y1, x2, y2 = boxes[..., None].unbind(2)  # (B, K, 1)
            x, y = middle.T
            within = ((x >= x1) & (x <= x2) & (y >= y1) & (y <= y2) & ignored[..., None]).any(1)  # (B, A)
            positive = torch.zeros_like(wanted).scatter_reduce(1, index, claims.to(wanted), "amax")
            counts = (~within).to(wanted).maximum(positive)
    error = F.binary_cross_entropy_with_logits(raw[..., 4], wanted, reduction="none") * counts
    sizes = [(image_size[0] // s) * (image_size[1] // s) * anchors.shape[1] for s in STRIDES[:levels]]
    objectness = sum(
        share * part.sum() / many.sum().clamp(min=1)
        for share, part, many in zip(BALANCE, error.split(sizes, 1), counts.split(sizes, 1), strict=True)
    )
    factor = count if times_batch else 1
    return {
        "box": box * (gains[0] * factor),
        "objectness": objectness * (gains[1] * factor),
        "classification": classification * (gains[2] * number / 80 * factor),
    }


# ------------------------------------------------------------------------------------------------------------ detector


class YOLO(Detector):
    """The detector; made by `build`. `backbone` = modules 0..9, `neck` and `head` the rest."""

    def __init__(
        self,
        backbone: Backbone,
        neck: PathAggregation,
        classes: int,
        image_size: tuple[int, int],
        anchor_scale: float = 1.0,
        gains: tuple[float, float, float] = (0.05, 1.0, 0.5),
        times_batch: bool = True,
    ):
        super().__init__()
        anchors = torch.tensor(ANCHORS, dtype=torch.float32) * anchor_scale  # (L, P, 2)
        self.backbone, self.neck = backbone, neck
        self.head = nn.ModuleList(nn.Conv2d(c, anchors.shape[1] * (5 + classes), 1) for c in backbone.channels)
        self.image_size, self.classes = image_size, classes
        self.gains, self.times_batch = gains, times_batch
        self.register_buffer("anchors", anchors, persistent=False)
        self._expect_few_objects(640 * anchor_scale)

    @torch.no_grad()
    def _expect_few_objects(self, side: float) -> None:
        """Biases start at the logarithm of eight objects in an image of side x side px, and of a class.

        From released code, whose images and anchors are those of 640 px; scaled anchors mean a scaled image. (With the
        prior of 640 px, AP50 on BCCD at 160 px was up to 0.3 lower after 400 steps.)
        """
        for stride, layer in zip(STRIDES, self.head, strict=True):
            bias = layer.bias.view(-1, 5 + self.classes)
            bias[:, 4] = math.log(min(1.0, 8 / (side / stride) ** 2))
            bias[:, 5:] = math.log(0.6 / (self.classes - 0.99999))

    def raw(self, maps: tuple[Tensor, ...]) -> Tensor:
        """Outputs (B, A, 5 + C) float32 of the backbone's maps, of whatever size."""
        flat = []
        for layer, m in zip(self.head, self.neck(maps), strict=True):
            # (B, P (5 + C), h, w) -> rows, columns, anchors
            flat.append(layer(m).permute(0, 2, 3, 1).reshape(m.shape[0], -1, 5 + self.classes))
        return torch.cat(flat, dim=1).float()

    def forward(self, inputs: Inputs) -> Tensor:
        """Raw outputs (B, A, 5 + C)."""
        return self.raw(self.maps(inputs))

    def loss(
        self, inputs: Inputs, boxes: Tensor, classes: Tensor, ignore: Tensor, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """{"box", "objectness", "classification"}; see `yolo_loss`. Nothing is drawn from the generator."""
        return yolo_loss(
            self(inputs), boxes, classes, ignore, self.anchors, self.image_size, self.gains, self.times_batch
        )

    @torch.no_grad()
    def predict(
        self,
        inputs: Inputs,
        score_above: float = 0.01,
        nms_iou: float = 0.6,
        top: int = 100,
        candidates: int = 1000,
        class_agnostic: bool = False,
        views: Sequence[tuple[float, bool]] = ((1.0, False),),
    ) -> Detections:
        """Detections, best first; the score is objectness x class probability.

        probs: background = 1 - objectness, the rest shared by the classes in proportion to their probabilities.
        views: (scale, mirrored) of the images to look at, see `VIEWS`; what all of them show goes through one NMS.
        """
        if self.training:
            raise ValueError("predict needs eval mode: call detector.eval() first")
        views = [(float(scale), bool(mirrored)) for scale, mirrored in views]
        if not views or any(not scale > 0 for scale, _ in views):
            raise ValueError(f"views must be one or more pairs (scale > 0, mirrored), got {views}")
        if not isinstance(inputs, Tensor) and views != [(1.0, False)]:
            raise ValueError("scaled or mirrored views need pixels, but these inputs are cached features")
        seen = [self._view(inputs, *view) for view in views]
        boxes, raw, level = (torch.cat(parts, dim=1) for parts in zip(*seen, strict=True))
        objectness = raw[..., 4:5].sigmoid()
        if self.classes == 1:  # its output was never trained
            probability = share = torch.ones_like(raw[..., 5:])
        else:
            probability = raw[..., 5:].sigmoid()
            share = F.logsigmoid(raw[..., 5:]).softmax(-1)  # p / sum p, also where every p is tiny
        probs = torch.cat([1 - objectness, objectness * share], dim=-1)  # (B, A, C + 1)
        return select_detections(
            boxes,
            probs,
            score_above,
            nms_iou,
            top,
            candidates,
            class_agnostic,
            scores=objectness * probability,
            extra={"level": level},
        )

    def _view(self, inputs: Inputs, scale: float, mirrored: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes (B, A, 4) in the frame of the full image, raw outputs (B, A, 5 + C) and maps (B, A) of one view."""
        height, width = self.image_size
        if scale == 1 and not mirrored:
            raw, grid = self(inputs), cell_grid(self.image_size, self.anchors)
            return clip_boxes(decode(raw, grid), self.image_size), raw, _map_of(grid).expand(raw.shape[:2])
        self.check_size(inputs)
        pixels = inputs.flip(-1) if mirrored else inputs
        inner = (max(1, round(height * scale)), max(1, round(width * scale)))
        canvas = tuple(-(-side // STRIDES[-1]) * STRIDES[-1] for side in inner)
        if inner != self.image_size:
            pixels = F.interpolate(pixels.float(), inner, mode="bilinear", align_corners=False, antialias=True)
        pixels = F.pad(pixels, (0, canvas[1] - inner[1], 0, canvas[0] - inner[0]), value=FILL)
        raw = self.raw(self.backbone(pixels))
        grid = cell_grid(canvas, self.anchors)
        boxes = decode(raw, grid)
        boxes = boxes * boxes.new_tensor([width / inner[1], height / inner[0]] * 2)
        if mirrored:
            boxes = flip_boxes(boxes, width)
        return clip_boxes(boxes, self.image_size), raw, _map_of(grid).expand(raw.shape[:2])


@torch.no_grad()
def fold(model: YOLO) -> YOLO:
    """A copy for inference with every BatchNorm folded into its convolution; same outputs, nothing left to train."""
    folded = copy.deepcopy(model).eval()
    for module in folded.modules():
        if not isinstance(module, ConvNorm):
            continue
        norm, conv = module.norm, module.conv
        if not isinstance(norm, nn.BatchNorm2d):
            raise ValueError(f"only BatchNorm can be folded into a convolution, found {type(norm).__name__}")
        scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()  # (out,)
        shift = norm.bias.double() - norm.running_mean.double() * scale
        conv.weight.copy_(conv.weight.double() * scale[:, None, None, None])
        conv.bias = nn.Parameter(shift.to(conv.weight.dtype))
        module.norm = nn.Identity()
    return folded.requires_grad_(False)


def build(
    classes: int,
    image_size: tuple[int, int],
    generator: torch.Generator,
    depth: float = 0.33,
    width: float = 0.50,
    norm: str = "batch",
    anchor_scale: float = 1.0,
    frozen: bool = False,
    gains: tuple[float, float, float] = (0.05, 1.0, 0.5),
    times_batch: bool = True,
) -> YOLO:
    """A YOLO with weights drawn from `generator`; depth 0.33 and width 0.50 are the published size "s".

    image_size: (height, width), multiples of 32. depth, width: factors on the repeats (at least one) and on the
    channels (rounded up to multiples of 8) of the nominal size. norm: 'batch' | 'group'.
    anchor_scale: factor on anchors that were fitted to images of 640 px; 0.25 suits 160 px.
    frozen: the backbone is not trained, not sent, and its maps may be cached; there are no pretrained weights, so it
    stays random until a trained one is loaded.
    gains, times_batch: see `yolo_loss`.
    """
    image_size = (int(image_size[0]), int(image_size[1]))
    if classes < 1:
        raise ValueError(f"a detector needs at least one class, got {classes}")
    if min(image_size) < 32 or image_size[0] % 32 or image_size[1] % 32:
        raise ValueError(f"YOLO needs image sides that are multiples of 32, got {image_size}")
    for name, value in (("depth", depth), ("width", width), ("anchor_scale", anchor_scale)):
        if not value > 0:
            raise ValueError(f"{name} must be > 0, got {value}")
    channels = tuple(math.ceil(c * width / 8) * 8 for c in (64, 128, 256, 512, 1024))
    few, many = (max(1, round(n * depth)) for n in (3, 9))
    with borrowed_global_rng(generator):
        backbone = Backbone(channels, (few, many), norm)
        neck = PathAggregation(backbone.channels, few, norm)
        model = YOLO(backbone, neck, classes, image_size, anchor_scale, gains, times_batch)
    if frozen:
        model.freeze_backbone()
    return model
