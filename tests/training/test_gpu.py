"""On a GPU: graphs against the operations one by one, no wait inside a pass, agreement with the CPU.

Plain functions, so that `make gpu` can call them where there is no pytest; elsewhere they are skipped without a GPU.
Distances are of the way that weights went: |ours - theirs| / |theirs - start|.
"""

import contextlib
import sys
import time
import traceback
import warnings

import torch
from client_tasks import CONFIG, MIXING, model, small_images, states, task, unequal

from fedal_utils import data, training
from fedal_utils.config import Config, TrainingConfig
from fedal_utils.data import Digits
from fedal_utils.detectors import build
from fedal_utils.seeding import torch_rng_for
from fedal_utils.training import LocalTask, graphs, streams

try:
    import pytest

    pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
except ImportError:
    pass

HERE = "cuda"
MODULES = [sys.modules[f"fedal_utils.training.{name}"] for name in ("fit", "graphs", "streams", "inference")]


@contextlib.contextmanager
def changed(**values):
    """Names of the training room's modules set to something else for a while, float32 convolutions without TF32."""
    before = [(m, name, getattr(m, name)) for m in MODULES for name in values if hasattr(m, name)]
    tf32 = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    for module, name, _ in before:
        setattr(module, name, values[name])
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = tf32
        for module, name, value in before:
            setattr(module, name, value)


def full_precision(device, wanted=None):
    return torch.autocast(torch.device(device).type, enabled=False)


def way(ours, theirs, start) -> float:
    """How far apart two ends are, as a part of the way to one of them; all of it, over all entries of a state."""
    pairs = [(ours[k].double().cpu(), theirs[k].double().cpu(), start[k].double().cpu()) for k in theirs]
    apart, whole = (sum(float((p[0] - p[1]).square().sum()) for p in q) for q in (pairs, [p[1:] for p in pairs]))
    return (apart / max(1e-12, whole)) ** 0.5


def floats(state):
    return {k: v.detach().clone() for k, v in state.items() if v.is_floating_point()}


def client_ways(name="resnet8", half=False, iterations=20, as_released=False):
    """Of five unequal clients: streams against one after another on the GPU, from the same draws."""
    streams._KEPT.clear()
    images, start, teacher = small_images().to(HERE), model(name), model(name, seed=9)
    config = MIXING.replace(lr=0.01, clip=1.0, schedule="cosine", epochs=7)
    runs = []
    with changed(**({} if half else {"half_precision": full_precision})):
        for train in (training.fit_in_turn, training.fit_graphs):
            tasks = unequal(state=True, iterations=iterations)
            runs.append(train(start, states(start, 5), tasks, images, config, teacher, HERE, as_released))
    first, pairs = floats(start.state_dict()), list(zip(*runs, strict=True))
    assert [a.steps for a in runs[0]] == [b.steps for b in runs[1]]
    losses = [abs(a.loss - b.loss) / max(1e-3, a.loss) for a, b in pairs]
    return [way(b.state, a.state, first) for a, b in pairs], losses


def test_streams_are_clients_one_after_another():
    for name in ("resnet8", "conv4"):
        for options in ({}, {"iterations": None}, {"as_released": True}, {"half": True}):
            ways, losses = client_ways(name, **options)
            print("streams", name, options, [f"{w:.1e}" for w in ways], [f"{v:.1e}" for v in losses])
            limit = (0.5, 5e-2) if "half" in options else (2e-2, 1e-3)
            assert max(ways) < limit[0] and max(losses) < limit[1], (name, options, ways, losses)


def test_clients_stop_after_the_same_pass_and_later_rounds_take_the_same_graphs():
    streams._KEPT.clear()
    images, easy, start = small_images().to(HERE), CONFIG.replace(epochs=40, flip=0.0, crop=0), model()

    def tasks():
        return [task(c, at, 12, 0, classes, stop_at=0.99) for c, at, classes in (("a", 0, (0, 1)), ("b", 40, (2,)))]

    with changed(half_precision=full_precision):
        for lr in (0.05, 0.02):
            wanted, got = (
                train(start, states(start, 2), tasks(), images, easy.replace(lr=lr), device=HERE)
                for train in (training.fit_in_turn, training.fit_together)
            )
            assert [a.steps for a in got] == [b.steps for b in wanted]
    assert len(streams._KEPT) == 1


def a_detector(kind="ssd", **more):
    shape = {"width_multiple": 0.125, "depth_multiple": 0.1} if kind == "yolo" else {"norm": "batch"}
    config = Config.of(detector=kind, image_size=(64, 64), **shape, **more)
    return build(config, 3, torch_rng_for(0, "weights"))


def scenes(count=24):
    return data.load("digits", (64, 64), digits=Digits((count, 1), 3))[0]


def trained(kind, config, graphed, iterations=20):
    graphs._GRAPHS.clear()
    part, net = scenes(), a_detector(kind)
    with changed(GRAPHED=("cuda",) * graphed):
        job = LocalTask(torch_rng_for(0, "fit"), iterations=iterations, optimizer_state={})
        rows = list(training.fit(net, part.images.to(HERE), part.labels, config, job, HERE))
    return floats(net.state_dict()), [row["loss"] for row in rows], job.optimizer_state


RECIPES = {
    "adamw": dict(lr=1e-3, clip=1.0, ema=0.9, warmup=2, accumulate_to=16),
    "sgd": dict(lr=5e-3, optimizer="sgd", momentum=0.9, warmup=3, warmup_momentum=0.5, warmup_bias_lr=0.05),
}


def test_steps_with_graphs_are_the_steps_without():
    for kind in ("ssd", "yolo"):
        for name, recipe in RECIPES.items():
            for amp, limit in ((False, 2e-2), (True, 0.5)):
                config = TrainingConfig.of(batch=8, colour=0.2, zoom=(0.9, 1.1), amp=amp, **recipe)
                (eager, losses, kept), (graph, same, state) = (trained(kind, config, g) for g in (False, True))
                apart = way(graph, eager, floats(a_detector(kind).state_dict()))
                print("graphs", kind, name, "bfloat16" if amp else "float32", f"{apart:.1e}", losses[-1], same[-1])
                assert apart < limit and abs(losses[-1] - same[-1]) < 0.05 * losses[-1], (kind, name, amp, apart)
                assert state.keys() == kept.keys()


def waits(kind, iterations) -> int:
    """How often the processor waited for the GPU in a training of so many steps; graphs are there already."""
    part, net = scenes(), a_detector(kind).to(HERE)
    images, config = part.images.to(HERE), TrainingConfig.of(batch=24, colour=0.2, zoom=(0.9, 1.1), amp=True)

    def run():
        job = LocalTask(torch_rng_for(0, "fit"), iterations=iterations)
        return len(list(training.fit(net, images, part.labels, config, job, HERE)))

    run()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            passes = run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(w.message) for w in seen) - passes


def test_nothing_waits_inside_a_pass():
    found = {kind: (waits(kind, 2), waits(kind, 6)) for kind in ("ssd", "yolo", "faster_rcnn")}
    print("waits beside the reading of losses, in 2 and in 6 passes of one step:", found)
    assert all(found[kind][1] <= found[kind][0] + 1 for kind in ("ssd", "yolo")), found


def test_predictions_agree_with_the_cpu():
    part, net = scenes(), a_detector()
    job = LocalTask(torch_rng_for(0, "fit"), iterations=30)
    list(training.fit(net, part.images, part.labels, TrainingConfig.of(batch=8, lr=5e-3), job))
    cpu, vectors = training.predict(net, part.images, score_above=0.05, top=3), training.embed(net, part.images)
    gpu = training.predict(net, part.images.to(HERE), score_above=0.05, top=3, device=HERE)
    apart = (cpu.scores[:, 0] - gpu.scores[:, 0]).abs().max()
    ratio = float((training.embed(net, part.images.to(HERE), device=HERE) - vectors).norm() / vectors.norm())
    print(f"best score of an image, CPU and GPU: {apart:.1e} apart; embeddings {ratio:.1e}")
    assert apart < 0.05 and ratio < 0.02 and gpu.scores.dtype == torch.float32


def test_the_same_seed_gives_the_same_bytes():
    config, images, start = TrainingConfig.of(batch=8, colour=0.2, amp=True), small_images().to(HERE), model()
    for kind in ("ssd", "yolo"):
        first, second = (trained(kind, config, True)[0] for _ in range(2))
        assert all(torch.equal(v, second[k]) for k, v in first.items()), kind
    runs = []
    for _ in range(2):
        streams._KEPT.clear()
        job = start, states(start, 5), unequal(iterations=20), images, MIXING, model(seed=9), HERE
        runs.append(training.fit_graphs(*job))
    assert all(torch.equal(v, b.state[k]) for a, b in zip(*runs, strict=True) for k, v in a.state.items())


if __name__ == "__main__":  # where there is no pytest
    failed = 0
    for name, test in [pair for pair in globals().items() if pair[0].startswith("test_")]:
        begun, word = time.perf_counter(), "passed"
        try:
            test()
        except Exception:
            traceback.print_exc()
            failed, word = failed + 1, "FAILED"
        print(f"{word} {name} {time.perf_counter() - begun:.1f} s", flush=True)
    sys.exit(failed > 0)
