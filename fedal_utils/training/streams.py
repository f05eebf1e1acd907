"""Train many clients' classifiers at once on a GPU: a step of a client is a CUDA graph, and clients run on streams.

One graph serves all rounds. Equal to `fit_classifier` but for rounding; on a CPU the same steps run without a graph.
"""

import collections
from collections.abc import Iterator, Sequence

import torch

from ..config import TrainingConfig
from ..data import Images
from ..detectors import Classifier
from .classifier import ClassifierTask, Draws, LocalResult, State, draw, fit_in_turn, ready, sound
from .client_step import SEGMENT, ClientStep, Shared, moved, views
from .graphs import remembered
from .schedule import STEPS, TrainingDiverged, learning_rate_factor

SLOTS = 8  # clients that train at the same time, each on a stream of its own
KEPT = 4  # recipes whose slots are kept for the next call
_KEPT: dict[tuple, Shared] = {}


def fit_together(
    model: Classifier,
    states: Sequence[State],
    tasks: Sequence[ClassifierTask],
    images: Images,
    config,
    device="cpu",
    **more,
) -> list[LocalResult | TrainingDiverged]:
    """`fit_classifier` for many clients, on a GPU at once; a client whose training diverges has its error in its place.

    model: their architecture; not changed. states: each client's weights to start from. The rest as there.
    """
    graphed = torch.device(device).type == "cuda" and isinstance(images, Images)
    train = fit_graphs if graphed else fit_in_turn
    return train(model, states, tasks, images, config, device=device, **more)


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
    """`fit_together` by steps that can be graphs."""
    device = torch.device(device)
    teacher = ready(tasks, config, teacher, device, as_released)
    outs: list[dict] = [{} for _ in tasks]
    for mixing in (True, False):
        waiting = collections.deque(m for m, task in enumerate(tasks) if task.mixes(config, teacher) == mixing)
        if not waiting:
            continue
        shared = _shared(model, images, config, teacher if mixing else None, device)
        working = dict.fromkeys(shared.grown(min(SLOTS, len(waiting))), iter(()))
        while working:
            for slot, work in list(working.items()):
                if next(work, StopIteration) is not StopIteration:
                    continue
                if not waiting:
                    del working[slot]
                    continue
                m = waiting.popleft()
                drawn = draw(tasks[m], config, mixing, as_released)
                working[slot] = _train(slot, states[m], tasks[m], drawn, config, outs[m])
    if device.type == "cuda":
        torch.cuda.synchronize()
    pairs = zip(outs, tasks, strict=True)
    return [_result(out, task, images, config, task.mixes(config, teacher)) for out, task in pairs]


def _shared(model: Classifier, images: Images, config: TrainingConfig, teacher, device: torch.device) -> Shared:
    """The slots for this recipe, with the teacher's weights of this call."""
    baked = config.replace(lr=1.0, epochs=1, schedule="constant", warmup=0, warmup_epochs=0.0, flip=0.5)
    mixing, released = teacher is not None, teacher is not None and teacher.training
    key = (repr(model), images.pixels.data_ptr(), images.pixels.shape, baked, mixing, released, str(device))
    shared = remembered(_KEPT, key, lambda: Shared(model, images, baked, mixing, released, device), KEPT)
    if mixing:
        shared.teacher.load_state_dict(teacher.state_dict())
    return shared


def _train(slot: ClientStep, state: State, task: ClassifierTask, drawn: Draws, config, out: dict) -> Iterator[None]:
    """Train one client in this slot; stops after every few launches, so that its neighbours get theirs; fills `out`."""
    steps, device = len(drawn["length"]), slot.shared.device
    before, whole = task.schedule_position or (0, task.steps(config))
    lr = torch.tensor([config.lr * learning_rate_factor(config, before + step, whole) for step in range(steps)])
    full = (drawn["length"] == config.batch).tolist()
    passes = [0, *(torch.cumsum(drawn["length"], 0) // len(task.rows)).tolist()]  # that are over before each step
    with slot.on_stream():
        if slot.stream is not None:
            slot.stream.wait_stream(torch.cuda.default_stream())  # there the teacher got its weights
        slot.load(state, task)
        drawn, lr = {k: moved(v, device) for k, v in drawn.items()}, moved(lr, device)
    for done in range(len(full)):
        with slot.on_stream():
            if done % SEGMENT == 0:
                part = slice(done, done + SEGMENT)
                slot.load_steps({k: v[part] for k, v in drawn.items()}, lr[part])
            slot.steps[full[done]]()
        if task.stop_at is not None and passes[done + 1] > passes[done]:
            right = yield from _accuracy(slot, task)
            if right >= task.stop_at:
                steps = done + 1
                break
        elif done % 4 == 3:
            yield
    with slot.on_stream():
        momenta = dict(zip(slot.names, views(slot.momenta.clone(), slot.parameters), strict=True))
        out |= {"state": slot.state(), "sums": slot.sums / steps, "steps": steps, "momenta": momenta}


def _accuracy(slot: ClientStep, task: ClassifierTask) -> Iterator[None]:
    """The part of the labelled images on which it is right in eval mode; others work meanwhile."""
    shared = slot.shared
    slot.net.eval()
    with slot.on_stream(), torch.no_grad(), shared.autocast:
        rows, classes = moved(torch.from_numpy(task.rows), shared.device), moved(task.classes, shared.device)
        guess = torch.cat([slot.net(shared.pixels[part]).argmax(1) for part in rows.split(512)])
        right = (guess == classes).float().mean()
        done = None if slot.stream is None else slot.stream.record_event()
    slot.net.train()
    while done is not None and not done.query():
        yield
    return float(right)


def _result(out: dict, task: ClassifierTask, images: Images, config: TrainingConfig, mixing: bool):
    parts = dict(zip(("supervised", "distillation")[: 1 + mixing], out["sums"].tolist(), strict=False))
    state = {k: v.contiguous().cpu() for k, v in out["state"].items()}
    try:
        result = sound(LocalResult(state, out["steps"], sum(parts.values()), parts), task, images)
    except TrainingDiverged as error:
        return error
    if task.optimizer_state is not None:
        task.optimizer_state.update({f"momentum_buffer:{k}": v.contiguous().cpu() for k, v in out["momenta"].items()})
        task.optimizer_state[STEPS] = torch.tensor((task.schedule_position or (0,))[0] + out["steps"])
    return result
