"""Train many clients' classifiers at once on a GPU: a step of a client is a CUDA graph, and clients run on streams.

One graph serves all rounds; labelled and mixed images are one batch, in bfloat16. Equal to `fit_classifier` but for
rounding; on a CPU the same steps run without a graph.
"""

import collections
import copy
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from ..config import TrainingConfig
from ..data import Images, random_crop
from ..detectors import Classifier, balanced_cross_entropy, compensation_loss, compensation_weights
from .classifier import ClassifierTask, Draws, LocalResult, State, draw, fit_in_turn, ready, result_of
from .graphs import SplitNorm, captured, flat, remembered, views
from .inference import half_precision
from .schedule import STEPS, TrainingDiverged, learning_rate_factor

SLOTS = 8  # clients that train at the same time, each on a stream of its own
SEGMENT = 32  # steps whose images are made ahead
KEPT = 4  # recipes whose slots are kept for the next call
_KEPT: "dict[tuple, Shared]" = {}


def fit_together(
    model: Classifier, states: Sequence[State], tasks: Sequence[ClassifierTask], images, *options, device="cpu", **more
) -> list[LocalResult | TrainingDiverged]:
    """`fit_classifier` for many clients, on a GPU at once; a client whose training diverges has its error in its place.

    model: their architecture; not changed. states: each client's weights to start from. The rest as there.
    """
    graphed = torch.device(device).type == "cuda" and isinstance(images, Images)
    train = fit_graphs if graphed else fit_in_turn
    return train(model, states, tasks, images, *options, device=device, **more)


def fit_graphs(
    model, states, tasks, images: Images, config: TrainingConfig, teacher=None, device="cuda", as_released=False
) -> list[LocalResult | TrainingDiverged]:
    """`fit_together` by steps that can be graphs."""
    device = torch.device(device)
    teacher = ready(tasks, config, teacher, device, as_released)
    baked = config.replace(lr=1.0, epochs=1, schedule="constant", warmup=0, warmup_epochs=0.0, flip=0.5)
    outs: list[dict] = [{} for _ in tasks]
    for mixing in (True, False):
        waiting = collections.deque(m for m, task in enumerate(tasks) if task.mixes(config, teacher) == mixing)
        if not waiting:
            continue
        key = repr(model), images.pixels.data_ptr(), images.pixels.shape, baked, mixing, as_released, str(device)
        asked = teacher if mixing else None
        shared = remembered(_KEPT, key, lambda asked=asked: Shared(model, images, baked, asked, device), KEPT)
        if mixing:  # the weights of this call
            shared.teacher.load_state_dict(teacher.state_dict())
        while len(shared.slots) < min(SLOTS, len(waiting)):
            shared.slots.append(ClientStep(shared))
        working = dict.fromkeys(shared.slots[: len(waiting)], iter(()))
        while working:
            for slot, work in list(working.items()):
                if next(work, StopIteration) is not StopIteration:
                    continue
                if not waiting:
                    del working[slot]
                    continue
                m = waiting.popleft()
                working[slot] = slot.train(
                    states[m], tasks[m], draw(tasks[m], config, mixing, as_released), config, outs[m]
                )
    if device.type == "cuda":
        torch.cuda.synchronize()
    results: list[LocalResult | TrainingDiverged] = []
    for out, task in zip(outs, tasks, strict=True):
        parts = dict(zip(("supervised", "distillation"), out["sums"].tolist(), strict=False))
        state, momenta = ({k: v.contiguous().cpu() for k, v in out[name].items()} for name in ("state", "momenta"))
        try:
            results.append(result_of(state, out["steps"], parts, task, images))
        except TrainingDiverged as error:
            results.append(error)
            continue
        if task.optimizer_state is not None:
            task.optimizer_state.update({f"momentum_buffer:{k}": v for k, v in momenta.items()})
            task.optimizer_state[STEPS] = torch.tensor((task.schedule_position or (0,))[0] + out["steps"])
    return results


class Shared:
    """What all clients' steps share: pixels, teacher, recipe, all that is baked into a graph."""

    def __init__(self, model: Classifier, images: Images, config: TrainingConfig, teacher: Classifier | None, device):
        self.model, self.config, self.device = copy.deepcopy(model).to(device), config, device
        self.images, self.pixels = images, images.pixels.to(device)
        self.teacher, self.slots = copy.deepcopy(teacher), []
        for module in self.teacher.modules() if teacher else ():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.0  # all clients ask it: it keeps its statistics
        self.autocast = half_precision(device)

    def moved(self, tensor: Tensor) -> Tensor:
        """The tensor on the device; a GPU's stream waits for no more than this copy, the processor for nothing."""
        if self.device.type == "cuda" and not tensor.is_cuda:
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)

    def _crops(self, rows: Tensor, flip: Tensor, shift: Tensor) -> Tensor:
        """(S, B, 3, H, W) scaled pixels of rows (S, B), mirrored and cropped."""
        x = self.pixels[rows.flatten()]
        x = torch.where(flip.flatten()[:, None, None, None], x.flip(-1), x)
        return self.model.scaled(random_crop(x, shift.flatten(0, 1), self.config.augment.crop)).unflatten(0, rows.shape)

    @torch.no_grad()
    def ahead(self, draws: Draws, gamma: Tensor) -> dict[str, Tensor]:
        """What S steps need beside the client's weights: target (S, B), valid (S, B), inputs (S, B or 2 B, H, W, 3).

        Of mixed images, the second half, the teacher's scores taught (S, B, C) and weight (S, B), what they count.
        """
        steps, batch = draws["rows"].shape
        x = self._crops(draws["rows"], draws["flip"], draws["shift"])
        valid = (torch.arange(batch, device=self.device) < draws["length"][:, None]).float()
        made = {"target": draws["target"], "valid": valid}
        if self.teacher is not None:
            u = self._crops(draws["mixed"], draws["mixed_flip"], draws["mixed_shift"])
            beta, place = draws["beta"], torch.arange(steps, device=self.device)[:, None]
            part = beta[..., None, None, None]
            mixed = part * u + (1 - part) * u[place, draws["partner"]]
            with self.autocast:  # as released: the statistics of each batch
                asked = mixed if self.teacher.training else mixed.flatten(0, 1).split(1 << 12)
                taught = torch.cat([self.teacher.scores(some) for some in asked]).float().unflatten(0, (steps, -1))
            likely = gamma[taught.argmax(2)]  # (S, B)
            made |= {"taught": taught, "weight": beta * likely + (1 - beta) * likely.gather(1, draws["partner"])}
            x = torch.cat([x, mixed], dim=1)
        return made | {"inputs": x.permute(0, 1, 3, 4, 2)}


class ClientStep:
    """Room for one client at a time: its network, its draws, and the graphs of its step."""

    def __init__(self, shared: Shared):
        self.shared, config, device, classes = shared, shared.config, shared.device, shared.model.classes
        batch, batches = config.batch, 1 if shared.teacher is None else 2
        self.valid = torch.ones(batch, device=device)
        self.net = copy.deepcopy(shared.model)
        for name, norm in list(self.net.named_modules()):
            if isinstance(norm, nn.BatchNorm2d):
                split = SplitNorm(norm.num_features, norm.eps, norm.momentum)
                split.batches, split.valid = batches, self.valid
                self.net.set_submodule(name, split)
        self.net.to(device).train()
        self.names, like = zip(*((name, p.detach()) for name, p in self.net.named_parameters()), strict=True)
        self.weights = flat(like)
        self.momenta = torch.zeros_like(self.weights)
        self.parameters = [nn.Parameter(view) for view in views(self.weights, like)]
        for name, parameter in zip(self.names, self.parameters, strict=True):
            module, _, last = name.rpartition(".")
            setattr(self.net.get_submodule(module), last, parameter)
        self.buffers = {k: v for k, v in self.net.named_buffers() if k.rpartition(".")[2].startswith("running")}
        self.counts = torch.ones(classes, dtype=torch.int64, device=device)
        self.gamma, self.sums = torch.zeros(classes, device=device), torch.zeros(batches, device=device)
        self.at, self.lr = torch.zeros(1, dtype=torch.int64, device=device), torch.zeros(SEGMENT, device=device)
        with shared.autocast:
            kind = torch.bfloat16 if torch.is_autocast_enabled(device.type) else torch.float32
        sizes = {  # see `Shared.ahead`
            "inputs": ((batch * batches, *shared.pixels.shape[-2:], 3), kind),
            "target": ((batch,), torch.int64),
            "valid": ((batch,), torch.float32),
            "taught": ((batch, classes), torch.float32),
            "weight": ((batch,), torch.float32),
        }
        self.made = {k: torch.ones(SEGMENT, *shape, dtype=t, device=device) for k, (shape, t) in sizes.items()}
        self.stream = torch.cuda.Stream() if device.type == "cuda" else None
        self.steps = {  # of a full batch, of a short one
            full: captured(lambda full=full: self._step(full), [self.at], device, stream=self.stream)
            for full in (True, False)
        }

    def train(self, state: State, task: ClassifierTask, drawn: Draws, config, out: dict) -> Iterator[None]:
        """Train one client; stops after every few launches, so that its neighbours get theirs; fills `out`."""
        shared, moved, steps = self.shared, self.shared.moved, len(drawn["length"])
        before, whole = task.schedule_position or (0, task.steps(config))
        lr = torch.tensor([config.lr * learning_rate_factor(config, before + step, whole) for step in range(steps)])
        full = (drawn["length"] == config.batch).tolist()
        passes = [0, *(torch.cumsum(drawn["length"], 0) // len(task.rows)).tolist()]  # that are over before each step
        kept = task.optimizer_state or {}
        momenta = [kept.get(f"momentum_buffer:{k}", torch.zeros_like(state[k])) for k in self.names]
        with torch.cuda.stream(self.stream):
            if self.stream is not None:
                self.stream.wait_stream(torch.cuda.default_stream())  # there the teacher got its weights
            self.weights.copy_(moved(flat([state[k] for k in self.names])))
            self.momenta.copy_(moved(flat(momenta)))
            for key, value in self.buffers.items():
                value.copy_(moved(state[key]))
            self.counts.copy_(moved(task.counts))
            self.gamma.copy_(compensation_weights(self.counts))
            self.sums.zero_()
            drawn, lr = {k: moved(v) for k, v in drawn.items()}, moved(lr)
        for done in range(len(full)):
            with torch.cuda.stream(self.stream):
                if done % SEGMENT == 0:
                    part = slice(done, done + SEGMENT)
                    self.lr[: len(lr[part])].copy_(lr[part])
                    for name, value in shared.ahead({k: v[part] for k, v in drawn.items()}, self.gamma).items():
                        self.made[name][: value.shape[0], : value.shape[1]].copy_(value)
                    self.at.zero_()
                self.steps[full[done]]()
            if task.stop_at is not None and passes[done + 1] > passes[done]:
                self.net.eval()
                with torch.cuda.stream(self.stream), torch.no_grad(), shared.autocast:
                    rows, classes = moved(torch.from_numpy(task.rows)), moved(task.classes)
                    guess = torch.cat([self.net(shared.pixels[part]).argmax(1) for part in rows.split(512)])
                    right = (guess == classes).float().mean()
                    evaluated = None if self.stream is None else self.stream.record_event()
                self.net.train()
                while evaluated is not None and not evaluated.query():  # others work meanwhile
                    yield
                if float(right) >= task.stop_at:
                    steps = done + 1
                    break
            elif done % 4 == 3:
                yield
        with torch.cuda.stream(self.stream):
            weights, momenta = (
                dict(zip(self.names, views(joined.clone(), self.parameters), strict=True))
                for joined in (self.weights, self.momenta)
            )
            weights |= {k: v.clone() for k, v in self.buffers.items()}
            state = {k: weights[k] for k in self.net.state_dict() if k in weights}
            out |= {"state": state, "momenta": momenta, "sums": self.sums / steps, "steps": steps}

    def _step(self, full: bool) -> None:
        """One step of SGD from the draws at the counter, which moves on. full: no image is padding."""
        for norm in self.net.modules():
            if isinstance(norm, SplitNorm):
                norm.masked = not full
        config, now = self.shared.config, {k: v.index_select(0, self.at)[0] for k, v in self.made.items()}
        self.valid.copy_(now["valid"])
        with self.shared.autocast:
            scores = self.net.scores(now["inputs"].permute(0, 3, 1, 2))
        own, mixed = scores[: config.batch], scores[config.batch :]
        priors = self.counts if config.balanced_softmax else None
        losses = [balanced_cross_entropy(own, now["target"], priors, now["valid"] > 0)]
        if self.shared.teacher is not None:
            losses.append(config.distillation_weight * compensation_loss(mixed, now["taught"], now["weight"]))
        grads = flat(torch.autograd.grad(sum(losses), self.parameters))
        with torch.no_grad():
            if config.clip > 0:
                grads.mul_((config.clip / (grads.norm() + 1e-6)).clamp(max=1.0))
            grads.add_(self.weights, alpha=config.weight_decay)
            self.momenta.mul_(config.momentum).add_(grads)
            self.weights.sub_(self.momenta * self.lr[self.at])
            self.sums.add_(torch.stack([loss.detach() for loss in losses]))
            self.at.add_(1)
