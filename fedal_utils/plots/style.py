"""The look of every figure: one style file, and for each method a colour, a marker, a line and a shown name.

A strategy's colour and marker are of its place in a list or else of its name; line and most of the colour a scheme's.
"""

import functools
import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure


class Look(NamedTuple):
    """How a method looks everywhere; marker and line as matplotlib takes them."""

    colour: str
    marker: str | tuple[int, int, float]
    line: str | tuple[int, tuple[float, ...]]
    name: str


# Okabe and Ito (2008), Paul Tol's muted set, and darker and lighter ones; never colour alone.
PALETTE = tuple(
    "#0072B2 #D55E00 #009E73 #CC79A7 #E69F00 #56B4E9 #332288 #882255 #117733 #AA4499 "
    "#999933 #661100 #44AA99 #CC6677 #6F4C9B #B8860B #005F73 #8B0000 #5C7A29 #1F3A93".split()
)
MARKERS = ("o", "s", "^", "D", "v", "P", "<", ">", "p", "h", "*", "d", (4, 1, 0), (5, 1, 36), (6, 1, 0), (8, 1, 0))
# Published strategies in the order of legends; each has the colour and the marker of its place.
LISTED = tuple(
    "random sum avg max count entropy margin confidence ratio coreset badge qbc jeffreys logo ksas "
    "ksas_sum ksas_avg ksas_max entropy_sum entropy_avg entropy_max cascade cald hua "
    "vae vae_d1 vae_d2 vae_d3 vae_d4 vae_d0 d1 d2 d3 d4 d0 mix mix_diverse cluster representative "
    "model_outlier embedding_outlier federated centralised".split()
)
SHOWN = {  # where it is not the strategy's name with spaces
    **dict(sum="SUM", avg="AVG", max="MAX", count="box count", confidence="least confidence", coreset="core-set"),
    **dict(entropy_sum="entropy SUM", entropy_avg="entropy AVG", entropy_max="entropy MAX", badge="BADGE"),
    **dict(qbc="committee", cascade="HUALE cascade", cald="CALD", hua="HUA pooling", ksas="KSAS", logo="LoGo"),
    **dict(ksas_sum="KSAS on boxes, SUM", ksas_avg="KSAS on boxes, AVG", ksas_max="KSAS on boxes, MAX"),
    **dict(jeffreys="plain symmetric KL", vae="VAE novelty"),
    **dict(d0="D0, hidden labels", d1="D1, reconstruction consistency", d2="D2, self-training", d3="D3, entropy"),
    **dict(d4="D4, learned loss", vae_d0="VAE + D0, hidden labels", vae_d1="VAE + D1", vae_d2="VAE + D2"),
    **dict(vae_d3="VAE + D3", vae_d4="VAE + D4", mix="mixture", mix_diverse="mixture with diversity"),
    **dict(model_outlier="model-based outlier", cluster="cluster centres"),
}
GREYS = dict(random=("#7F7F7F", "X"), centralised=("#444444", "d"), d0=("#B0B0B0", "P"), vae_d0=("#8A8A8A", "P"))
SCHEMES: dict[str, tuple[str, str | tuple, str]] = {  # scheme -> colour, line, shown name
    "fedavg": ("", "-", "FedAvg"),
    "local-first": ("#33BBEE", (0, (1, 1)), "local first"),
    "chain": ("#A50F15", (0, (6, 1.5)), "chain"),
    "chain-fedavg": ("#F0803C", "-.", "chain then FedAvg"),
    "accumulate": ("#4B0F6B", (0, (4, 1, 1, 1, 1, 1)), "accumulating chain"),
    "centralised": ("#444444", "--", "centralised"),
}

X_LABELS = {
    "images": "labelled images",
    "boxes": "labelled boxes",
    "seconds": "estimated annotation time (min)",
    "bytes": "communication, both ways (MB)",
    "rounds": "communication rounds",
}
Y_LABELS = {
    "accuracy_mean_client": "accuracy, mean over clients",
    "accuracy_worst_client": "accuracy, worst client",
    "ap50": "AP at IoU 0.5",
    "ap75": "AP at IoU 0.75",
    "ap_coco": "AP, COCO (IoU .50:.95)",
    "ap_voc11": "AP, VOC 11-point (IoU 0.5)",
    "ap_voc": "AP, VOC all-point (IoU 0.5)",
    "loss": "training loss",
}
# The context in which everything drawn has the suite's style: `with plots.style(): ...`.
style = functools.partial(plt.style.context, str(Path(__file__).with_name("fedal.mplstyle")))


def style_of(method: str) -> Look:
    """Colour, marker, line and shown name of a method: a strategy, or schemes and a strategy joined by '+'."""
    scheme, _, rest = method.partition("+")
    if scheme not in SCHEMES or not rest:
        place = LISTED.index(method) if method in LISTED else int(hashlib.sha256(method.encode()).hexdigest(), 16)
        colour, marker = PALETTE[place % len(PALETTE)], MARKERS[place % len(MARKERS)]
        if method not in LISTED:  # a shade that no listed strategy has
            colour = _mix(colour, ("black", "white")[place % 2], 0.1 + place % 97 / 400)
        colour, marker = GREYS.get(method, (colour, marker))
        name = SHOWN.get(method, method.replace("_", " "))
        return Look(colour, marker, "--" if method == "centralised" else "-", name)
    look, (colour, line, name) = style_of(rest), SCHEMES[scheme]
    if scheme == "fedavg":
        return look._replace(name=f"{name}, {look.name}")
    part, name = (0.5, "centralised on the labels of") if scheme == "centralised" else (0.2, f"{name},")
    return look._replace(colour=_mix(colour, look.colour, part), line=line, name=f"{name} {look.name}")


def _mix(colour: str, other: str, part: float) -> str:
    return to_hex((1 - part) * np.array(to_rgb(colour)) + part * np.array(to_rgb(other)))


def ordered(methods: Sequence[str]) -> list[str]:
    """Methods as a legend has them: plain strategies first, then by scheme, centralised references last."""

    def place(method: str) -> tuple[int, int, str]:
        scheme, strategy = method.split("+")[0], method.split("+")[-1]
        first = list(SCHEMES).index(scheme) if scheme in SCHEMES else 0
        return first, (*LISTED, strategy).index(strategy), method

    return sorted(methods, key=place)


def names_of(methods: Sequence[str]) -> dict[str, str]:
    """Shown names for one legend: beside other schemes a plain strategy says that it is FedAvg."""
    schemes = {method.split("+")[0] for method in methods if "+" in method} & set(SCHEMES) - {"centralised"}
    plain = {m for m in methods if m.split("+")[0] not in SCHEMES and m != "federated"} if schemes else ()
    return {m: style_of(f"fedavg+{m}" if m in plain else m).name for m in methods}


def y_label(y: str) -> str:
    """The axis label of a metric column; 'ap50/<class>' names its class."""
    name, _, of_class = y.partition("/")
    return Y_LABELS.get(name, name.replace("_", " ")) + (f", {of_class}" if of_class else "")


def marks(look: Look, size: float = 5.5) -> dict[str, object]:
    """Marker options of a line; stars and polygons need a bit more room than matplotlib's own markers."""
    size *= 1.3 if isinstance(look.marker, tuple) else 1
    return {"marker": look.marker, "markersize": size, "markeredgecolor": "white", "markeredgewidth": 0.6}


def legend_below(figure: Figure, *axes: Axes) -> None:
    """One legend for all panels, the first handle of each label, in as many columns as fit; the figure grows for it."""
    handles: dict[str, object] = {}
    for handle, label in (pair for ax in axes for pair in zip(*ax.get_legend_handles_labels(), strict=True)):
        handles.setdefault(label, handle)
    if handles:
        wide = max(1.5, 0.7 + 0.07 * max(map(len, handles)))  # inches of a column
        rows = math.ceil(len(handles) / max(1, int(figure.get_figwidth() / wide)))
        place = {"loc": "outside lower center", "ncols": math.ceil(len(handles) / rows), "handlelength": 2.6}
        figure.legend(list(handles.values()), list(handles), **place)
        figure.set_figheight(figure.get_figheight() + 0.22 * rows)


def mean_and_band(seeds, band: str = "band") -> str:
    """'mean over 3 seeds; band: 95 % t interval of the mean'; seeds: those of each drawn point, grouped."""
    low, high = int(seeds.nunique().min()), int(seeds.nunique().max())
    over = f"{high} seed{'s' if high > 1 else ''}" if low == high else f"{low} to {high} seeds"
    shown = {1: f"no {band}", 2: f"{band}: both values"}.get(high, f"{band}: 95 % t interval of the mean")
    return f"mean over {over}; {shown}"
