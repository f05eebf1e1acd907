"""One step of one client's classifier as one CUDA graph; labelled and mixed images are one batch, in bfloat16."""

import contextlib
import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..config import TrainingConfig
from ..data import Images, random_crop
from ..detectors import Classifier, balanced_cross_entropy, compensation_loss, compensation_weights
from .classifier import ClassifierTask, Draws, State
from .graphs import captured
from .inference import half_precision

SEGMENT = 32  # steps whose images are made ahead


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device; a GPU's stream waits for no more than this copy, the processor for nothing."""
    if device.type == "cuda" and not tensor.is_cuda:
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


class SplitNorm(nn.BatchNorm2d):
    """A BatchNorm2d for `batches` of equal length, each with its own statistics.

    masked: images of the first batch whose `valid` (B,) is 0 are padding, which moves no statistics.
    """

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


def views(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Pieces of a flat tensor in the shapes of `like`, those of convolutions in channels_last order."""
    out = []
    for part, t in zip(flat.split([t.numel() for t in like]), like, strict=True):
        nhwc = t.dim() == 4
        shape = [t.shape[i] for i in (0, 2, 3, 1)] if nhwc else t.shape
        out.append(part.view(shape).permute(0, 3, 1, 2) if nhwc else part.view(shape))
    return out


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    """The tensors one behind another, as `views` takes them apart."""
    return torch.cat([(t.permute(0, 2, 3, 1) if t.dim() == 4 else t).reshape(-1) for t in tensors])


class Shared:
    """What all clients' steps share: pixels, teacher, recipe and the loss, all that is baked into a graph."""

    def __init__(self, model: Classifier, images: Images, config: TrainingConfig, mixing: bool, released: bool, device):
        self.model, self.config, self.mixing, self.device = copy.deepcopy(model).to(device), config, mixing, device
        self.images, self.pixels = images, images.pixels.to(device)
        self.classes, self.slots = model.classes, []
        self.teacher = copy.deepcopy(self.model).requires_grad_(False).train(released)
        for module in self.teacher.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.0  # all clients ask it: it keeps its statistics
        self.autocast = half_precision(device)

    def grown(self, count: int) -> "list[ClientStep]":
        """So many slots; those that are not there yet are made."""
        while len(self.slots) < count:
            self.slots.append(ClientStep(self))
        return self.slots[:count]

    def _crops(self, rows: Tensor, flip: Tensor, shift: Tensor) -> Tensor:
        """(S, B, 3, H, W) scaled pixels of rows (S, B), mirrored and cropped."""
        x = self.pixels[rows.flatten()]
        x = torch.where(flip.flatten()[:, None, None, None], x.flip(-1), x)
        return self.model.scaled(random_crop(x, shift.flatten(0, 1), self.config.augment.crop)).unflatten(0, rows.shape)

    @torch.no_grad()
    def ahead(self, draws: Draws, gamma: Tensor) -> dict[str, Tensor]:
        """What S steps need beside the client's weights.

        inputs (S, B or 2 B, H, W, 3): scaled labelled images, then mixed ones; target (S, B), valid (S, B); of the
        mixed ones the teacher's class scores taught (S, B, C), and weight (S, B), what their distillation counts.
        """
        steps, batch = draws["rows"].shape
        x = self._crops(draws["rows"], draws["flip"], draws["shift"])
        valid = (torch.arange(batch, device=self.device) < draws["length"][:, None]).float()
        made = {"target": draws["target"], "valid": valid}
        if self.mixing:
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

    def losses(self, net, counts, inputs, target, valid, taught, weight) -> tuple[Tensor, Tensor]:
        """Supervised loss and distillation of one step, as `fit_classifier` has them."""
        batch = self.config.batch
        with self.autocast:
            scores = net.scores(inputs.permute(0, 3, 1, 2))
        priors = counts if self.config.balanced_softmax else None
        supervised = balanced_cross_entropy(scores[:batch], target, priors, valid > 0)
        if not self.mixing:
            return supervised, torch.zeros_like(supervised)
        return supervised, self.config.distillation_weight * compensation_loss(scores[batch:], taught, weight)


class ClientStep:
    """Room for one client at a time: its network, its draws, and the graphs of its step."""

    def __init__(self, shared: Shared):
        self.shared, config, device = shared, shared.config, shared.device
        batch, batches = config.batch, 1 + shared.mixing
        self.valid = torch.ones(batch, device=device)
        self.net = copy.deepcopy(shared.model)
        for name, norm in list(self.net.named_modules()):
            if isinstance(norm, nn.BatchNorm2d):
                split = SplitNorm(norm.num_features, norm.eps, norm.momentum)
                split.batches, split.valid = batches, self.valid
                self.net.set_submodule(name, split)
        self.net.to(device).train()
        self.names = [name for name, _ in self.net.named_parameters()]
        like = [p.detach() for p in self.net.parameters()]
        self.weights = _flat(like)
        self.momenta, self.sent = torch.zeros_like(self.weights), torch.zeros_like(self.weights)
        self.parameters = [nn.Parameter(view) for view in views(self.weights, like)]
        for name, parameter in zip(self.names, self.parameters, strict=True):
            module, _, last = name.rpartition(".")
            setattr(self.net.get_submodule(module), last, parameter)
        self.buffers = {k: v for k, v in self.net.named_buffers() if k.rpartition(".")[2].startswith("running")}
        self.counts = torch.ones(shared.classes, dtype=torch.int64, device=device)
        self.gamma, self.sums = torch.zeros(shared.classes, device=device), torch.zeros(2, device=device)
        self.at, self.lr = torch.zeros(1, dtype=torch.int64, device=device), torch.zeros(SEGMENT, device=device)
        with shared.autocast:
            kind = torch.bfloat16 if torch.is_autocast_enabled(device.type) else torch.float32
        self.made = {  # see `Shared.ahead`
            "inputs": ((batch * batches, *shared.pixels.shape[-2:], 3), kind),
            "target": ((batch,), torch.int64),
            "valid": ((batch,), torch.float32),
            "taught": ((batch, shared.classes), torch.float32),
            "weight": ((batch,), torch.float32),
        }
        self.made = {k: torch.ones(SEGMENT, *shape, dtype=t, device=device) for k, (shape, t) in self.made.items()}
        self.stream = torch.cuda.Stream() if device.type == "cuda" else None
        self.steps = {}  # of a full batch, of a short one
        for full in (True, False):
            self.steps[full] = captured(lambda full=full: self._step(full), [self.at], device, stream=self.stream)

    def on_stream(self):
        """Inside, kernels go to this slot's stream."""
        return contextlib.nullcontext() if self.stream is None else torch.cuda.stream(self.stream)

    def load(self, state: State, task: ClassifierTask) -> None:
        """A client's weights, its optimizer state and class counts."""
        device, kept = self.shared.device, task.optimizer_state or {}
        momenta = [kept.get(f"momentum_buffer:{k}", torch.zeros_like(state[k])) for k in self.names]
        self.weights.copy_(moved(_flat([state[k] for k in self.names]), device))
        self.momenta.copy_(moved(_flat(momenta), device))
        self.sent.copy_(self.weights)
        for key, value in self.buffers.items():
            value.copy_(moved(state[key], device))
        self.counts.copy_(moved(task.counts, device))
        self.gamma.copy_(compensation_weights(self.counts))
        self.sums.zero_()

    def load_steps(self, part: Draws, lr: Tensor) -> None:
        """Make what the next steps need, at most `SEGMENT`, from their draws and learning rates."""
        self.lr[: len(lr)].copy_(lr)
        for name, value in self.shared.ahead(part, self.gamma).items():
            self.made[name][tuple(slice(size) for size in value.shape[:2])].copy_(value)
        self.at.zero_()

    def state(self) -> State:
        """Copies of the weights and statistics, on the device."""
        weights = dict(zip(self.names, views(self.weights.clone(), self.parameters), strict=True))
        kept = weights | {k: v.clone() for k, v in self.buffers.items()}
        return {k: kept[k] for k in self.net.state_dict() if k in kept}

    def _step(self, full: bool) -> None:
        """One step of SGD from the draws at the counter, which moves on. full: no image is padding."""
        for norm in self.net.modules():
            if isinstance(norm, SplitNorm):
                norm.masked = not full
        config, now = self.shared.config, {k: v.index_select(0, self.at)[0] for k, v in self.made.items()}
        self.valid.copy_(now["valid"])
        supervised, distillation = self.shared.losses(self.net, self.counts, **now)
        grads = _flat(torch.autograd.grad(supervised + distillation, self.parameters))
        with torch.no_grad():
            if config.clip > 0:
                grads.mul_((config.clip / (grads.norm() + 1e-6)).clamp(max=1.0))
            if config.proximal > 0:
                grads.add_(self.weights - self.sent, alpha=config.proximal)
            grads.add_(self.weights, alpha=config.weight_decay)
            self.momenta.mul_(config.momentum).add_(grads)
            self.weights.sub_(self.momenta * self.lr[self.at])
            self.sums.add_(torch.stack([supervised.detach(), distillation.detach()]))
            self.at.add_(1)
