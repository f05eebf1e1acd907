"""The parts of the benchmark, see `bench`."""

import numpy as np
import torch
from bench import Bench, part

from fedal_utils import seeding, training
from fedal_utils.config import Config, TrainingConfig
from fedal_utils.data import Detections, Images, Labels
from fedal_utils.detectors import build
from fedal_utils.training import ClassifierTask, LocalTask

SSD300 = dict(detector="ssd", backbone="vgg16", image_size=(300, 300))
RESNET50 = dict(detector="faster_rcnn", backbone="resnet50", image_size=(608, 800))
YOLO = dict(detector="yolo", norm="batch", anchor_side=10.0)


def pixels_of(count: int, size: tuple[int, int], device: str = "cpu") -> Images:
    rng = seeding.torch_rng_for(0, "bench", *size)
    pixels = torch.randint(0, 256, (count, 3, *size), dtype=torch.uint8, generator=rng)
    return Images(tuple(map(str, range(count))), pixels, torch.tensor([size] * count)).to(device)


def labels_of(count: int, size: tuple[int, int], classes: int = 20, objects: int = 5) -> Labels:
    rng = seeding.torch_rng_for(0, "bench", "boxes", *size)
    room = torch.tensor([size[1], size[0]]).float()
    low = torch.rand(count, objects, 2, generator=rng) * 0.6 * room
    boxes = torch.cat([low, low + (0.1 + 0.3 * torch.rand(count, objects, 2, generator=rng)) * room], dim=2)
    named = torch.randint(1, classes + 1, (count, objects), generator=rng)
    return Labels(boxes, named, named == 0, named == 0)


def _clients(many: int, side: int, batch: int, device: str, **more):
    """(a call that trains `many` clients of a classifier for so many steps in this way)."""
    images = pixels_of(400 * many, (side, side), device)
    config = Config.of(classifier="resnet8", image_size=(side, side))
    model = build(config, 10, seeding.torch_rng_for(0, "b")).to(device)
    recipe = TrainingConfig.of(
        **dict(batch=batch, optimizer="sgd", lr=0.01, momentum=0.9, clip=0.0, crop=2),
        **dict(balanced_softmax=True, distillation_weight=1.0, **more),
    )
    start = [{k: v.detach().cpu() for k, v in model.state_dict().items() if v.dim()}] * many

    def train(way, steps: int | None) -> None:
        tasks = [
            ClassifierTask(
                seeding.torch_rng_for(0, m),
                iterations=steps,
                rows=np.arange(400 * m, 400 * m + 200),
                classes=torch.arange(200) % 10,
                counts=torch.full((10,), 20),
                unlabelled=np.arange(400 * m + 200, 400 * m + 400),
            )
            for m in range(many)
        ]
        for result in way(model, start, tasks, images, recipe, teacher=model, device=device):
            if isinstance(result, Exception):
                raise result

    return train


@part
def clients(bench: Bench) -> None:
    """KAFAL's step (batch and as many mixed images) of M clients: at once, against one after another."""
    batch, side = (128, 32) if bench.gpu else (16, 16)
    for many in (1, 8, 24) if bench.gpu else (1,) if bench.small else ():  # a CPU trains them one after another
        train = _clients(many, side, batch, bench.device)
        ahead, one_by_one = (2, 2) if bench.small else (96, 4) if bench.gpu else (8, 8)
        bench.in_turn(
            f"{many} clients at once, ResNet-8, {side} px, batch {batch} + {batch} mixed: a client's step",
            "one client after another",
            lambda: train(training.fit_together, ahead),  # noqa: B023
            lambda: train(training.fit_in_turn, one_by_one),  # noqa: B023
            **dict(runs=3, ours_do=many * ahead, theirs_do=many * one_by_one),
        )


def _training(bench: Bench, settings: dict, batch: int, steps: int, **recipe):
    """(a call that trains so many steps, a call that predicts on the same images, images of each)."""
    config = Config.of(**{"pretrained": False, **settings})
    size = config.data.image_size
    images, labels = pixels_of(2 * batch, size, bench.device), labels_of(2 * batch, size)
    model = build(config, 20, seeding.torch_rng_for(0, "bench")).to(bench.device)
    given = TrainingConfig.of(**{**dict(batch=batch, optimizer="sgd", lr=1e-4, amp=bench.gpu, clip=0.0), **recipe})

    def train() -> None:
        task = LocalTask(seeding.torch_rng_for(0), iterations=steps)
        list(training.fit(model, images, labels, given, task, bench.device))

    return train, lambda: training.predict(model, images, batch=batch, device=bench.device), images, labels


def _torchvision(bench: Bench, model, images: Images, labels: Labels, batch: int, steps: int):
    """torchvision's reference loop: lists of images, its own transforms, half precision scaled, loss read each step."""
    model.to(bench.device).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-4, 0.9, weight_decay=5e-4)
    scaler = torch.amp.GradScaler(bench.device, enabled=bench.gpu)
    pictures = [x.float() / 255 for x in images.pixels]
    target = labels.to(bench.device)
    targets = [{"boxes": b, "labels": c} for b, c in zip(target.boxes, target.classes, strict=True)]

    def train() -> None:
        for step in range(steps):
            part = slice(batch * (step % 2), batch * (step % 2 + 1))
            with torch.autocast(bench.device, torch.float16, enabled=bench.gpu):
                losses = model(pictures[part], [dict(t) for t in targets[part]])
            loss = sum(losses.values())
            loss.item()
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()

    return train


def _against_torchvision(bench: Bench, name: str, settings: dict, batch: int, make) -> None:
    many, few = (1, 1) if bench.small else (16, 6)
    train, predict, images, labels = _training(bench, settings, batch, many)
    theirs = _torchvision(bench, make(), images, labels, batch, few)
    what, against = f"{name} training, batch {batch}", "torchvision's reference loop"
    bench.in_turn(what, against, train, theirs, "images/s", 3, ours_do=batch * many, theirs_do=batch * few)
    bench.alone(f"{name} prediction, batch {batch}", predict, "images/s", 3, 2 * batch)


@part
def ssd300(bench: Bench) -> None:
    from torchvision.models import detection

    def make():
        return detection.ssd300_vgg16(weights=None, weights_backbone=None, num_classes=21)

    if bench.gpu or bench.small:
        _against_torchvision(bench, "SSD300-VGG16", SSD300, 32 if bench.gpu else 1, make)


@part
def faster_rcnn(bench: Bench) -> None:
    from torchvision.models import detection

    def make():
        sizes = dict(min_size=608, max_size=800)
        return detection.fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=21, **sizes)

    if bench.gpu or bench.small:
        _against_torchvision(bench, "Faster R-CNN R50-FPN 608 x 800", RESNET50, 8 if bench.gpu else 1, make)


@part
def yolo(bench: Bench) -> None:
    for size, batch in (((640, 640), 64), ((192, 640), 16)) if bench.gpu else (((64, 64), 4),):
        steps = 1 if bench.small else 12
        train, predict, *_ = _training(bench, {**YOLO, "image_size": size}, batch, steps)
        name = f"YOLOv5s {size[0]} x {size[1]}"
        bench.alone(f"{name} training, batch {batch}", train, "images/s", 3, batch * steps)
        bench.alone(f"{name} prediction, batch {batch}", predict, "images/s", 3, 2 * batch)


@part
def small_sizes(bench: Bench) -> None:
    """The detectors of the small sizes, alone: their steps are to be compared between machines."""
    tiny, batch = dict(depth_multiple=0.1, width_multiple=0.125, norm="group"), 16
    for name, settings in (
        ("small SSD, digits 64 px", dict(detector="ssd", image_size=(64, 64))),
        ("small YOLO, 160 px", dict(detector="yolo", image_size=(160, 160), **tiny)),
    ):
        steps = 1 if bench.small else 48 if bench.gpu else 4
        train, predict, *_ = _training(bench, settings, batch, steps, optimizer="adamw")
        bench.alone(f"{name} training, batch {batch}", train, "images/s", 3, batch * steps)
        bench.alone(f"{name} prediction, batch {batch}", predict, "images/s", 3, 2 * batch)


@part
def cached_features(bench: Bench) -> None:
    """A frozen backbone's features kept from one pass, against the same head trained from pixels."""
    batch, steps = 8, 1 if bench.small else 8
    settings = dict(detector="ssd", backbone="lite0", image_size=(192, 256), frozen=True)
    images, labels = pixels_of(2 * batch, (192, 256), bench.device), labels_of(2 * batch, (192, 256))
    model = build(Config.of(pretrained=False, **settings), 20, seeding.torch_rng_for(0, "bench")).to(bench.device)
    cached = training.cache_features(model, images, device=bench.device)
    given = TrainingConfig.of(batch=batch, lr=1e-3, flip=0.5)

    def train(source) -> None:
        task = LocalTask(seeding.torch_rng_for(0), iterations=steps)
        list(training.fit(model, source, labels, given, task, bench.device))

    bench.in_turn(
        f"SSD head on kept features of Lite0, 192 x 256, batch {batch}: a step",
        "the same from pixels",
        lambda: train(cached),
        lambda: train(images),
        **dict(ours_do=steps, theirs_do=steps),
    )


@part
def selection(bench: Bench) -> None:
    """Diversity on a pool of 50,000 x 512, 100 asked."""
    from fedal_utils.sampling import diversity

    many, wide = (500, 16) if bench.small else (50_000, 512)
    rng = seeding.torch_rng_for(0, "bench", "selection")
    centres = torch.randn(200, wide, generator=rng)
    embedding = centres[torch.randint(0, 200, (many + 2000,), generator=rng)]
    embedding = embedding + torch.randn(many + 2000, wide, generator=rng)
    logits = 3 * torch.randn(many, 100, generator=rng)
    for device in {"cpu", bench.device}:
        pool, known, scores = (t.to(device) for t in (embedding[:many], embedding[many:], logits))
        for name, call in {
            "core-set": lambda: diversity.k_center(pool, known, 100, seeding.rng_for(0)),  # noqa: B023
            "BADGE": lambda: diversity.badge(scores, pool, 100, seeding.rng_for(0)),  # noqa: B023
            "k-means": lambda: diversity.cluster(pool, 100, seeding.rng_for(0)),  # noqa: B023
        }.items():
            bench.alone(f"{name}, 100 of {many:,} x {wide}, {device}", call, runs=1)


@part
def average_precision(bench: Bench) -> None:
    from fedal_utils import metrics

    images = 20 if bench.small else 5000
    rng = seeding.torch_rng_for(0, "bench", "ap")
    corner = torch.rand(images, 30, 2, generator=rng) * 200
    boxes, scores = torch.cat([corner, corner + 30], dim=2), torch.rand(images, 30, generator=rng)
    classes = torch.randint(1, 21, (images, 30), generator=rng)
    found = Detections(boxes, scores.sort(dim=1, descending=True).values, classes, torch.zeros(images, 30, 21))
    no = torch.zeros(images, 7, dtype=torch.bool)
    labels = Labels(boxes[:, :7] + 3, classes[:, :7], no, no)
    names = tuple(map(str, range(20)))
    bench.alone(f"the three APs of {images:,} images", lambda: metrics.evaluate(found, labels, names), runs=1)
