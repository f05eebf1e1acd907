"""Train many clients' classifiers at once on a GPU: a step of a client is a CUDA graph, and clients run on streams.

The processor only replays graphs; one graph serves all rounds, and clients of any number of steps. Equal to
`classifier.fit_classifier` but for rounding, from the same draws. On a CPU the same steps run without a graph.
"""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Iterator, Sequence

import torch

from ..config import TrainingConfig
from ..data import Images
from ..detectors import Classifier, State
from .classifier import ClassifierTask, Draws, LocalResult, check_tasks, draw, fit_in_turn, ready, sound
from .client_step import SEGMENT, ClientStep, Shared, views
from .schedule import STEPS, TrainingDiverged, learning_rate_factor
from .stacked import fit_stacked

SLOTS = 8  # clients that train at the same time, each on a stream of its own
KEPT = 4  # pools


class _Pool:
    """Slots for clients that train side by side, with what they share."""

    def __init__(self, shared: Shared):
        self.shared, self.slots = shared, []
        self.copies = torch.cuda.Stream() if shared.device.type == "cuda" else None

    def grow(self, slots: int) -> list[ClientStep]:
        """So many slots; those that are not there yet are made."""
        while len(self.slots) < slots:
            self._add()
        return self.slots[:slots]

    def _add(self) -> None:
        slot = ClientStep(self.shared)
        for full in (True, False)[: 1 if self.shared.config.compile else 2] if self.copies is not None else ():
            slot.capture(full)
        self.slots.append(slot)

    @contextlib.contextmanager
    def copying(self, stream: torch.cuda.Stream | None) -> Iterator[None]:
        """Inside, copies to the device are made beside what runs there; `stream` waits for them."""
        if stream is None:
            yield
            return
        with torch.cuda.stream(self.copies):
            yield
        stream.wait_stream(self.copies)

    def train(
        self, slot: ClientStep, state: State, task: ClassifierTask, drawn: Draws, config: TrainingConfig, out: dict
    ) -> Iterator[None]:
        """Train one client; stops after every few launches, so that its neighbours get theirs.

        slot: where. state: weights to start from. task, drawn: whose training, and its draws. config: with the learning
        rates of this call. out: gets what `_result` needs.
        """
        before, whole = task.position(config)
        steps, device = len(drawn.length), self.shared.device
        rates = [config.lr * learning_rate_factor(config, before + step, whole) for step in range(steps)]
        full = (drawn.length == self.shared.config.batch).tolist()
        ends = (torch.cumsum(drawn.length, 0) // len(task.rows)).tolist()  # passes that are over after each step
        with self.copying(slot.stream):  # on a stream of its own: a copy waits for what is before it
            drawn, lr = drawn.to(device), torch.tensor(rates).to(device)
            state, kept, counts = (
                {k: v.to(device) for k, v in given.items()}
                for given in (state, task.optimizer_state or {}, {"counts": task.counts})
            )
        out["held"] = drawn, lr, state, kept, counts  # given to nobody while the stream may still read it
        with slot.on_stream():
            slot.load(state, kept, counts["counts"])
        done = 0
        while done < steps:
            part = drawn.at(slice(done, done + SEGMENT))
            with slot.on_stream():
                slot.load_steps(part, lr[done : done + SEGMENT])
            for _ in range(len(part.length)):
                with slot.on_stream():
                    slot.replay(full[done])
                done += 1
                if task.stop_at is not None and ends[done - 1] > (ends[done - 2] if done > 1 else 0):
                    right = yield from self._accuracy(slot, task)
                    if right >= task.stop_at:
                        steps = done
                        break
                elif done % 4 == 0:
                    yield
        with slot.on_stream():
            momenta = dict(zip(slot.names, views(slot.momenta.clone(), slot.parameters), strict=True))
            out |= {"state": slot.state(), "sums": slot.sums / steps, "steps": steps, "momenta": momenta}

    def _accuracy(self, slot: ClientStep, task: ClassifierTask) -> Iterator[None]:
        """The part of the labelled images on which the network in eval mode is right; others work meanwhile."""
        slot.net.eval()
        with slot.on_stream(), torch.no_grad(), self.shared.autocast:
            rows = torch.from_numpy(task.rows).to(self.shared.device)
            guess = torch.cat([slot.net(self.shared.pixels[part]).argmax(1) for part in rows.split(512)])
            right = (guess == task.classes.to(self.shared.device)).float().mean()
            done = None if slot.stream is None else slot.stream.record_event()
        slot.net.train()
        while done is not None and not done.query():
            yield
        return float(right)


_POOLS: collections.OrderedDict[tuple, _Pool] = collections.OrderedDict()  # the last few: a graph serves all rounds


def _pool(model: Classifier, images: Images, config: TrainingConfig, teacher, mixing: bool, device) -> _Pool:
    """The pool for this recipe, from an earlier call if there was one; with the teacher's weights of this call."""
    baked = config.replace(lr=1.0, epochs=1, schedule="constant", warmup=0, warmup_epochs=0.0, flip=0.5)
    released = mixing and teacher.training
    key = (repr(model), images.pixels.data_ptr(), images.pixels.shape, baked, mixing, released, str(device))
    if key not in _POOLS:
        _POOLS[key] = _Pool(Shared(model, images, baked, mixing, released, device))
    _POOLS.move_to_end(key)
    while len(_POOLS) > KEPT:
        _POOLS.popitem(last=False)
    if mixing:
        _POOLS[key].shared.teacher.load_state_dict(teacher.state_dict())
    return _POOLS[key]


def fit_graphs(
    model: Classifier,
    states: Sequence[State],
    tasks: Sequence[ClassifierTask],
    images: Images,
    config: TrainingConfig,
    teacher: Classifier | None = None,
    device: str | torch.device = "cuda",
    as_released: bool = False,
) -> list[LocalResult | TrainingDiverged]:
    """What `classifier.fit_in_turn` does, for all clients at once, with its arguments; clients may stop early.

    A client whose training diverges harms nobody else: its error stands in its place.
    """
    device = torch.device(device)
    check_tasks(tasks, config)
    teacher = ready(teacher, config, device, as_released)
    outs: list[dict] = [{} for _ in tasks]
    for mixing in (True, False):
        same = [m for m, task in enumerate(tasks) if task.mixes(config, teacher) == mixing]
        if not same:
            continue
        pool = _pool(model, images, config, teacher, mixing, device)
        waiting, working = collections.deque(same), dict.fromkeys(pool.grow(min(SLOTS, len(same))), iter(()))
        while working:
            for slot, work in list(working.items()):
                if next(work, StopIteration) is not StopIteration:
                    continue
                if not waiting:
                    del working[slot]
                    continue
                m = waiting.popleft()
                drawn = draw(tasks[m], config, mixing, as_released)
                working[slot] = pool.train(slot, states[m], tasks[m], drawn, config, outs[m])
    if device.type == "cuda":
        torch.cuda.synchronize()
    return [_result(out, task, images, config, teacher) for out, task in zip(outs, tasks, strict=True)]


def _result(out: dict, task: ClassifierTask, images: Images, config: TrainingConfig, teacher):
    supervised, distillation = out["sums"].tolist()
    mixing = task.mixes(config, teacher)
    parts = {"supervised": supervised} | ({"distillation": distillation} if mixing else {})
    state = {k: v.contiguous().cpu() for k, v in out["state"].items()}
    try:
        result = sound(LocalResult(state, out["steps"], sum(parts.values()), parts), task, images)
    except TrainingDiverged as error:
        return error
    if task.optimizer_state is not None:
        task.optimizer_state.update({f"momentum_buffer:{k}": v.contiguous().cpu() for k, v in out["momenta"].items()})
        task.optimizer_state[STEPS] = torch.tensor(task.position(config)[0] + out["steps"])
    return result


def fit_together(
    model: Classifier,
    states: Sequence[State],
    tasks: Sequence[ClassifierTask],
    images: Images,
    config: TrainingConfig,
    teacher: Classifier | None = None,
    device: str | torch.device = "cpu",
    as_released: bool = False,
) -> list[LocalResult | TrainingDiverged]:
    """What `classifier.fit_in_turn` does, with its arguments, in the way that is fastest on this device."""
    if torch.device(device).type == "cuda":
        train = fit_graphs
    else:
        train = fit_in_turn if any(task.stop_at is not None for task in tasks) else fit_stacked
    return train(model, states, tasks, images, config, teacher, device, as_released)
