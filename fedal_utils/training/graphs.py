"""A detector's training step as two CUDA graphs: one adds the gradients of a batch, one takes the step.

Learning rates and momenta are read from the device, so the graphs serve all rounds; they are kept for the next call
with a detector of the same architecture. Equal to `fit.EagerStep` but for rounding.
"""

from __future__ import annotations

import collections
import copy
import hashlib
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from ..config import TrainingConfig
from ..detectors import SSD, YOLO, Detector, FasterRCNN
from .inference import half_precision, tensor_cores
from .schedule import STEPS, anchored, clipped_together, parameter_groups, pull_back, rates, update_average

KEPT = 3  # detectors
BETAS, EPS = (0.9, 0.999), 1e-8  # of AdamW, torch's defaults


def can_be_graphed(model: Detector, device: torch.device) -> bool:
    """True on a GPU for detectors whose shapes do not depend on what they find."""
    return device.type == "cuda" and isinstance(model, (SSD, YOLO, FasterRCNN))


class GraphedStep:
    """The step of a copy of the model, whose weights, gradients and moments stay where they are in memory."""

    def __init__(self, model: Detector, config: TrainingConfig):
        self.net, self.config, self.parts = copy.deepcopy(model), config, ("loss",)
        self.device = next(model.parameters()).device
        self.autocast = half_precision(self.device, config.amp)
        self.net.to(memory_format=torch.channels_last)
        for parameter in self.net.parameters():
            parameter.grad = None
        self.reached: list[nn.Parameter] = []  # those that a loss has a gradient for
        self.losses = torch.compile(self._losses, dynamic=False) if config.compile else self._losses
        self.generator = torch.Generator(self.device)
        self.batches: dict[tuple, tuple[list[Tensor], torch.cuda.CUDAGraph, Tensor]] = {}
        self.stepping: torch.cuda.CUDAGraph | None = None
        self.rates = torch.zeros(
            6, device=self.device
        )  # lr, of biases, momentum, averages' weight, AdamW's corrections
        fields = ("momentum_buffer",) if config.optimizer == "sgd" else ("exp_avg", "exp_avg_sq")
        trained = {k: p for k, p in self.net.named_parameters() if p.requires_grad}
        self.moments = {f: {k: torch.zeros_like(p) for k, p in trained.items()} for f in fields}
        self.anchors = anchored(self.net, config)
        self.averaged = {k: v.clone() for k, v in self.net.state_dict().items()} if config.ema > 0 else {}

    def begin(self, model: Detector, kept: dict[str, Tensor], seed: int) -> GraphedStep:
        """Take over a model's weights and an optimizer's state; seed: of what its loss samples."""
        self.generator.manual_seed(seed)
        self.net.train()
        _copy(self.net.state_dict(), model.state_dict())
        _copy(self.averaged, model.state_dict())
        for parameter, sent in self.anchors:
            sent.copy_(parameter.detach())
        for field, moments in self.moments.items():
            for name, moment in moments.items():
                saved = kept.get(f"{field}:{name}")
                moment.zero_() if saved is None else moment.copy_(saved)
        self.taken = max([0, *(int(v) for k, v in kept.items() if k.startswith("step:"))])
        torch._foreach_zero_([p.grad for p in self.reached]) if self.reached else None
        return self

    def _losses(self, inputs, boxes: Tensor, classes: Tensor, ignore: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        with self.autocast:
            parts = self.net.loss(inputs, boxes, classes, ignore, self.generator)
        return sum(parts.values()), parts

    def _add_gradients(self, batch: list[Tensor]) -> Tensor:
        inputs = tuple(batch[:-3]) if len(batch) > 4 else batch[0]
        loss, parts = self.losses(inputs, *batch[-3:])
        if not self.reached:
            loss.backward()
            self.reached = [p for p in self.net.parameters() if p.grad is not None]
        else:
            grads = torch.autograd.grad(loss, self.reached)
            torch._foreach_add_([p.grad for p in self.reached], grads)
        self.parts = ("loss", *parts)
        return torch.stack([loss.detach(), *(v.detach() for v in parts.values())])

    def gradients(self, batch: tuple) -> Tensor:
        """Add the gradients of a batch; the loss and its parts (P,), named by `parts`."""
        inputs = batch[0] if isinstance(batch[0], tuple) else (batch[0],)
        flat = [*inputs, *batch[1:]]
        key = tuple((t.shape, t.dtype) for t in flat)
        if key not in self.batches:
            self.batches[key] = self._prepare(flat)
        places, run = self.batches[key]
        for place, tensor in zip(places, flat, strict=True):
            place.copy_(tensor)
        return run()

    def _prepare(self, batch: list[Tensor]) -> tuple[list[Tensor], Callable[[], Tensor]]:
        """Places for batches of this shape, and what adds the gradients of the batch that lies there."""
        layout = {4: torch.channels_last}
        places = [t.clone(memory_format=layout.get(t.dim(), torch.contiguous_format)) for t in batch]
        fresh, before = not self.reached, [b.clone() for b in self.net.buffers()]
        if fresh:
            self._add_gradients(places)
            torch._foreach_zero_([p.grad for p in self.reached])
            _copy_all(self.net.buffers(), before)
        touched = [*self.net.buffers(), *(p.grad for p in self.reached)]
        state = self.generator.get_state()
        with tensor_cores(self.config.amp):
            run = captured(lambda: self._add_gradients(places), touched, self.device, self.generator)
        self.generator.set_state(state)
        return places, run

    def update(self, config: TrainingConfig, step: int, steps: int, decay: float) -> None:
        """Take the step `step` of `steps`, and average the weights."""
        self.taken += 1
        corrections = [1 - BETAS[0] ** self.taken, (1 - BETAS[1] ** self.taken) ** 0.5]
        now = torch.tensor([*rates(config, step, steps), 1 - decay, *corrections])
        self.rates.copy_(now.pin_memory() if self.device.type == "cuda" else now, non_blocking=True)
        if self.stepping is None:
            moments = [m for each in self.moments.values() for m in each.values()]
            grads = [p.grad for p in self.reached]
            touched = [*self.reached, *grads, *moments, *self.averaged.values()]
            self.stepping = captured(self._step, touched, self.device)
        self.stepping()

    @torch.no_grad()
    def _step(self) -> None:
        if self.config.clip > 0:
            for together in clipped_together(self.net):
                nn.utils.clip_grad_norm_(together, self.config.clip)
        pull_back(self.anchors, self.config.proximal)
        names = {p: k for k, p in self.net.named_parameters()}
        lr, bias_lr, momentum, weight, first, second = self.rates.unbind()
        decays = (self.config.weight_decay, 0.0, 0.0)
        for group, rate, decay in zip(parameter_groups(self.net), (lr, lr, bias_lr), decays, strict=True):
            group = [p for p in group if p.grad is not None]
            if not group:
                continue
            grads, (moment, *more) = (
                [p.grad for p in group],
                [[m[names[p]] for p in group] for m in self.moments.values()],
            )
            if self.config.optimizer == "sgd":
                if decay:
                    torch._foreach_add_(grads, group, alpha=decay)
                torch._foreach_mul_(moment, momentum)
                torch._foreach_add_(moment, grads)
                if self.config.momentum > 0:
                    torch._foreach_add_(grads, torch._foreach_mul(moment, momentum))
                else:
                    torch._foreach_copy_(grads, moment)
            else:
                torch._foreach_mul_(group, 1 - rate * decay)
                torch._foreach_lerp_(moment, grads, 1 - BETAS[0])
                torch._foreach_mul_(more[0], BETAS[1])
                torch._foreach_addcmul_(more[0], grads, grads, 1 - BETAS[1])
                below = torch._foreach_sqrt(more[0])
                torch._foreach_div_(below, second)
                torch._foreach_add_(below, EPS)
                torch._foreach_copy_(grads, moment)
                torch._foreach_div_(grads, below)
                torch._foreach_div_(grads, first)
            torch._foreach_mul_(grads, -rate)
            torch._foreach_add_(group, grads)
        torch._foreach_zero_([p.grad for p in self.reached])
        if self.averaged:
            update_average(self.averaged, self.net.state_dict(), weight)

    def finish(self, model: Detector) -> None:
        """The weights, or their average, into the model."""
        _copy(model.state_dict(), self.averaged or self.net.state_dict())

    def save(self, state: dict[str, Tensor], steps: int) -> None:
        """The optimizer's state, as `schedule.save_optimizer` has it."""
        reached = set(map(id, self.reached))
        used = {k for k, p in self.net.named_parameters() if id(p) in reached}
        for field, moments in self.moments.items():
            state |= {f"{field}:{k}": m.contiguous().cpu() for k, m in moments.items() if k in used}
        if self.config.optimizer == "adamw":
            state |= {f"step:{k}": torch.tensor(float(self.taken)) for k in used}
        state[STEPS] = torch.tensor(steps)


def captured(
    function: Callable, touched: Sequence[Tensor], device: torch.device, generator: torch.Generator | None = None
) -> Callable:
    """The function as a CUDA graph; on a CPU itself.

    touched: tensors that it writes to, left as they were. generator: what it draws from.
    """
    if device.type != "cuda":
        return function
    before = [t.detach().clone() for t in touched]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    if generator is not None:
        graph.register_generator_state(generator)
    with torch.cuda.graph(graph):
        values = function()
    _copy_all(touched, before)

    def replay() -> Tensor | None:
        graph.replay()
        return None if values is None else values.clone()

    return replay


@torch.no_grad()
def _copy_all(places: Iterable[Tensor], values: Iterable[Tensor]) -> None:
    """Many copies in few launches, type by type."""
    pairs: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
    for place, value in zip(places, values, strict=True):
        mine, theirs = pairs.setdefault(place.dtype, ([], []))
        mine.append(place)
        theirs.append(value)
    for mine, theirs in pairs.values():
        torch._foreach_copy_(mine, theirs)


def _copy(places: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    _copy_all(places.values(), [values[k] for k in places])


def _signature(model: nn.Module) -> str:
    """What a graph of the model depends on, weights apart: layers, their plain attributes, constant tensors, hooks."""
    digest, state = hashlib.sha256(), model.state_dict()
    for name, module in model.named_modules():
        plain = {
            k: v for k, v in vars(module).items() if isinstance(v, (bool, int, float, str, tuple)) and k != "training"
        }
        digest.update(repr((name, type(module).__name__, plain, len(module._forward_pre_hooks))).encode())
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        digest.update(repr((name, tensor.shape, tensor.requires_grad)).encode())
        if name not in state:
            digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()


_STEPS: collections.OrderedDict[tuple, GraphedStep] = collections.OrderedDict()  # the last few


def graphed_step(model: Detector, config: TrainingConfig, kept: dict[str, Tensor], seed: int) -> GraphedStep:
    """The graphs for this architecture and recipe, from an earlier call if there was one, with the model's weights."""
    names = ("optimizer", "weight_decay", "clip", "proximal", "amp", "compile")
    baked = tuple(getattr(config, name) for name in names) + (config.momentum > 0, config.ema > 0)
    key = (_signature(model), baked, next(model.parameters()).device)
    if key not in _STEPS:
        _STEPS[key] = GraphedStep(model, config)
    _STEPS.move_to_end(key)
    while len(_STEPS) > KEPT:
        _STEPS.popitem(last=False)
    return _STEPS[key].begin(model, kept, seed)
