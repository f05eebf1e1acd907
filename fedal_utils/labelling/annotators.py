"""The annotator of headless runs: somebody simulated, with a known error rate."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..seeding import rng_for
from .store import Store


class Simulated:
    """Knows the truth and now and then names the wrong class.

    truth: {image: class name, or list of {"class", "box"}}; ValueError for an image that it lacks.
    error: probability in [0, 1] that the class of an image, or of each of its boxes, is replaced by another one of the
        store's; drawn by image, so the order of the questions changes nothing.
    seconds_per_image, seconds_per_box: what is noted for a look at the image, and for the drawing of a box.
    """

    def __init__(self, truth: Mapping[str, Any], error=0.0, seconds_per_image=2.0, seconds_per_box=7.0, seed: int = 0):
        self.truth, self.error, self.seed, self.seconds = truth, error, seed, (seconds_per_image, seconds_per_box)

    def label(self, image: str, task: str, classes: Sequence[str]) -> Any:
        """What is said about an image; the same each time."""
        if image not in self.truth:
            raise ValueError(f"the truth has no image {image!r}")
        rng, truth = rng_for(self.seed, "annotator", image), self.truth[image]

        def named(name: str) -> str:
            slip, which = rng.random(), rng.random()  # two draws in any case: the next box' do not depend on it
            others = [c for c in classes if c != name]
            return others[int(which * len(others))] if slip < self.error and others else name

        return named(truth) if task == "classes" else [{**one, "class": named(one["class"])} for one in truth]

    def answer_all(self, store: Store, who: str) -> None:
        """Answer until nothing waits."""
        while (question := store.next(who)) is not None:
            label = self.label(question.image, store.task, store.classes)
            boxes = len(label) if store.task == "boxes" else 0
            store.answer(who, question.image, label, seconds=self.seconds[0] + boxes * self.seconds[1])
