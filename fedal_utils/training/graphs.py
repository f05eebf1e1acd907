"""CUDA graphs that add the gradients of a batch, kept for all rounds of one architecture; parts of `streams`."""

import copy
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor, nn

from ..detectors import Detector
from .inference import half_precision, tensor_cores

KEPT = 3  # detectors
_GRAPHS: "dict[tuple, Graphs]" = {}


def add_gradients(
    net: Detector, batch: tuple, amp: bool, generator: torch.Generator, reached: Sequence[nn.Parameter] = ()
) -> tuple[tuple[str, ...], Tensor]:
    """Add the gradients of a batch, in place to those of `reached` if known; names and values of losses (P,)."""
    device = batch[-1].device
    with tensor_cores(amp):
        with half_precision(device, amp):
            parts = net.loss(*batch, generator)
        loss = sum(parts.values())
        if reached:
            torch._foreach_add_([p.grad for p in reached], torch.autograd.grad(loss, reached))
        else:
            loss.backward()
    return ("loss", *parts), torch.stack([loss.detach(), *(v.detach() for v in parts.values())])


def graphs_of(model: Detector, amp: bool, seed: int) -> "Graphs":
    """The graphs for this architecture, with the model's weights; seed: of what its loss samples."""
    key = (model.recipe, model.frozen, amp, next(model.parameters()).device)
    graphs = remembered(_GRAPHS, key, lambda: Graphs(model, amp), KEPT)
    graphs.generator.manual_seed(seed)
    graphs.net.train().load_state_dict(model.state_dict())
    graphs.net.zero_grad(set_to_none=False)
    return graphs


class Graphs:
    """A copy of a detector whose weights and gradients stay where they are in memory, and a graph for each shape."""

    def __init__(self, model: Detector, amp: bool):
        self.net, self.amp, self.names = copy.deepcopy(model), amp, ()
        self.device = next(model.parameters()).device
        self.net.to(memory_format=torch.channels_last).zero_grad(set_to_none=True)
        self.reached: list[nn.Parameter] = []  # those that a loss has a gradient for
        self.generator = torch.Generator(self.device)
        self.batches: dict[tuple, tuple[list[Tensor], Callable[[], Tensor]]] = {}

    def gradients(self, batch: tuple) -> tuple[tuple[str, ...], Tensor]:
        """`add_gradients` of a batch."""
        inputs = batch[0] if isinstance(batch[0], tuple) else (batch[0],)
        flat = [*inputs, *batch[1:]]
        key = tuple((t.shape, t.dtype) for t in flat)
        if key not in self.batches:
            self.batches[key] = self._prepare(flat)
        places, run = self.batches[key]
        for place, tensor in zip(places, flat, strict=True):
            place.copy_(tensor)
        return self.names, run()

    def _prepare(self, batch: list[Tensor]) -> tuple[list[Tensor], Callable[[], Tensor]]:
        """Places for batches of this shape, and what adds the gradients of the batch that lies there."""
        layouts = (torch.channels_last if t.dim() == 4 else torch.contiguous_format for t in batch)
        places = [t.clone(memory_format=layout) for t, layout in zip(batch, layouts, strict=True)]
        inputs = tuple(places[:-3]) if len(places) > 4 else places[0]

        def add() -> Tensor:
            whole = (inputs, *places[-3:])
            self.names, values = add_gradients(self.net, whole, self.amp, self.generator, self.reached)
            return values

        state, before = self.generator.get_state(), [b.clone() for b in self.net.buffers()]
        if not self.reached:
            add()
            self.reached = [p for p in self.net.parameters() if p.grad is not None]
            for place, value in zip(self.net.buffers(), before, strict=True):
                place.copy_(value)
            self.net.zero_grad(set_to_none=False)
        run = captured(add, [*self.net.buffers(), *(p.grad for p in self.reached)], self.device, self.generator)
        self.generator.set_state(state)
        return places, run


def captured(function: Callable, touched: Sequence[Tensor], device, generator=None, stream=None) -> Callable:
    """The function as a CUDA graph; on a CPU itself.

    touched: tensors that it writes to, left as they were. generator: what it draws from. stream: where it is captured;
    graphs that run side by side need one each.
    """
    if device.type != "cuda":
        return function
    before = [t.detach().clone() for t in touched]
    stream = stream or torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    if generator is not None:
        graph.register_generator_state(generator)
    with torch.cuda.graph(graph, stream=stream):
        values = function()
    for place, value in zip(touched, before, strict=True):
        place.detach().copy_(value)

    def replay() -> Tensor | None:
        graph.replay()
        return None if values is None else values.clone()

    return replay


def remembered(cache: dict, key: Hashable, make: Callable[[], object], most: int):
    """What was made for this key earlier, or is made now; the cache keeps those that were asked for last."""
    cache[key] = cache.pop(key, None) or make()
    while len(cache) > most:
        del cache[next(iter(cache))]
    return cache[key]


class SplitNorm(nn.BatchNorm2d):
    """A BatchNorm2d for `batches` of equal length, each with its own statistics; masked: of the first only `valid`."""

    batches, masked, valid = 1, False, None

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        first, *more = x.chunk(self.batches)
        first = self._without_padding(first) if self.masked else super().forward(first)
        return torch.cat([first, *map(super().forward, more)]) if more else first

    def _without_padding(self, x: Tensor) -> Tensor:
        counted = self.valid.view(-1, 1, 1, 1)
        count = counted.sum() * (x.shape[2] * x.shape[3])
        mean = (x.float() * counted).sum((0, 2, 3), keepdim=True) / count
        apart = x.float() - mean
        variance = (apart.square() * counted).sum((0, 2, 3), keepdim=True) / count
        with torch.no_grad():
            self.running_mean.lerp_(mean.flatten(), self.momentum)
            self.running_var.lerp_((variance * (count / (count - 1).clamp(min=1))).flatten(), self.momentum)
        scale = self.weight.view(1, -1, 1, 1) * (variance + self.eps).rsqrt()
        return (apart * scale + self.bias.view(1, -1, 1, 1)).to(x.dtype)


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """The tensors one behind another, those of convolutions in channels_last order."""
    return torch.cat([(t.permute(0, 2, 3, 1) if t.dim() == 4 else t).reshape(-1) for t in tensors])


def views(joined: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The pieces of a `flat` tensor in the shapes of `like`."""
    out = []
    for part, t in zip(joined.split([t.numel() for t in like]), like, strict=True):
        last = [t.shape[i] for i in (0, 2, 3, 1)] if t.dim() == 4 else t.shape
        out.append(part.view(last).permute(0, 3, 1, 2) if t.dim() == 4 else part.view(last))
    return out
