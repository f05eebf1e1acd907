"""What torchvision.ops lacks for boxes: flips, letterbox, and the padded batch of detections.

Boxes are (N, 4) float32 xyxy in pixels. A padded batch is (B, K, 4); class 0 marks a padding row.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Detections:
    """Padded detections of N images, best first: the one thing that a detector returns.

    extra: what some detectors add: 'level' (N, T) int64, the map that a box came from; 'sides' (N, T, 4), confidence
    in [0, 1] of left, top, right and bottom; 'predicted_loss' (N, T) >= 0.
    """

    boxes: Tensor  # (N, T, 4) float32 xyxy pixels of the letterboxed image
    scores: Tensor  # (N, T) in [0, 1]
    labels: Tensor  # (N, T) int64, 1..C, 0 = padding
    probs: Tensor  # (N, T, C + 1) class probabilities, background first, zeros where padded
    extra: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.boxes.shape[0]

    @property
    def valid(self) -> Tensor:
        """(N, T) bool, False where padded."""
        return self.labels > 0

    def above(self, score: float) -> "Detections":
        """The same detections with those at or below `score` turned into padding (shapes stay)."""
        keep = (self.scores > score) & self.valid
        return self._each(lambda t: t * keep.view(*keep.shape, *[1] * (t.dim() - 2)))

    def to(self, device: str | torch.device) -> "Detections":
        return self._each(lambda t: t.to(device))

    def take(self, rows: Sequence[int] | Tensor) -> "Detections":
        """Detections of these images, in this order."""
        rows = torch.as_tensor(rows, dtype=torch.int64, device=self.boxes.device)
        return self._each(lambda t: t[rows])

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Detections":
        extra = {name: change(t) for name, t in self.extra.items()}
        return Detections(*map(change, (self.boxes, self.scores, self.labels, self.probs)), extra)


def join_detections(parts: Sequence[Detections]) -> Detections:
    """Detections of several batches in one; rows are padded to the longest."""
    longest = max(part.boxes.shape[1] for part in parts)

    def joined(tensors: Iterable[Tensor]) -> Tensor:
        pad = torch.nn.functional.pad
        return torch.cat([pad(t, (0, 0) * (t.dim() - 2) + (0, longest - t.shape[1])) for t in tensors])

    plain = (joined(getattr(part, name) for part in parts) for name in ("boxes", "scores", "labels", "probs"))
    return Detections(*plain, {name: joined(part.extra[name] for part in parts) for name in parts[0].extra})


def flip_boxes(boxes: Tensor, width: int) -> Tensor:
    """Mirror (..., 4) xyxy boxes left-right in an image `width` pixels wide; twice is the identity."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    return torch.stack([width - x2, y1, width - x1, y2], dim=-1)


def letterbox_fit(sizes: Tensor, image_size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Where images of `sizes` (N, 2) land in a canvas of (height, width): inner sizes (N, 2), offsets (N, 2) top, left.

    One scale for both sides, the largest that fits; the scaled image is rounded to whole pixels (at least one) and
    centred, an odd pixel going below or to the right: 380 x 640 in 192 x 320 -> inner 190 x 320, offset 1, 0.
    """
    sizes, canvas = torch.as_tensor(sizes, dtype=torch.int64), torch.tensor(image_size, dtype=torch.int64)
    scale = (canvas / sizes.double()).amin(dim=-1, keepdim=True)  # (N, 1)
    inner = torch.minimum((sizes * scale + 0.5).floor().long().clamp(min=1), canvas)  # (N, 2)
    return inner, (canvas - inner) // 2


def _letterbox_affine(boxes: Tensor, sizes: Tensor, image_size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Factor and shift that take (N, 4) or (N, K, 4) original xyxy pixels to letterboxed ones."""
    inner, offset = letterbox_fit(sizes, image_size)
    both = torch.stack([inner.double() / torch.as_tensor(sizes).double(), offset.double()])  # (2, N, 2) y, x
    both = both.flip(-1).repeat(1, 1, 2).to(boxes.device)  # (2, N, 4) x, y, x, y
    return tuple(both[:, :, None] if boxes.dim() == 3 else both)


def letterbox_boxes(boxes: Tensor, sizes: Tensor, image_size: tuple[int, int]) -> Tensor:
    """Boxes (N, 4) or (N, K, 4) in pixels of images of `sizes` (N, 2) height, width in pixels of letterboxed ones."""
    factor, shift = _letterbox_affine(boxes, sizes, image_size)
    return (boxes.double() * factor + shift).to(boxes.dtype)


def to_original(boxes: Tensor, sizes: Tensor, image_size: tuple[int, int]) -> Tensor:
    """The inverse of `letterbox_boxes`: boxes in letterboxed pixels in pixels of the original images."""
    factor, shift = _letterbox_affine(boxes, sizes, image_size)
    return ((boxes.double() - shift) / factor).to(boxes.dtype)
