"""The labelling page in a real browser: keys, boxes by mouse, reload, two people at once, a killed server, strangers.

Skipped where gradio, playwright or chromium is missing, unless CI=true: then that is a failure.
"""

import contextlib
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

from fedal_utils.labelling import Question, Store, page

CLASSES = ["cat", "dog", "<b>x</b>"]
TOKEN = "a token for the test"
ARGUMENTS = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking".split()
ARGUMENTS += ["--disable-component-update", "--disable-sync"]
SIZE = (300, 400)  # height, width of the images
WAIT = 60_000  # ms, for a busy machine


class Server:
    """`python -m fedal_utils label` in a process of its own, so that it can be killed."""

    def __init__(self, root: Path, folder: Path, task: str, *more: str):
        self.root, self.folder, self.path = root, folder, folder.parent / f"{task}.sqlite"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{self.port}/", self.path.with_suffix(".log")
        self.arguments = ["--data", str(folder), "--classes", *CLASSES, "--task", task, "--store", str(self.path)]
        self.arguments += ["--port", str(self.port), *more]

    def start(self) -> None:
        environment = {**os.environ, "PYTHONPATH": str(self.root), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        words = [sys.executable, "-m", "fedal_utils", "label", *self.arguments]
        with self.log.open("w") as log:
            where = {"env": environment, "cwd": self.folder.parent, "stdout": log, "stderr": subprocess.STDOUT}
            self.process = subprocess.Popen(words, **where)

    def wait(self) -> None:
        while "labels go to" not in self.log.read_text():
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.1)

    def stop(self, sign: int) -> str:
        self.process.send_signal(sign)
        self.process.wait(60)
        return self.log.read_text()


@pytest.fixture(scope="module")
def servers(root, tmp_path_factory):
    """The class page and the box page, both up."""
    missing = [n for n in ("gradio", "gradio_image_annotation", "playwright") if not importlib.util.find_spec(n)]
    if missing or not shutil.which("chromium"):
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(f"no browser test: {missing or 'chromium'}")
    base = tmp_path_factory.mktemp("labelling")
    (base / "pictures" / "cat").mkdir(parents=True)
    for i in range(24):
        tiles = np.random.default_rng(i).integers(40, 255, (6, 8, 3), dtype=np.uint8)
        Image.fromarray(tiles).resize(SIZE[::-1]).save(base / "pictures" / "cat" / f"rex{i}.png")
    pair = Server(root, base / "pictures", "classes"), Server(root, base / "pictures", "boxes", "--token", TOKEN)
    try:
        for server in pair:
            server.start()
        for server in pair:
            server.wait()
        yield pair
    finally:
        for server in pair:
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
        self.store, self.who, self.server = Store(server.path), who, server
        self.context = browser.new_context(viewport={"width": 1280, "height": 860})
        self.page = self.context.new_page()
        self.page.set_default_timeout(WAIT)
        self.outside, self.errors = [], []
        local = (server.url, "data:", "blob:")
        self.page.on("request", lambda r: None if r.url.startswith(local) else self.outside.append(r.url))
        self.page.on("pageerror", lambda e: self.errors.append(str(e)))
        self.page.goto(server.url)

    def begin(self) -> None:
        self.page.wait_for_selector("#who")
        self.hears("labelled")
        self.page.fill("#who input, #who textarea", self.who)
        self.page.press("#who input, #who textarea", "Enter")
        self.seen()

    def seen(self) -> str:
        """Wait until the page shows an image, and return its picture's address."""
        self.page.wait_for_selector("#work", state="visible")
        self.page.evaluate("document.activeElement.blur()")
        return self.picture()

    def picture(self) -> str:
        return self.page.get_attribute("#picture img", "src")

    def told(self) -> str:
        return self.page.input_value("#told textarea")

    def press(self, *keys: str) -> None:
        """Press keys; the last one is stored by the server and changes what is shown."""
        before = self.told() + self.picture()
        for key in keys:
            self.page.keyboard.press(key)
        deadline = time.monotonic() + WAIT / 1000
        while self.told() + self.picture() == before and time.monotonic() < deadline:
            self.page.wait_for_timeout(50)
        self.page.wait_for_timeout(700)  # until it is in its frame

    def image(self) -> str:
        return self.store.next(self.who).image

    def hears(self, text: str) -> None:
        self.page.wait_for_function("(t) => document.querySelector('#told textarea').value.includes(t)", arg=text)

    def leave(self) -> None:
        outside = [url for url in self.outside if "fonts.g" not in url]
        assert not self.errors and not outside, (self.errors, outside)
        self.store.close()
        self.context.close()


def test_images_by_keyboard_with_undo_and_nothing_told_beforehand(servers, browser):
    ann = Person(browser, servers[0], "Ann <i>")
    ann.begin()
    said = {}
    for i in range(6):
        image = ann.image()
        assert ann.page.locator("#classes input:checked").count() == 0
        key, say = [("1", "cat"), ("2", "dog"), ("3", "<b>x</b>")][i % 3]
        if i == 1:  # keys that are typed are text
            ann.page.focus("#who input, #who textarea")
            ann.page.keyboard.type("1")
            assert ann.page.locator("#classes input:checked").count() == 0
            ann.page.fill("#who input, #who textarea", ann.who)
            ann.seen()
        if i == 2:  # a wrong key first, and Enter too early
            ann.page.keyboard.press("Enter")
            ann.hears("Choose a class first")
            ann.page.keyboard.press("1")
        ann.press(key, "ArrowRight" if i % 2 else "Enter")
        said[image] = say
        assert ann.store.labels() == said
        if i == 4:
            ann.press("u")
            assert ann.image() == image and image not in ann.store.labels()
            ann.press("1", "Enter")
            said[image] = "cat"
    assert "6 of 24 labelled" in ann.told() and "random" in ann.told()
    history = ann.store.history()
    assert (history["who"] == "Ann <i>").all()
    assert ((history["seconds"] > 0) & (history["seconds"] < 120))[history["action"] == "label"].all()
    first = ann.image()
    ann.press("s")
    second = ann.image()
    ann.press("?")
    last = ann.store.history().tail(2)
    assert list(last["image"]) == [first, second] and list(last["action"]) == ["skip", "unknown"]
    assert "rex" not in ann.page.content() and "pictures" not in ann.page.content()
    assert "<b>x</b>" in ann.page.locator("#classes label").nth(2).inner_text()
    for place in (servers[0].path, servers[0].folder / first, "/etc/passwd"):
        for url in (f"gradio_api/file={place}", f"gradio_api/file=../../../../..{place}", f"file={place}"):
            assert ann.page.request.get(ann.server.url + url).status in (403, 404), url
    for wrong in ({"Host": "evil.example"}, {"Origin": "http://evil.example"}):
        assert ann.page.request.get(ann.server.url + "config", headers=wrong).status in (400, 403)
    ann.leave()


def test_a_reload_keeps_the_place_and_two_people_never_see_the_same_image(servers, browser):
    ben, cem = people = [Person(browser, servers[0], who) for who in ("Ben", "Cem")]
    for person in people:
        person.begin()
    held = ben.image()
    ben.page.keyboard.press("1")
    ben.page.reload()
    ben.seen()
    assert ben.image() == held and ben.page.input_value("#who input, #who textarea") == "Ben"
    assert ben.page.locator("#classes input:checked").count() == 0
    for _ in range(3):
        assert ben.image() != cem.image() and ben.seen() != cem.seen()
        for person in people:
            person.press("1", "Enter")
    labels = ben.store.history().query("action == 'label' and who in ['Ben', 'Cem']")
    assert len(labels) == 6 and not labels["image"].duplicated().any()
    for person in people:
        person.leave()


def test_a_killed_server_has_lost_nothing_that_it_accepted(servers, browser):
    server = servers[0]
    dora = Person(browser, server, "Dora")
    dora.begin()
    for _ in range(2):
        dora.press("2", "Enter")
    accepted, held = dora.store.labels(), dora.image()
    server.stop(signal.SIGKILL)
    server.start()
    server.wait()
    assert dora.store.labels() == accepted
    dora.page.reload()
    dora.seen()
    assert dora.image() == held
    dora.press("1", "Enter")
    assert dora.store.labels() == {**accepted, held: "cat"}
    dora.leave()
    said = server.stop(signal.SIGINT)
    assert server.process.returncode == 0
    assert f"{len(accepted) + 1} of 24 images are labelled, in {server.path}" in said and "Traceback" not in said


def test_boxes_are_drawn_moved_named_and_removed_by_mouse(servers, browser):
    fay = Person(browser, servers[1], "Fay")
    screen = fay.page
    for url in ("config", "gradio_api/info"):
        told = screen.request.get(fay.server.url + url)
        assert told.status == 401 and "<b>x" not in told.text(), url
    for token in ("wrong", TOKEN):  # it is asked for before anything is told
        assert screen.locator("#told").count() == 0
        screen.get_by_role("textbox").first.fill("Fay")
        screen.locator("input[type=password]").fill(token)
        screen.get_by_role("button").first.click()
        if token == "wrong":
            screen.wait_for_selector("text=Incorrect")
    fay.picture = lambda: ""
    fay.begin()

    def drag(x1: float, y1: float, x2: float, y2: float) -> None:
        """In pixels of the original image."""
        canvas = screen.locator("#picture canvas").bounding_box()
        scale = canvas["width"] / SIZE[1]  # screen pixels a pixel
        at = [(canvas["x"] + x * scale, canvas["y"] + y * scale) for x, y in ((x1, y1), (x2, y2))]
        screen.mouse.move(*at[0])
        screen.mouse.down()
        screen.mouse.move((at[0][0] + at[1][0]) / 2, (at[0][1] + at[1][1]) / 2)
        screen.mouse.move(*at[1])
        screen.mouse.up()
        screen.wait_for_timeout(400)

    def assert_stored(image: str, *expected: tuple) -> None:
        found = fay.store.labels()[image]
        assert [one["class"] for one in found] == [name for name, _ in expected], found
        assert np.allclose([one["box"] for one in found], [box for _, box in expected], atol=1.5), (found, expected)

    screen.wait_for_selector("#picture canvas")
    screen.wait_for_timeout(1000)  # the picture settles into its frame
    image = fay.image()
    screen.keyboard.press("1")
    drag(40, 30, 140, 110)  # cat
    screen.keyboard.press("2")
    drag(200, 150, 300, 250)  # dog; the cat stays a cat
    drag(330, 20, 390, 80)  # dog, and removed again
    screen.keyboard.press("Delete")
    screen.keyboard.press("d")
    drag(250, 200, 280, 190)  # the dog moves by (30, -10)
    fay.press("Enter")
    dog, cat = ("dog", [230, 140, 330, 240]), ("cat", [40, 30, 140, 110])
    assert_stored(image, dog, cat)

    fay.press("u")  # the boxes come back with the image
    assert fay.image() == image and fay.store.labels() == {}
    screen.keyboard.press("d")
    drag(60, 60, 60, 60)  # a click selects the cat
    screen.keyboard.press("e")  # whose class is chosen anew
    screen.locator("#model-box-edit input").first.fill("<b>x</b>")
    screen.keyboard.press("Enter")
    if screen.locator("#model-box-edit").count():
        screen.locator("#model-box-edit button", has_text="OK").click()
    fay.press("Enter")
    assert_stored(image, dog, ("<b>x</b>", cat[1]))

    image = fay.image()
    screen.keyboard.press("c")
    drag(350, 250, 420, 320)  # over the edge, and no class yet
    screen.keyboard.press("Enter")
    fay.hears("A box has no class yet")
    screen.keyboard.press("1")
    screen.wait_for_timeout(400)
    fay.press("Enter")
    assert_stored(image, ("cat", [350, 250, 400, 300]))

    image = fay.image()
    fay.press("Enter")  # nothing on it
    assert fay.store.labels()[image] == [] and "rex" not in screen.content()
    fay.leave()


def test_foreign_origins_are_refused_and_wrong_passwords_lock_their_address_out_for_a_while():
    """A guard before an app that says 400 to POST /login with a wrong password."""
    pytest.importorskip("starlette")
    clock, right = [0.0], [False]

    async def app(scope, receive, send):
        status = 200 if right[0] or scope["path"] != "/login" else 400
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    shield = page.guard(app, ["127.0.0.1", "box.lan"], lambda: clock[0])

    def ask(path="/", method="GET", origin=None, address="10.0.0.1", password=False):
        right[0], said = password, []

        async def send(message):
            said.append(message.get("status"))

        headers = [(b"origin", origin.encode())] if origin else []
        scope = {"type": "http", "method": method, "path": path, "headers": headers, "client": (address, 1)}
        with contextlib.suppress(StopIteration):  # nothing here waits, so no loop is needed
            shield(scope, None, send).send(None)
        return said[0]

    for origin in (None, "http://127.0.0.1:7860", "https://box.lan"):
        assert ask(origin=origin) == 200
    for origin in ("http://evil.example", "null", "http://box.lan.evil.example", "http://127.0.0.1.evil.example"):
        assert ask(origin=origin) == 403
    login = {"path": "/login", "method": "POST"}
    assert ask(**login) == 400 and ask(**login, password=True) == 200  # the right one begins a new count
    assert [ask(**login) for _ in range(page.TRIES)] == [400] * page.TRIES
    assert ask(**login, password=True) == 429 and ask("/config") == 200
    assert ask(**login, address="10.0.0.2", password=True) == 200
    clock[0] += page.LOCKED + 1
    assert ask(**login, password=True) == 200


def test_strangers_are_asked_for_a_token(monkeypatch):
    gradio = pytest.importorskip("gradio")
    given: dict = {}
    monkeypatch.setattr(gradio.Blocks, "launch", lambda self, **wishes: given.update(auth=None) or given.update(wishes))
    assert page.launch(gradio.Blocks()).token is None and given["auth"] is None and not given["share"]
    for token in (None, TOKEN):
        served = page.launch(gradio.Blocks(), host="0.0.0.0", allow=["box.lan"], token=token)
        assert len(served.token) >= 16 and (token is None or served.token == token)
        assert given["auth"]("Ann", served.token) and not given["auth"]("Ann", served.token[:-1])
        hosts = given["app_kwargs"]["middleware"][0].kwargs["allowed_hosts"]
        assert {"127.0.0.1", "box.lan", "0.0.0.0"} <= set(hosts) and "*" not in hosts
    with pytest.raises(ValueError, match="token"):
        page.launch(gradio.Blocks(), token="short")


def test_an_image_is_shown_large_and_boxes_find_their_way_back(tmp_path):
    Image.fromarray(np.zeros((40, 20, 3), dtype=np.uint8)).save(tmp_path / "high.jpg")
    shown, size = page.framed(tmp_path / "high.jpg")
    assert size == (40, 20) and shown.size == (320, 640)
    boxes, scale = [{"class": "dog", "box": [2, 4, 10, 20]}], 20 / 320
    (box,) = page._annotated(shown, boxes, {"dog": "#0072b2"}, scale)["boxes"]
    assert [box[side] for side in page.SIDES] == [32, 64, 160, 320] and box["color"] == (0, 114, 178)
    sent = {"boxes": [{**box, **dict(zip(page.SIDES, (16, 32, 80, 160), strict=True)), "scaleFactor": 0.5}]}
    assert page._drawn(sent, scale) == boxes
    for wrong in ({**sent, "orientation": 1}, {"boxes": [{**box, "label": "?"}]}):
        with pytest.raises(ValueError):
            page._drawn(wrong, scale)
    assert page.framed(np.zeros((15, 20, 3), dtype=np.uint8), (30, 40))[1] == (30, 40)  # the size that labels refer to
    assert len(set(page.KEYS)) == len(page.KEYS) == 31 and not set(page.KEYS) & set("usecd?")


def test_a_picture_that_cannot_be_shown_is_told_without_its_name_and_can_be_passed_over(tmp_path):
    pytest.importorskip("gradio")
    (tmp_path / "rex.png").write_text("no image")
    with Store(tmp_path / "labels.sqlite", CLASSES, "boxes") as store:
        store.queue([Question("dog/rex.png")])
        calls = page.build(store, {"dog/rex.png": tmp_path / "rex.png"}).fns.values()
        label, _, unknown, _, screen = [one.fn for one in calls][:5]
        with pytest.warns(UserWarning, match="rex.png"):
            shown = screen("Ann")
            again = label("Ann", shown[1], None, {"boxes": []})
        for told in (shown[-1], again[-1]):
            assert "cannot be shown" in told and "rex" not in told
        assert unknown("Ann", shown[1], None, None)[-1].endswith("Nothing is left.")
        assert store.history()["action"].tolist() == ["unknown"]


def test_without_gradio_the_checkouts_own_packages_are_named(monkeypatch):
    monkeypatch.setattr(page.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"in the checkout, pip install -e '\.\[label\]'"):
        page.need_gradio()


def test_a_folder_is_walked_and_a_wrong_one_is_refused(tmp_path, monkeypatch):
    pytest.importorskip("gradio")
    for name in ("b.PNG", "sub/a.jpg", ".hidden/c.jpg", "notes.txt", "bare/d.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.setattr(page, "launch", {}.__getitem__)
    with Store(tmp_path / "labels.sqlite", CLASSES) as store:
        for wrong in ("none", "bare"):
            with pytest.raises(ValueError, match=f"{wrong} (cannot be read|holds no image)"):
                page.serve(store, tmp_path / wrong)
        with pytest.raises(KeyError):  # it is not served
            page.serve(store, tmp_path)
        assert sorted(store.cycles()) == ["b.PNG", "sub/a.jpg"]
