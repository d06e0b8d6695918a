"""The page: what its server answers and refuses, and the page itself in a real browser."""

import base64
import http.client
import io
import json
import signal
import socket
import struct
import subprocess
import sys
import threading
import urllib.request
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from browser import ABSENT, Browser, is_there
from conftest import ROOT, command
from eval import class_scores
from extras import demo
from extras.demo import Server, Viewer
from extras.pictures import overlay
from model import segformer


def make_viewer(name, seed):
    torch.manual_seed(seed)
    model = segformer("b0", 3).eval()
    model.classes = ["road", "<b>sky</b>", "car"]
    model.palette = [(128, 64, 128), (70, 130, 180), (0, 0, 142)]
    return Viewer(name, model.fold())


@pytest.fixture
def server():
    viewers = [make_viewer("teacher.pth", 0), make_viewer("student.pth", 1)]
    with Server(0, viewers) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def photo(width=96, height=64):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def as_png(pixels, **options):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", **options)
    return buffer.getvalue()


def ask(server, method, path, body=None, **headers):
    """-> (status, content, headers). Headers are given with _ for -."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, body, named)
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, content, answer.headers


# ---------------------------------------------------------------- the server

def test_the_answer_is_what_the_network_says(server):
    pixels = photo()
    status, content, headers = ask(server, "POST", "/segment?1", as_png(pixels))
    assert status == 200 and headers["Content-Type"] == "application/octet-stream"
    width = int.from_bytes(content[:2], "big")
    height = int.from_bytes(content[2:4], "big")
    assert (width, height) == (96, 64) and len(content) == 4 + 5 * 96 * 64
    classes, percent = np.frombuffer(content, np.uint8, 2 * 96 * 64, 4).reshape(2, 64, 96)
    colours = np.frombuffer(content, np.uint8, -1, 4 + 2 * 96 * 64).reshape(64, 96, 3)

    viewer = server.viewers[1]
    image = torch.from_numpy(pixels).permute(2, 0, 1)
    expected = class_scores(viewer.model, image).softmax(1)[0]
    assert (classes == expected.argmax(0).numpy()).all()
    assert np.allclose(percent, 100 * expected.max(0).values, atol=0.51)
    assert (colours == overlay(pixels, classes, viewer.palette)).all()


def test_large_photos_are_shrunk_and_turned_upright(server):
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.new("RGB", (2000, 1000)).save(buffer, format="JPEG", exif=exif)
    status, content, _ = ask(server, "POST", "/segment?0", buffer.getvalue())
    assert status == 200 and content[:4] == bytes([2, 0, 4, 0])   # 512x1024


def test_the_page_and_the_models(server):
    status, content, headers = ask(server, "GET", "/")
    assert status == 200 and b"<canvas" in content
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    status, content, _ = ask(server, "GET", "/models")
    models = json.loads(content)
    assert [model["name"] for model in models] == ["teacher.pth", "student.pth"]
    assert models[0]["classes"][2] == "car" and models[0]["palette"][2] == [0, 0, 142]


@pytest.mark.parametrize("headers, status", [
    ({"Host": "evil.example"}, 403),
    ({"Host": "127.0.0.1"}, 403),
    ({"Origin": "https://evil.example"}, 403),
    ({"Origin": "null"}, 403),
    ({"Sec_Fetch_Site": "cross-site"}, 403),
    ({"Content_Length": "99999999999"}, 413),
    ({"Content_Length": "-1"}, 411),
    ({"Content_Length": "x"}, 411),
])
def test_strangers_and_large_bodies_are_refused(headers, status, server):
    answer, content, _ = ask(server, "POST", "/segment?0", as_png(photo()), **headers)
    assert answer == status and "error" in json.loads(content)


def claims(width, height):
    """A PNG whose head says that it is so large."""
    head = bytearray(as_png(photo()))
    head[16:24] = struct.pack(">II", width, height)
    head[29:33] = struct.pack(">I", zlib.crc32(bytes(head[12:29])))
    return bytes(head)


REFUSED = {
    "text": ("/segment?0", b"no picture", 400, "not a picture that can be read"),
    "nothing": ("/segment?0", b"", 400, "not a picture that can be read"),
    "PostScript": ("/segment?0", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n", 400,
                   "not a picture that can be read"),
    "tiny": ("/segment?0", as_png(photo(20, 20)), 400, "32x32 pixels at least"),
    "16 bit": ("/segment?0", as_png(np.zeros((64, 64), np.uint16)), 400, "8 bits a channel"),
    "gigapixel": ("/segment?0", claims(30_000, 30_000), 400, "not a picture that can be read"),
    "too large": ("/segment?0", claims(9_000, 8_000), 413, "9000x8000 pixels is too large"),
    "truncated": ("/segment?0", as_png(photo())[:-3000], 400, "not an image that can be read"),
    "no network 2": ("/segment?2", as_png(photo()), 404, "no such network"),
    "no network -1": ("/segment?-1", as_png(photo()), 404, "no such network"),
    "no number": ("/segment", as_png(photo()), 404, "no such network"),
    "no page": ("/../data.py", b"", 404, "no such page"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_answered_is_a_sentence(kind, server):
    path, body, status, sentence = REFUSED[kind]
    answer, content, _ = ask(server, "POST", path, body)
    assert answer == status and sentence in json.loads(content)["error"]


def test_a_file_beside_the_page_is_not_served(server):
    for path in ("/demo.py", "/../data.py", "//etc/hostname", "/?x"):
        assert ask(server, "GET", path)[0] == 404


def test_it_listens_on_this_machine_alone(server):
    assert server.server_address[0] == "127.0.0.1"
    try:
        found = socket.getaddrinfo(socket.gethostname(), None)
    except socket.gaierror:                                       # this machine has no other name
        return
    others = {info[4][0] for info in found} - {"127.0.0.1", "::1"}
    for address in others:
        with pytest.raises(OSError):
            socket.create_connection((address, server.port), timeout=2)


def test_too_many_requests_at_once_are_turned_away(server, monkeypatch):
    monkeypatch.setattr(demo, "MOST_AT_ONCE", 0)
    for _ in range(4):
        server.places.acquire()
    assert ask(server, "GET", "/")[0] == 503
    for _ in range(4):
        server.places.release()
    assert ask(server, "GET", "/")[0] == 200


@pytest.mark.parametrize("args, sentence", [
    (["{net}", "{net}", "{net}"], "one or two checkpoints"),
    (["{net}", "--names", "a", "b"], "2 names for 1 checkpoints"),
    (["/no.pth"], "cannot open checkpoint /no.pth"),
    (["{net}", "--port", "70000"], "at most 65535"),
    (["{net}", "--size", "8", "8"], "at least 32"),
    (["{net}", "--port", "{taken}"], "is not to be had"),
])
def test_mistakes_are_a_sentence_and_exit_code_2(args, sentence, checkpoint):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        args = [arg.format(net=checkpoint, taken=other.getsockname()[1]) for arg in args]
        assert sentence in command("-m", "extras.demo", *args, "--no-browser", code=2)


def test_the_command_serves_until_it_is_stopped(checkpoint):
    process = subprocess.Popen([sys.executable, "-m", "extras.demo", str(checkpoint), "--names",
                                "mine", "--port", "0", "--no-browser", "--flip"], cwd=ROOT,
                               stdout=subprocess.PIPE, text=True)
    try:
        lines = iter(process.stdout.readline, "")
        url = next(line for line in lines if line.startswith("http://127.0.0.1:")).split()[0]
        with urllib.request.urlopen(url + "models", timeout=60) as answer:
            assert json.load(answer)[0]["name"] == "mine"
        body = urllib.request.Request(url + "segment?0", as_png(photo()))
        with urllib.request.urlopen(body, timeout=60) as answer:
            classes, percent = np.frombuffer(answer.read()[4:], np.uint8)[:2 * 96 * 64].reshape(
                2, 64, 96)
        assert classes.max() < 3 and percent.min() >= 33 and percent.max() <= 100
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


# ---------------------------------------------------------------- the page

@pytest.fixture
def browser(tmp_path):
    if not is_there():
        pytest.skip(ABSENT)
    with Browser(tmp_path / "profile") as running:
        yield running


PIXEL = """
const place = arguments[0];
const canvas = document.getElementById("canvas");
return Array.from(canvas.getContext("2d").getImageData(place[0], place[1], 1, 1).data);
"""
READY = "return views.length === models.length && models.length > 0"


def expected_views(server, pixels):
    return [viewer.look_at(pixels) for viewer in server.viewers]


def test_a_photo_in_a_browser(server, browser, tmp_path):
    """Choose a file, slide between the networks, read the class below the pointer."""
    pixels = photo(640, 420)
    pixels[:, 320:] //= 4
    Image.fromarray(pixels).save(tmp_path / "x.png")
    browser.open(server.url)
    browser.wait_for("return models.length === 2")
    browser.type("#file", tmp_path / "x.png")
    browser.wait_for(READY)
    (first, first_sure, first_colours), (second, second_sure, second_colours) = \
        expected_views(server, pixels)

    # 500 of 1000: the first network left of the middle, the second right of it
    left = browser.run(PIXEL, [100, 200])
    right = browser.run(PIXEL, [500, 200])
    assert left[:3] == first_colours[200, 100].tolist()
    assert right[:3] == second_colours[200, 500].tolist()
    slide = ("const slider = document.getElementById('slider'); slider.value = arguments[0];"
             "slider.dispatchEvent(new Event('input'));")
    browser.run(slide, 1000)
    assert browser.run(PIXEL, [500, 200])[:3] == first_colours[200, 500].tolist()
    browser.run(slide, 0)
    assert browser.run(PIXEL, [100, 200])[:3] == second_colours[200, 100].tolist()

    box = browser.run("const b = document.getElementById('canvas').getBoundingClientRect();"
                      "return [b.left, b.top, b.width / 640]")
    browser.hover(box[0] + 100.5 * box[2], box[1] + 200.5 * box[2])
    told = browser.run("return document.getElementById('below').textContent")
    names = server.viewers[0].classes
    assert f"teacher.pth: {names[first[200, 100]]}, {first_sure[200, 100]} %" in told
    assert f"student.pth: {names[second[200, 100]]}, {second_sure[200, 100]} %" in told

    # names of classes are text, whatever a stranger's checkpoint calls them
    assert browser.run("return document.querySelectorAll('b').length") == 0
    assert browser.run("return document.getElementById('legend').textContent").count("%") >= 1
    assert browser.errors() == []
    browser.screenshot(tmp_path / "page.png")
    assert Image.open(tmp_path / "page.png").width >= 1000


DROP = """
const bytes = Uint8Array.from(atob(arguments[0]), letter => letter.charCodeAt(0));
const transfer = new DataTransfer();
transfer.items.add(new File([bytes], "x", {type: "image/png"}));
document.getElementById("drop").dispatchEvent(
  new DragEvent("drop", {dataTransfer: transfer, bubbles: true, cancelable: true}));
"""


def test_dropping_and_what_is_no_picture(server, browser):
    browser.open(server.url)
    browser.wait_for("return models.length === 2")
    browser.run(DROP, base64.b64encode(b"no picture").decode())
    message = browser.wait_for("return document.getElementById('error').textContent")
    assert message == "not a picture that can be read"
    browser.run(DROP, base64.b64encode(as_png(photo(64, 64))).decode())
    browser.wait_for(READY)
    assert browser.run("return document.getElementById('error').textContent") == ""
    status = browser.run("return document.getElementById('status').textContent")
    assert status.startswith("64x64, ")


def test_the_camera_and_one_network(server, browser):
    server.viewers = server.viewers[1:]
    browser.open(server.url)
    browser.wait_for("return models.length === 1")
    browser.click("#camera")
    browser.wait_for("return turn > 2 && views.length === 1")     # frame after frame
    assert browser.run("return document.getElementById('left').textContent") == "photo"
    assert browser.run("return canvas.width") == 640
    browser.click("#camera")
    browser.wait_for("return stream === null")
    assert browser.run("return document.getElementById('error').textContent") == ""
