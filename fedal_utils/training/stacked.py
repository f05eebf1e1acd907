"""Train M clients' classifiers as one model whose layers are widened: `detectors.classifiers.stacked`.

Equal to one client after another (`classifier.fit_classifier`) but for rounding, from the same draws.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..config import TrainingConfig
from ..data import Images
from ..detectors import (
    Classifier,
    State,
    balanced_cross_entropy,
    compensation_loss,
    compensation_weights,
    join,
    mark_valid,
    split,
    stacked,
)
from .classifier import ClassifierTask, Draws, LocalResult, check_tasks, draw, pixels_of, ready, sound
from .schedule import STEPS, TrainingDiverged, learning_rate_factor, pull_back

# Scaled pixels of a step (clients x batch x height x width) that one stack holds on a CPU. More, and the activations
# leave its caches: at 32 x 32 a stack then takes longer than its clients one after another (`make bench`).
CPU_STACK = 1 << 15


def clients_per_stack(batch: int, image_size: tuple[int, int], device: str | torch.device) -> int:
    """How many clients train as one stacked model: on a CPU as many as pay, on a GPU all (a number larger than any)."""
    if torch.device(device).type != "cpu":
        return 1 << 30
    return max(1, CPU_STACK // (batch * image_size[0] * image_size[1]))


def fit_stacked(
    model: Classifier,
    states: Sequence[State],
    tasks: Sequence[ClassifierTask],
    images: Images,
    config: TrainingConfig,
    teacher: Classifier | None = None,
    device: str | torch.device = "cpu",
    as_released: bool = False,
) -> list[LocalResult | TrainingDiverged]:
    """What `classifier.fit_in_turn` does, for all clients at once, with its arguments.

    Clients may differ in the number of images, of steps and in class counts. A client whose training diverges harms
    nobody else: its error stands in its place. Optimizer states are updated as there, but for a client that diverged.
    """
    device = torch.device(device)
    check_tasks(tasks, config)
    if any(task.stop_at is not None for task in tasks):
        raise ValueError("a stack cannot stop one of its clients early: train it with fit_in_turn")
    most = clients_per_stack(config.batch, images.image_size, device)
    teacher = ready(teacher, config, device, as_released)
    out: list[LocalResult | TrainingDiverged | None] = [None] * len(tasks)
    for mixing in (True, False):
        same = [m for m, task in enumerate(tasks) if task.mixes(config, teacher) == mixing]
        for start in range(0, len(same), most):
            members = same[start : start + most]
            draws = [draw(tasks[m], config, mixing, as_released) for m in members]
            stack = _Stack([tasks[m] for m in members], draws, images, config, teacher if mixing else None, device)
            results = stack.train(model, [states[m] for m in members])
            for m, result, memory in zip(members, results, stack.optimizer_states, strict=True):
                try:
                    out[m] = sound(result, tasks[m], images)
                except TrainingDiverged as error:
                    out[m] = error
                    continue
                if tasks[m].optimizer_state is not None:
                    tasks[m].optimizer_state.update(memory)
    return out


def joined(draws: Sequence[Draws]) -> Draws:
    """Draws of M clients side by side (M, S, ...), filled up to the longest call."""
    each = {name: [getattr(d, name) for d in draws] for name, some in vars(draws[0]).items() if some is not None}
    pad = nn.utils.rnn.pad_sequence
    return Draws(**{name: pad(parts, batch_first=True) for name, parts in each.items()})


class _Stack:
    """Some clients from the start of a call to its end. Who has taken all its steps leaves, and a new stack is made."""

    def __init__(
        self,
        tasks: Sequence[ClassifierTask],
        draws: Sequence[Draws],
        images: Images,
        config: TrainingConfig,
        teacher: Classifier | None,
        device: torch.device,
    ):
        self.tasks, self.images, self.config, self.teacher, self.device = tasks, images, config, teacher, device
        self.draws, self.steps = joined(draws), [task.steps(config) for task in tasks]
        self.counts = torch.stack([task.counts for task in tasks]).to(device)  # (M, C)
        self.gamma = compensation_weights(self.counts)
        self.optimizer_states = [dict(task.optimizer_state or {}) for task in tasks]

    def train(self, model: Classifier, sent: Sequence[State]) -> list[LocalResult]:
        """From the states that were sent to the results; the optimizer states are the clients' afterwards."""
        config, device, states = self.config, self.device, list(sent)
        sums = torch.zeros(2, len(self.tasks), device=device)
        done = 0
        while any(done < count for count in self.steps):
            here = [m for m, count in enumerate(self.steps) if done < count]
            self.net = stacked(model, len(here)).to(device)
            self.net.load_state_dict(join([states[m] for m in here]), strict=False)
            self.net.train()
            names = [name for name, _ in self.net.named_parameters()]
            momenta = [self._momentum(name, here, states).to(device) for name in names]
            anchors = []  # of FedProx: not where a new stack begins, but what the clients were sent
            if config.proximal > 0:
                anchors = [torch.cat([sent[m][name] for m in here]).to(device) for name in names]
            for step in range(done, min(self.steps[m] for m in here)):
                sums[:, here] += self._losses(step, here)
                positions = [self.tasks[m].position(config) for m in here]
                factors = [learning_rate_factor(config, before + step, whole) for before, whole in positions]
                _sgd_step(list(self.net.parameters()), momenta, factors, config, anchors)
            done = step + 1
            after = split(self.net.state_dict(), len(here))
            kept = split(dict(zip(names, momenta, strict=True)), len(here))
            for place, m in enumerate(here):
                states[m] = after[place]
                self.optimizer_states[m] = {f"momentum_buffer:{name}": value for name, value in kept[place].items()}
        results = []
        for m, task in enumerate(self.tasks):
            supervised, distillation = (sums[:, m] / self.steps[m]).tolist()
            parts = {"supervised": supervised} | ({"distillation": distillation} if self.teacher is not None else {})
            results.append(LocalResult(states[m], self.steps[m], sum(parts.values()), parts))
            self.optimizer_states[m][STEPS] = torch.tensor(task.position(config)[0] + self.steps[m])
        return results

    def _momentum(self, name: str, here: Sequence[int], states: Sequence[State]) -> Tensor:
        key = f"momentum_buffer:{name}"
        return torch.cat([self.optimizer_states[m].get(key, torch.zeros_like(states[m][name])) for m in here])

    def _losses(self, step: int, here: Sequence[int]) -> Tensor:
        """(2, M): supervised loss and distillation of each client; their gradients are in the net afterwards."""
        draws = self.draws.at((here, step))
        lengths = draws.length.tolist()
        longest, counts = max(lengths), self.counts[here]
        valid = None  # (M, B), where batches are of different length
        if min(lengths) < longest:
            valid = (torch.arange(longest) < draws.length[:, None]).to(self.device)
        mark_valid(self.net, valid if valid is None else valid.T)
        rows, flip, shift, target = (t[:, :longest] for t in (draws.rows, draws.flip, draws.shift, draws.target))
        scores = self._scores(self._pixels(rows, flip, shift))
        counts_used = counts if self.config.balanced_softmax else None
        supervised = balanced_cross_entropy(scores, target.to(self.device), counts_used, valid)
        distillation = torch.zeros_like(supervised)
        if self.teacher is not None:
            mark_valid(self.net, None)
            distillation = self.config.distillation_weight * self._distillation(draws, self.gamma[here])
        self.net.zero_grad(set_to_none=True)
        (supervised + distillation).sum().backward()
        return torch.stack([supervised, distillation]).detach()

    def _pixels(self, rows: Tensor, flip: Tensor, shift: Tensor) -> Tensor:
        """(M, B, 3, H, W) scaled pixels."""
        flat = rows.flatten(), flip.flatten(), shift.flatten(0, 1)
        x = pixels_of(self.net, self.images, *flat, self.config.augment.crop, self.device)
        return x.unflatten(0, rows.shape)

    def _scores(self, x: Tensor) -> Tensor:
        """(M, B, 3, H, W) -> (M, B, C) by each client's own weights."""
        return self.net.scores(x.transpose(0, 1).flatten(1, 2)).unflatten(1, (len(x), -1)).transpose(0, 1)

    def _distillation(self, draws: Draws, gamma: Tensor) -> Tensor:
        """(M,) distillation of the global model on mixed unlabelled images (KAFAL, 4.2)."""
        u = self._pixels(draws.mixed, draws.mixed_flip, draws.mixed_shift)
        beta, partner = draws.beta.to(self.device), draws.partner.to(self.device)  # (M, U)
        part, place = beta[:, :, None, None, None], torch.arange(len(u), device=self.device)[:, None]
        mixed = part * u + (1 - part) * u[place, partner]
        with torch.no_grad():
            if self.teacher.training:  # as released: it uses the statistics of each client's batch
                taught = torch.stack([self.teacher.scores(x) for x in mixed])
            else:
                taught = self.teacher.scores(mixed.flatten(0, 1)).unflatten(0, mixed.shape[:2])
            likely = gamma.gather(1, taught.argmax(2))  # (M, U)
            weight = beta * likely + (1 - beta) * likely.gather(1, partner)
        return compensation_loss(self._scores(mixed), taught, weight)


@torch.no_grad()
def _sgd_step(
    parameters: list[Tensor],
    momenta: list[Tensor],
    factors: Sequence[float],
    config: TrainingConfig,
    anchors: Sequence[Tensor] = (),
) -> None:
    """One step of torch's SGD for M clients whose weights lie one after another in each parameter.

    parameters, momenta: with their gradients, and what the optimizer remembers.
    factors (M,): on each client's learning rate. The gradient is clipped client by client.
    config: learning rate, momentum, weight decay, clip.
    anchors: FedProx's w_t of each parameter; none = no such term.
    """
    clients, grads = len(factors), [p.grad for p in parameters]

    def spread(values: Tensor, like: Tensor) -> Tensor:  # (M,) over a parameter's first dimension
        return values.repeat_interleave(len(like) // clients).view(-1, *[1] * (like.dim() - 1))

    if config.clip > 0:
        squares = sum(g.square().unflatten(0, (clients, -1)).flatten(1).sum(1) for g in grads)
        scale = (config.clip / (squares.sqrt() + 1e-6)).clamp(max=1.0)
        for grad in grads:
            grad.mul_(spread(scale, grad))
    if anchors:
        pull_back(zip(parameters, anchors, strict=True), config.proximal)
    torch._foreach_add_(grads, parameters, alpha=config.weight_decay)
    torch._foreach_mul_(momenta, config.momentum)
    torch._foreach_add_(momenta, grads)
    if len(set(factors)) == 1:
        torch._foreach_add_(parameters, momenta, alpha=-config.lr * factors[0])
        return
    rates = torch.tensor([config.lr * factor for factor in factors], device=parameters[0].device)
    for parameter, momentum in zip(parameters, momenta, strict=True):
        parameter.sub_(spread(rates, parameter) * momentum)
