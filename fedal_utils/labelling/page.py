"""The labelling page in the browser: plain Gradio, any number of people at once, keys for everything."""

import functools
import importlib.util
import json
import os
import secrets
import socket
import string
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

from .. import data
from ..seeding import rng_for
from .store import Question, Store

KEYS = "1234567890" + "".join(c for c in string.ascii_lowercase if c not in "cdesu")  # those five do something else
COLOURS = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#7a5195", "#8c564b", "#2f4b7c"]
SIDES = ("xmin", "ymin", "xmax", "ymax")
NO_CLASS = "?"
LOOPBACK = ("127.0.0.1", "localhost")
TRIES, LOCKED = 5, 300.0  # wrong passwords of one address in a row, and the seconds that it then waits

_KEYBOARD = """() => {
  for (const [what, down] of [['pointerdown', true], ['pointerup', false]])
    document.addEventListener(what, () => { window.pointerIsDown = down; }, true);
  document.addEventListener('keydown', (e) => {
    if (e.ctrlKey || e.metaKey || e.altKey || e.repeat || document.querySelector('#model-box-edit')) return;
    if (e.target.closest('textarea, input:not([type=radio])')) return;
    const key = e.key.toLowerCase(), canvas = document.querySelector('#picture .annotator-container');
    const job = { enter: 'submit', arrowright: 'submit', u: 'undo', s: 'skip', '?': 'unknown' }[key];
    const target = job ? document.getElementById(job) : document.querySelectorAll('#classes input')[KEYS.indexOf(key)];
    if (target) { e.preventDefault(); e.stopPropagation(); target.click(); target.blur(); }
    else if (canvas && e.target !== canvas && ['c', 'd', 'e', 'delete'].includes(key)) canvas.dispatchEvent(
      new KeyboardEvent('keydown', { key: e.key, bubbles: true }));
  }, true);
}"""
_NAME_NEW_BOXES = """(value, chosen) => {
  const isNew = (box) => !box.label || box.label === '?';
  if (!chosen || window.pointerIsDown || !value?.boxes?.some(isNew)) return { __type__: 'update' };
  const color = `rgb(${COLOURS[chosen].match(/\\w\\w/g).map((pair) => parseInt(pair, 16)).join(', ')})`;
  return { ...value, boxes: value.boxes.map((box) => isNew(box) ? { ...box, label: chosen, color } : box) };
}"""


def need_gradio() -> None:
    """ImportError that says what to install, where the page's packages are missing."""
    if missing := [n for n in ("gradio", "gradio_image_annotation") if importlib.util.find_spec(n) is None]:
        raise ImportError(f"the labelling page needs {missing[0]}: in the checkout, pip install -e '.[label]'")


def guard(app: Callable, hosts: Sequence[str], clock: Callable[[], float] = time.monotonic) -> Callable:
    """ASGI middleware: refuses foreign origins, and an address for `LOCKED` seconds after `TRIES` wrong passwords."""
    wrong: dict[str, tuple[int, float]] = {}  # address -> how many in a row, when the last one was

    async def guarded(scope: Mapping[str, Any], receive: Callable, send: Callable) -> None:
        if scope["type"] != "http":
            return await app(scope, receive, send)
        from starlette.responses import PlainTextResponse

        address = (scope.get("client") or ("",))[0]
        login = scope["method"] == "POST" and scope["path"].rstrip("/").endswith("/login")
        count, last = wrong.get(address, (0, 0.0))
        origin = dict(scope["headers"]).get(b"origin", b"").decode("latin-1")
        if origin and urlsplit(origin).hostname not in hosts:
            return await PlainTextResponse("the page answers to its own origin only", 403)(scope, receive, send)
        if login and count >= TRIES and clock() < last + LOCKED:
            return await PlainTextResponse("too many wrong passwords: wait", 429)(scope, receive, send)

        async def watched(message: Mapping[str, Any]) -> None:
            if login and message["type"] == "http.response.start":
                wrong.pop(address, None)
                if message["status"] >= 400:
                    wrong[address] = (count % TRIES + 1, clock())
            await send(message)

        await app(scope, receive, watched)

    return guarded


def framed(source: str | Path | np.ndarray, size: Sequence[int] | None = None) -> tuple[Image.Image, tuple[int, int]]:
    """The picture as it is shown, upright, 900 or 640 pixels at least, and (height, width) of the original: `size`."""
    image = Image.fromarray(source) if isinstance(source, np.ndarray) else data.read_upright(source)
    factor = max(1.0, min(900 / image.width, 640 / image.height))
    shown = image.resize([max(1, round(side * factor)) for side in image.size], Image.Resampling.BICUBIC)
    return shown, tuple(size or image.size[::-1])


def _annotated(shown: Image.Image, boxes: Sequence[Mapping], colours: Mapping[str, str], scale: float) -> dict:
    """The annotator's value: the picture and its boxes in shown pixels. scale: original pixels per shown one."""
    looks = {name: {"label": name, "color": tuple(bytes.fromhex(colour[1:]))} for name, colour in colours.items()}
    sides = [dict(zip(SIDES, (v / scale for v in one["box"]), strict=True)) for one in boxes]
    return {"image": shown, "boxes": [box | looks[one["class"]] for box, one in zip(sides, boxes, strict=True)]}


def _drawn(value: Mapping[str, Any], scale: float) -> list[dict[str, Any]]:
    """The boxes of an annotator's value in original pixels."""
    if value.get("orientation"):
        raise ValueError("Turn the image back first.")
    if any(box.get("label") in ("", None, NO_CLASS) for box in value["boxes"]):
        raise ValueError("A box has no class yet: choose one, or press E.")
    scales = [scale / box.get("scaleFactor", 1) for box in value["boxes"]]
    drawn = zip(value["boxes"], scales, strict=True)
    return [{"class": box["label"], "box": [box[side] * by for side in SIDES]} for box, by in drawn]


def build(store: Store, images: Mapping[str, Any], names: bool = False) -> Any:
    """The page as Gradio Blocks. images: {id: path of a file, or uint8 (H, W, 3)}. names: show the image's id, which
    often gives the class away; else the browser does not get it.
    """
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    import gradio as gr
    from gradio_image_annotation import image_annotator

    drawing, classes = store.task == "boxes", store.classes
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(classes)}
    plain = {"show_label": False, "interactive": False}
    with gr.Blocks(title="Labelling", analytics_enabled=False, fill_width=True, delete_cache=(3600, 3600)) as blocks:
        kept = gr.BrowserState("", storage_key="fedal-who", secret="fedal")
        key = gr.Number(0, visible="hidden")
        with gr.Row():
            who = gr.Textbox(label="Who labels? Your name, then Enter", max_lines=1, elem_id="who")
            told = gr.Textbox(**plain, container=False, lines=3, elem_id="told")
        with gr.Row(visible=False, elem_id="work") as work:
            if drawing:
                off = ("show_label", "show_clear_button", "show_download_button", "show_share_button")
                labels = {"label_list": [NO_CLASS, *classes], "label_colors": ["#7f7f7f", *colours.values()]}
                labels |= {"use_default_label": True, "show_remove_button": True, "box_min_size": 3, "boxes_alpha": 0.1}
                picture = image_annotator(elem_id="picture", sources=[], **labels, **dict.fromkeys(off, False))
            else:
                picture = gr.Image(**plain, elem_id="picture", height="75vh", buttons=[], scale=3)
            with gr.Column(min_width=240):
                choices = [(f"{KEYS[i : i + 1]}  {name}", name) for i, name in enumerate(classes)]
                chosen = gr.Radio(choices, label="Class", elem_id="classes")
                submit = gr.Button("Submit (Enter)", variant="primary", elem_id="submit")
                rest = {"undo": "Undo (U)", "skip": "Skip (S)", "unknown": "I don't know (?)"}
                back, skip, unknown = (gr.Button(text, elem_id=name) for name, text in rest.items())
                gr.Markdown("`C` draw · `D` move · `E` class · `Del` remove", visible=drawing)

        def picture_of(question: Question) -> tuple[Image.Image, tuple[int, int]]:
            try:
                return framed(images[question.image], question.size)
            except (KeyError, OSError, ValueError) as error:
                warnings.warn(f"image {question.image!r} cannot be shown: {error}", stacklevel=2)
                raise ValueError("This image cannot be shown: press S or ?") from None  # which tells no name

        def screen(name: str, drawn: Any = None, *said: str) -> list[Any]:
            """What this person sees now: the question that they hold, or the next one. drawn: what they had drawn."""
            question, counts = store.next(name) if name.strip() else None, store.progress()
            said = [*said, f"{counts['labelled']:,} of {counts['all']:,} labelled, {counts['unknown']:,} unknown"]
            if question is None:
                said += [] if counts["waiting"] else ["Nothing is left."]
                return [name, 0, gr.update(visible=False), None, None, "\n".join(said)]
            said += [f"{question.strategy} cycle {question.cycle}", *([question.image] if names else [])]
            try:
                value, size = picture_of(question)
                if drawing:
                    width = round(min(900, 640 * value.width / value.height))
                    value = _annotated(value, drawn or [], colours, size[1] / value.width)
                    value = image_annotator(value, width=width)
            except ValueError as error:
                value, said = None, [*said, str(error)]
            only = classes[0] if drawing and len(classes) == 1 else None
            return [name, question.id, gr.update(visible=True), value, only, "\n".join(said)]

        def act(action: str, name: str, number: float, choice: str | None, value: Any) -> list[Any]:
            held = store.next(name)
            if held is None or held.id != int(number):
                return screen(name, None, "That image is no longer with you, nothing was stored.")
            try:
                size, label = held.size, choice
                if drawing and action == "label":
                    shown, size = picture_of(held)
                    label = _drawn(value, size[1] / shown.width)
                elif action == "label" and not choice:
                    raise ValueError("Choose a class first.")
                store.answer(name, held.image, label, size, action)
            except ValueError as error:
                return [*[gr.skip()] * 5, str(error).replace(repr(held.image), "")]
            return screen(name)

        def undo(name: str) -> list[Any]:
            found = store.undo(name)
            return screen(name, *((found[1],) if found else (None, "There is nothing to take back.")))

        shown = [kept, key, work, picture, chosen, told]
        common = {"preprocess": False, "queue": False, "show_progress": "hidden", "api_visibility": "private"}
        for action, button in (("label", submit), ("skip", skip), ("unknown", unknown)):
            done = functools.partial(act, action)
            button.click(done, [who, key, chosen, picture], shown, trigger_mode="once", **common)
        back.click(undo, [who], shown, trigger_mode="once", **common)
        who.submit(screen, [who], shown, **common)
        blocks.load(lambda name: [*screen(name or ""), name or gr.skip()], [kept], [*shown, who], **common)
        if drawing:
            js = _NAME_NEW_BOXES.replace("COLOURS", json.dumps(colours))
            for event in (picture.change, chosen.input):
                event(None, [picture, chosen], [picture], js=js)
    return blocks


def launch(
    blocks: Any, host: str = "127.0.0.1", allow: Sequence[str] = (), token: str | None = None, **more: Any
) -> Any:
    """Serve a page that was built and return it (`local_url`, `token`, `close()`); does not wait.

    host: elsewhere than on this machine it is served without encryption, for a network you trust, and with a token.
    allow: host names by which it may be called besides this machine's own. token: the password; None = a new one where
    one is needed. more: what Gradio's `launch` takes, such as `server_port`, `inline`.
    """
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    if token is not None and len(token) < 8:
        raise ValueError("a token needs 8 characters or more")
    hosts = [*LOOPBACK, *allow, host, socket.gethostname()]
    middleware = [Middleware(TrustedHostMiddleware, allowed_hosts=hosts), Middleware(guard, hosts=hosts)]
    blocks.token = token or (None if host in LOOPBACK else secrets.token_urlsafe(12))
    if blocks.token is not None:
        more["auth"] = lambda user, password: secrets.compare_digest(password.encode(), blocks.token.encode())
        more["auth_message"] = "Any name, and the token as the password."
    more |= {"quiet": True, "prevent_thread_lock": True, "share": False, "ssr_mode": False, "footer_links": []}
    js = _KEYBOARD.replace("KEYS", json.dumps(KEYS))
    blocks.launch(server_name=host, js=js, app_kwargs={"middleware": middleware}, **more)
    return blocks


def serve(store: Store, folder: str | Path, seed: int | None = 0, names=False, **more: Any) -> None:
    """Serve the page for the images below a folder until Ctrl+C; everything is in the store by then.

    seed: of the random order of all images; None: only what the store asks for, such as a client's queries, which may
    lack the suffix of their files. names: as of `build`; more: as of `launch`.
    """
    images = {path.relative_to(folder).as_posix(): path for path in data.find_files(Path(folder), *data.SUFFIXES)}
    if not images:
        raise ValueError(f"folder {folder} holds no image: no {', '.join(data.SUFFIXES)} file in it")
    if seed is None:
        images = {**{str(Path(name).with_suffix("")): path for name, path in images.items()}, **images}
    else:
        order = rng_for(seed, "labelling order").permutation(list(images)).tolist()
        store.queue(Question(name, strategy="random") for name in order)
    blocks = launch(build(store, images, names), **more)
    print(f"labelling page: {blocks.local_url}")
    if blocks.token and not more.get("token"):
        print(f"token (any user name, this as the password): {blocks.token}")
    print(f"labels go to {store.path}; Ctrl+C ends", flush=True)
    blocks.block_thread()
    counts = store.progress()
    print(f"{counts['labelled']:,} of {counts['all']:,} images are labelled, in {store.path}")
