"""The labelling page in a real browser: keys, boxes by mouse, reload, two people at once, a killed server.

Skipped where gradio, playwright or chromium is missing, unless CI=true: then that is a failure. FEDAL_SHOTS: a folder
for screenshots.
"""

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedal_utils.labelling import page as labelling
from fedal_utils.labelling.page import Store

CLASSES = ["cat", "dog", "<b>x</b>"]
TOKEN = "a token for the test"
ARGUMENTS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
SIZE = (300, 400)  # height, width of the images
WAIT = 30_000  # ms, for a busy machine


class Server:
    """`python -m fedal_utils label` in a process of its own, so that it can be killed."""

    def __init__(self, root: Path, folder: Path, task: str, *more: str):
        self.root, self.folder, self.path = root, folder, folder.parent / f"{task}.db"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.arguments = ["--data", str(folder), "--classes", *CLASSES, "--task", task, "--store", str(self.path)]
        self.arguments += ["--port", str(self.port), *more]
        self.process: subprocess.Popen | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    def start(self) -> None:
        environment = {**os.environ, "PYTHONPATH": str(self.root), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        self.log = open(self.path.with_suffix(".log"), "w+")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "fedal_utils", "label", *self.arguments],
            env=environment,
            cwd=self.folder.parent,
            stdout=self.log,
            stderr=subprocess.STDOUT,
        )

    def wait(self) -> None:
        for _ in range(600):
            said = self.path.with_suffix(".log").read_text()
            if "labels go to" in said:
                return
            assert self.process.poll() is None, said
            time.sleep(0.1)
        raise AssertionError(said)

    def stop(self, sign: int) -> str:
        self.process.send_signal(sign)
        self.process.wait(20)
        self.log.close()
        return self.path.with_suffix(".log").read_text()


def missing() -> str:
    for name in ("gradio", "gradio_image_annotation", "playwright"):
        if importlib.util.find_spec(name) is None:
            return f"{name} is not installed"
    return "" if shutil.which("chromium") else "no chromium in the path"


@pytest.fixture(scope="module")
def servers(root, tmp_path_factory):
    """The class page and the box page, both up."""
    if missing():
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(f"no browser test: {missing()}")
    base = tmp_path_factory.mktemp("labelling")
    rng = np.random.default_rng(0)
    for i in range(36):
        path = base / "pictures" / CLASSES[i % 2] / f"rex{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        tiles = rng.integers(40, 255, (6, 8, 3), dtype=np.uint8)
        Image.fromarray(tiles).resize(SIZE[::-1], Image.Resampling.BICUBIC).save(path)
    servers = {
        "classes": Server(root, base / "pictures", "classes"),
        "boxes": Server(root, base / "pictures", "boxes", "--token", TOKEN),
    }
    try:
        for server in servers.values():
            server.start()
        for server in servers.values():
            server.wait()
        yield servers
    finally:
        for server in servers.values():
            if server.process is not None and server.process.poll() is None:
                server.stop(signal.SIGKILL)


@pytest.fixture(scope="module")
def browser(servers):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=shutil.which("chromium"), args=ARGUMENTS)
        yield browser
        browser.close()


class Person:
    """Someone at a browser window of their own, and what the store says about them."""

    def __init__(self, browser, server: Server, who: str):
        self.store, self.who = Store(server.path, None, "boxes" if "boxes" in server.path.name else "classes"), who
        self.context = browser.new_context(viewport={"width": 1280, "height": 800})
        self.page = self.context.new_page()
        self.page.set_default_timeout(WAIT)
        self.outside, self.errors = [], []
        self.page.on("request", lambda r: self.outside.append(r.url) if not self._local(r.url, server) else None)
        self.page.on("pageerror", lambda e: self.errors.append(str(e)))
        self.page.goto(server.url)

    @staticmethod
    def _local(url: str, server: Server) -> bool:
        return url.startswith((server.url, "data:", "blob:"))

    def begin(self) -> None:
        self.page.fill("#fedal-name textarea, #fedal-name input", self.who)
        self.page.press("#fedal-name textarea, #fedal-name input", "Enter")
        self.seen()

    def seen(self) -> str:
        """Wait until the page shows what this person holds, and return its picture's address."""
        self.page.wait_for_function("window.fedal && fedal.shownKey && !fedal.busy")
        self.page.wait_for_selector("#fedal-work", state="visible")
        return self.picture()

    def picture(self) -> str:
        return self.page.get_attribute("#fedal-picture img", "src")

    def press(self, *keys: str) -> None:
        """Press keys; the last one changes the image."""
        before = self.page.evaluate("fedal.shownKey")
        for key in keys:
            self.page.keyboard.press(key)
        self.page.wait_for_function("(key) => fedal.shownKey !== key && !fedal.busy", arg=before)

    def image(self) -> str:
        return self.store.held(self.who).image

    def bar(self) -> str:
        return self.page.inner_text("#fedal-bar")

    def shot(self, name: str) -> None:
        if os.environ.get("FEDAL_SHOTS"):
            Path(os.environ["FEDAL_SHOTS"]).mkdir(parents=True, exist_ok=True)
            time.sleep(0.3)  # colours fade in
            self.page.screenshot(path=Path(os.environ["FEDAL_SHOTS"]) / f"{name}.png")

    def leave(self) -> None:
        assert not self.errors and not self.outside, (self.errors, self.outside)
        self.store.close()
        self.context.close()


def test_strangers_are_asked_for_a_token(servers, tmp_path, monkeypatch):
    import gradio

    given: dict = {}

    def launch(self, server_name, share, auth=None, max_file_size=None, **rest):
        given.update(server_name=server_name, share=share, auth=auth)

    monkeypatch.setattr(gradio.Blocks, "launch", launch)
    with Store(tmp_path / "labels.db", CLASSES) as store:
        for wish in ({}, {"host": "localhost"}):
            said: list[str] = []
            labelling.launch(store, {}, say=said.append, **wish)
            assert given["auth"] is None and not given["share"] and len(said) == 1
        for wish in ({"host": "0.0.0.0"}, {"share": True}, {"host": "0.0.0.0", "token": TOKEN}):
            said = []
            labelling.launch(store, {}, say=said.append, **wish)
            token = wish.get("token") or said[1].split()[-1]
            assert len(token) >= 16 and sum(token in line for line in said) == ("token" not in wish)
            assert given["auth"]("Ann", token) and not given["auth"]("Ann", token[:-1]) and not given["auth"]("Ann", "")
        with pytest.raises(ValueError, match="token"):
            labelling.launch(store, {}, token="short")


def test_ten_images_by_keyboard_with_undo_and_nothing_told_beforehand(servers, browser):
    ann = Person(browser, servers["classes"], "Ann <i>")
    ann.page.wait_for_selector("#fedal-start", state="visible")
    ann.shot("start")
    ann.begin()
    said = {}
    for i in range(10):
        image = ann.image()
        assert ann.page.locator("#fedal-classes input:checked").count() == 0
        key, say = [("1", "cat"), ("2", "dog"), ("3", "<b>x</b>")][i % 3]
        if i == 1:  # keys that are typed are text
            ann.page.click("#fedal-note textarea, #fedal-note input")
            ann.page.keyboard.type("us? 1")
            assert ann.page.locator("#fedal-classes input:checked").count() == 0 and ann.image() == image
            ann.page.locator("#fedal-note textarea, #fedal-note input").evaluate("e => e.blur()")
        if i == 2:  # a wrong key first, and Enter too early
            ann.page.keyboard.press("Enter")
            ann.page.wait_for_selector("text=Choose a class first")
            ann.page.wait_for_function("!fedal.busy")
            ann.page.keyboard.press("1")
            ann.shot("classes")
        ann.press(key, "ArrowRight" if i % 2 else "Enter")
        said[image] = say
        assert ann.store.labels() == said
        if i == 4:
            ann.press("u")
            assert ann.image() == image and image not in ann.store.labels()
            ann.press("2", "Enter")
            said[image] = "dog"
            ann.press("Control+z")
            assert ann.image() == image
            ann.press(key, "Enter")
            said[image] = say
    assert "10 of 36 labelled" in ann.bar() and "Ann <i>" in ann.bar()
    history = ann.store.history()
    assert (history["who"] == "Ann <i>").all() and history["note"][1] == "us? 1" and history["note"][2] == ""
    assert ((history["seconds"] > 0) & (history["seconds"] < 60))[history["action"] == "label"].all()
    first = ann.image()
    ann.press("s")
    second = ann.image()
    ann.press("?")
    last = ann.store.history().tail(2)
    assert list(last["image"]) == [first, second] and list(last["action"]) == ["skip", "unknown"]
    text = ann.page.content()
    assert "rex" not in text.replace(ann.picture(), "") and "pictures" not in text
    assert ann.page.locator("#fedal-classes label").nth(2).inner_text().strip() == "<b>x</b>"
    assert not ann.page.locator("footer").is_visible()
    for place in (servers["classes"].path, servers["classes"].folder / first, Path("/etc/passwd")):
        for url in (f"gradio_api/file={place}", f"gradio_api/file=../../../../..{place}", f"file={place}"):
            assert ann.page.request.get(servers["classes"].url + url).status in (403, 404), url
    ann.leave()


def test_a_new_class_has_a_key_at_once(servers, browser):
    eva = Person(browser, servers["classes"], "Eva")
    eva.begin()
    image = eva.image()
    eva.page.click("#fedal-more button")
    eva.page.fill("#fedal-new textarea, #fedal-new input", "fox & <owl>")
    eva.page.click("#fedal-add")
    eva.page.wait_for_selector("#fedal-classes label:nth-of-type(4)")
    eva.page.wait_for_function("!fedal.busy")
    eva.press("4", "Enter")
    assert eva.store.labels()[image] == "fox & <owl>"
    eva.leave()


def test_a_reload_keeps_the_place_and_two_people_never_see_the_same_image(servers, browser):
    people = [Person(browser, servers["classes"], who) for who in ("Ben", "Cem")]
    ben, cem = people
    for person in people:
        person.begin()
    held, picture = ben.image(), ben.picture()
    ben.page.keyboard.press("1")
    ben.page.reload()
    assert ben.seen() == picture and ben.image() == held
    assert ben.page.locator("#fedal-classes input:checked").count() == 0
    shown = {}
    for _ in range(3):
        assert ben.image() != cem.image() and ben.seen() != cem.seen()
        for person in people:
            assert person.picture() not in shown
            shown[person.picture()] = person.who
        for person in people:  # both send before either waits
            person.page.keyboard.press("1")
            person.before = person.page.evaluate("fedal.shownKey")
            person.page.keyboard.press("Enter")
        for person in people:
            person.page.wait_for_function("(key) => fedal.shownKey !== key && !fedal.busy", arg=person.before)
    labels = ben.store.history().query("action == 'label'")
    assert (labels["who"].isin(["Ben", "Cem"])).sum() == 6
    assert not labels[~labels["undone"]]["image"].duplicated().any()
    for person in people:
        person.leave()


def test_a_killed_server_has_lost_nothing_that_it_accepted(servers, browser):
    server = servers["classes"]
    dora = Person(browser, server, "Dora")
    dora.begin()
    for _ in range(2):
        dora.press("2", "Enter")
    accepted, held = dora.store.labels(), dora.image()
    server.stop(signal.SIGKILL)
    server.start()
    server.wait()
    assert dora.store.labels() == accepted
    dora.press("1", "Enter")  # the window that was open all the time goes on
    accepted[held] = "cat"
    assert dora.store.labels() == accepted
    held = dora.image()
    dora.page.reload()
    dora.seen()
    assert dora.image() == held
    dora.press("2", "Enter")
    assert dora.store.labels() == {**accepted, held: "dog"}
    dora.leave()
    said = server.stop(signal.SIGINT)
    assert server.process.returncode == 0
    assert f"{len(accepted) + 1} of 36 images are labelled, in {server.path}" in said and "Traceback" not in said


def test_boxes_are_drawn_moved_named_and_removed_by_mouse(servers, browser):
    server = servers["boxes"]
    fay = Person(browser, server, "Fay")
    page = fay.page
    for url in ("config", "gradio_api/info"):
        told = page.request.get(server.url + url)
        assert told.status == 401 and "<b>x" not in told.text(), url
    for token in ("wrong", TOKEN):  # it is asked for before anything is told
        assert page.locator("#fedal-bar").count() == 0
        page.get_by_role("textbox").first.fill("Fay")
        page.locator("input[type=password]").fill(token)
        page.get_by_role("button").first.click()
        if token == "wrong":
            page.wait_for_selector("text=Incorrect")
    page.wait_for_selector("#fedal-start", state="visible")
    fay.picture = lambda: ""
    fay.begin()
    page.wait_for_selector("#fedal-boxes canvas")
    page.wait_for_timeout(500)  # the picture settles into its frame
    canvas = page.locator("#fedal-boxes canvas").bounding_box()
    scale = canvas["width"] / SIZE[1]  # screen pixels a pixel

    def drag(x1: float, y1: float, x2: float, y2: float) -> None:
        """In pixels of the original image."""
        at = [(canvas["x"] + x * scale, canvas["y"] + y * scale) for x, y in ((x1, y1), (x2, y2))]
        page.mouse.move(*at[0])
        page.mouse.down()
        page.mouse.move((at[0][0] + at[1][0]) / 2, (at[0][1] + at[1][1]) / 2)
        page.mouse.move(*at[1])
        page.mouse.up()
        page.wait_for_timeout(250)

    def stored(image: str) -> list[tuple[str, list[float]]]:
        return [(thing["class"], thing["box"]) for thing in fay.store.labels()[image]]

    def same(found: list, expected: list) -> None:
        assert [name for name, _ in found] == [name for name, _ in expected], found
        for (_, box), (_, wanted) in zip(found, expected, strict=True):
            assert np.allclose(box, wanted, atol=1.5), (found, expected)

    image = fay.image()
    page.keyboard.press("1")
    drag(40, 30, 140, 110)  # cat
    page.keyboard.press("2")
    drag(200, 150, 300, 250)  # dog; the cat stays a cat
    drag(330, 20, 390, 80)  # dog, and removed again
    page.keyboard.press("Delete")
    page.keyboard.press("d")
    drag(250, 200, 280, 190)  # the dog moves by (30, -10)
    fay.shot("boxes")
    fay.press("Enter")
    expected = [("dog", [230, 140, 330, 240]), ("cat", [40, 30, 140, 110])]
    same(stored(image), expected)

    fay.press("u")  # the boxes come back with the image
    assert fay.image() == image and fay.store.labels() == {}
    page.wait_for_timeout(300)
    page.keyboard.press("d")
    drag(60, 60, 60, 60)  # a click selects the cat
    page.keyboard.press("3")
    page.wait_for_timeout(250)
    fay.press("Enter")
    same(stored(image), [expected[0], ("<b>x</b>", expected[1][1])])

    image = fay.image()
    page.wait_for_timeout(300)
    page.keyboard.press("c")
    drag(350, 250, 420, 320)  # over the edge, and no class yet
    page.keyboard.press("Enter")
    page.wait_for_selector("text=A box has no class yet")
    page.wait_for_function("!fedal.busy")
    page.keyboard.press("1")
    page.wait_for_timeout(250)
    fay.press("Enter")
    same(stored(image), [("cat", [350, 250, 400, 300])])

    image = fay.image()
    page.wait_for_timeout(300)
    fay.press("Enter")  # nothing on it
    assert fay.store.labels()[image] == []
    assert "rex" not in page.content()
    fay.leave()
