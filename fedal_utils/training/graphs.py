"""CUDA graphs that add the gradients of a batch; they serve all rounds of detectors of the same architecture."""

import copy
import hashlib
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor, nn

from ..detectors import Detector
from .inference import half_precision, tensor_cores

KEPT = 3  # detectors
_GRAPHS: "dict[tuple, Graphs]" = {}


def graphs_of(model: Detector, amp: bool, seed: int) -> "Graphs":
    """The graphs for this architecture, with the model's weights; seed: of what its loss samples."""
    key = (_signature(model), amp, next(model.parameters()).device)
    graphs = remembered(_GRAPHS, key, lambda: Graphs(model, amp), KEPT)
    graphs.generator.manual_seed(seed)
    graphs.net.train().load_state_dict(model.state_dict())
    for parameter in graphs.reached:
        parameter.grad.zero_()
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

    def gradients(self, batch: tuple) -> Tensor:
        """Add the gradients of a batch; its loss and the parts of it (P,), called `names`."""
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
        state, before = self.generator.get_state(), [b.clone() for b in self.net.buffers()]
        if not self.reached:
            self._add(places)
            self.reached = [p for p in self.net.parameters() if p.grad is not None]
            for place, value in zip(self.net.buffers(), before, strict=True):
                place.copy_(value)
            for parameter in self.reached:
                parameter.grad.zero_()
        touched = [*self.net.buffers(), *(p.grad for p in self.reached)]
        with tensor_cores(self.amp):
            run = captured(lambda: self._add(places), touched, self.device, self.generator)
        self.generator.set_state(state)
        return places, run

    def _add(self, batch: list[Tensor]) -> Tensor:
        inputs = tuple(batch[:-3]) if len(batch) > 4 else batch[0]
        with half_precision(self.device, self.amp):
            parts = self.net.loss(inputs, *batch[-3:], self.generator)
        loss, self.names = sum(parts.values()), ("loss", *parts)
        if self.reached:
            torch._foreach_add_([p.grad for p in self.reached], torch.autograd.grad(loss, self.reached))
        else:
            loss.backward()
        return torch.stack([loss.detach(), *(v.detach() for v in parts.values())])


def captured(
    function: Callable,
    touched: Sequence[Tensor],
    device: torch.device,
    generator: torch.Generator | None = None,
    stream: torch.cuda.Stream | None = None,
) -> Callable:
    """The function as a CUDA graph; on a CPU itself.

    touched: tensors that it writes to, left as they were. device: whose. generator: what it draws from.
    stream: where it is captured; graphs that run side by side need one each.
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


def _signature(model: nn.Module) -> str:
    """What a graph of the model depends on, weights apart: layers, their plain attributes, constant tensors, hooks."""
    digest, state = hashlib.sha256(), model.state_dict()
    for name, module in model.named_modules():
        plain = {k: v for k, v in vars(module).items() if isinstance(v, (bool, int, float, str, tuple))}
        digest.update(repr((name, type(module), plain | {"training": 0}, len(module._forward_pre_hooks))).encode())
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        digest.update(repr((name, tensor.shape, tensor.requires_grad)).encode())
        if name not in state:
            digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()
