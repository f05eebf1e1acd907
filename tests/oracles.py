"""The same quantities once more, in plain NumPy and plain loops: slow, short, and importing nothing of ours.

A test holds our code equal to these; each oracle follows the text of its source, not our implementation.
"""

from fractions import Fraction

import numpy as np

# --- average precision ------------------------------------------------------------------------------------------------
# One class. truths[i] and founds[i] belong to image i:
#   truth = (box xyxy, ignore, crowd), found = (box xyxy, score). Scores that tie keep image order, then list order.


def iou(a, b, crowd=False):
    """Intersection over union of two xyxy boxes; over the area of `a` alone where b is a crowd."""
    w = min(a[2], b[2]) - max(a[0], b[0])
    h = min(a[3], b[3]) - max(a[1], b[1])
    if w <= 0 or h <= 0:
        return 0.0
    area_a = (a[2] - a[0]) * (a[3] - a[1])
    area_b = (b[2] - b[0]) * (b[3] - b[1])
    return w * h / (area_a if crowd else area_a + area_b - w * h)


def coco_ap(truths, founds, threshold, max_detections=100):
    """COCO AP of one class at one IoU; None if there is nothing to find.

    Each image by itself: detections from the best score down, each takes the free object it covers best at the
    threshold or above (objects to find before ignored ones, crowds are never used up); what lands on an ignored object
    leaves the list. Then precision, made monotone, at 101 recalls.
    """
    n_objects = sum(not (ignore or crowd) for image in truths for _, ignore, crowd in image)
    if n_objects == 0:
        return None
    verdicts = []  # (score, hit) of everything that counts, in image order
    for image, found in zip(truths, founds, strict=True):
        taken = set()
        for box, score in sorted(found, key=lambda one: -one[1])[:max_detections]:
            free = [g for g, (_, _, crowd) in enumerate(image) if crowd or g not in taken]
            covers = {g: iou(box, image[g][0], image[g][2]) for g in free}
            fits = [g for g in free if covers[g] >= min(threshold, 1 - 1e-10)]
            # objects to find before ignored ones, then the best covered, of equals the later one
            best = max(fits, key=lambda g: (not any(image[g][1:]), covers[g], g), default=None)
            if best is None:
                verdicts.append((score, False))
                continue
            taken.add(best)
            if not (image[best][1] or image[best][2]):
                verdicts.append((score, True))
    verdicts.sort(key=lambda one: -one[0])
    curve, true = [], 0  # (recall, precision)
    for seen, (_, hit) in enumerate(verdicts, start=1):
        true += hit
        curve.append((true / n_objects, true / seen))
    grid = np.linspace(0, 1, 101)  # the reference's own floating point grid
    return sum(max((p for r, p in curve if r >= wanted), default=0.0) for wanted in grid) / 101


def voc_ap(truths, founds, threshold=0.5):
    """(11-point AP, all-point AP) of one class as exact fractions after the VOC devkit; None if nothing is to be found.

    All detections from the best score down: each looks at the object it covers best, free or not; a difficult one
    takes it off the list, a free one makes it a hit, else it is wrong. Crowds count as difficult.
    """
    n_objects = sum(not (ignore or crowd) for image in truths for _, ignore, crowd in image)
    if n_objects == 0:
        return None
    everything = [(score, i, box) for i, found in enumerate(founds) for box, score in found]
    everything.sort(key=lambda one: -one[0])
    taken, true, seen, curve = set(), 0, 0, []  # curve: (recall, precision)
    for _, i, box in everything:
        best, best_at = None, -1.0
        for g, (gt, _, _) in enumerate(truths[i]):
            if iou(box, gt) > best_at:
                best, best_at = g, iou(box, gt)
        if best is not None and best_at >= threshold:
            if truths[i][best][1] or truths[i][best][2]:
                continue
            if (i, best) not in taken:
                taken.add((i, best))
                true += 1
        seen += 1
        curve.append((Fraction(true, n_objects), Fraction(true, seen)))
    eleven = sum(max((p for r, p in curve if r >= Fraction(k, 10)), default=Fraction(0)) for k in range(11)) / 11
    area = Fraction(0)
    for k in range(1, n_objects + 1):  # the envelope is constant on every step ((k - 1) / n, k / n]
        area += max((p for r, p in curve if r >= Fraction(k, n_objects)), default=Fraction(0)) / n_objects
    return eleven, area


def matched_boxes(boxes, real, ignored, anchors, threshold=0.5):
    """For each anchor of one image: the box that it answers for, -1 = background, -2 = not used.

    An anchor takes the real box it covers best, at the threshold or above; then every real box takes its best anchor,
    in order, so that the later box wins. What is left and lies on an ignored box at the threshold, and on no real box
    as much, is not used.
    """
    answers = []
    for anchor in anchors:
        on_real = [iou(box, anchor) if r else -1.0 for box, r in zip(boxes, real, strict=True)]
        on_ignored = max([iou(box, anchor) for box, i in zip(boxes, ignored, strict=True) if i], default=-1.0)
        best = max(on_real, default=-1.0)
        if on_ignored >= threshold and on_ignored > best:
            answers.append(-2)
        else:
            answers.append(on_real.index(best) if best >= threshold else -1)
    for k, box in enumerate(boxes):
        if real[k]:
            covers = [iou(box, anchor) for anchor in anchors]
            answers[covers.index(max(covers))] = k
    return answers


def image_score(strategy, confidences, probs):
    """One image's score by name from its detections' confidences and class distributions; None without detections."""
    if strategy == "count":
        return float(len(confidences))
    value, how = strategy.split("_") if "_" in strategy else ("confidence", strategy)
    of = {
        "entropy": lambda p: -sum(x * np.log(x) for x in p if x > 0),
        "ratio": lambda p: sorted(p)[-2] / max(p),
        "margin": lambda p: 1 - (max(p) - sorted(p)[-2]),
    }
    values = [1 - c for c in confidences] if value == "confidence" else list(map(of[value], probs))
    if not values:
        return None
    return {"sum": sum(values), "avg": sum(values) / len(values), "max": max(values)}[how]


def weighted_average(arrays, counts):
    """sum_m counts_m / sum(counts) * arrays_m in exact fractions, rounded once at the end to float32."""
    whole = sum(map(Fraction, counts))
    out = np.zeros(np.shape(arrays[0]), dtype=np.float32)
    for place in np.ndindex(*out.shape):
        exact = sum((Fraction(float(a[place])) * Fraction(n) for a, n in zip(arrays, counts, strict=True)), Fraction(0))
        out[place] = np.float32(float(exact / whole))
    return out
