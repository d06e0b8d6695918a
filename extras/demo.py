"""A page to look at what a network sees: drop a photo, or use the camera.

    python -m extras.demo student.pth                             # opens http://127.0.0.1:8000
    python -m extras.demo runs/teacher/best.pth runs/student/best.pth --names teacher student
                                                                  # slide between the two

The page shows the classes' colours over the photo; below the pointer it says the class and how sure
the network is (its softmax, in percent). Everything is in this file and demo.html: a server of
Python's own library, no download, no other address.

It listens on this machine alone (127.0.0.1), answers only requests that were addressed to it by
that name, from its own page, and writes nothing. A photo may have MOST_BYTES and MOST_PIXELS.

    GET  /               demo.html
    GET  /models         [{"name", "classes", "palette"}]
    POST /segment?N      a picture as the body -> what model N makes of it: bytes, see `encode`
"""

import argparse
import io
import json
import threading
import webbrowser
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from data import BROKEN_PICTURE, PHOTO_FORMATS, DatasetError, distinct_colours, read_picture
from eval import class_scores
from extras.cli import NotFinite, UsageError, number, run_command
from extras.machine import keep_freed_memory, pick_device
from extras.pictures import overlay
from extras.view_flags import open_model
from model import SMALLEST

PAGE = Path(__file__).with_name("demo.html")
ADDRESS = "127.0.0.1"
LONGEST_SIDE = 1024                                               # larger photos are shrunk to it
MOST_BYTES = 32 << 20
MOST_PIXELS = 64_000_000
MOST_AT_ONCE = 4                                                  # requests; others are turned away
PATIENCE = 20                                                     # seconds without a byte

# What the page may do: run its own script, talk to this server, show pictures of its own.
POLICY = ("default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
          "connect-src 'self'; img-src 'self' blob: data:; media-src 'self' blob:; "
          "base-uri 'none'; form-action 'none'; frame-ancestors 'none'")


class Refused(ValueError):
    """A request that is not answered; `status` is HTTP's, the message one sentence."""

    def __init__(self, status, message):
        super().__init__(message)
        self.status = status


# ---------------------------------------------------------------- the networks

class Viewer:
    """A network on the page. name: what the page calls it."""

    def __init__(self, name, model, flip=False):
        self.name = name
        self.model = model
        self.flip = flip
        self.classes = list(model.classes or map(str, range(model.num_classes)))
        self.palette = model.palette or distinct_colours(model.num_classes)

    def describe(self):
        palette = [list(colour) for colour in self.palette]
        return {"name": self.name, "classes": self.classes, "palette": palette}

    def look_at(self, image):
        """uint8 (H, W, 3) -> its classes (H, W), how sure each is in percent (H, W), and the
        overlay (H, W, 3), all uint8."""
        pixels = torch.from_numpy(image).permute(2, 0, 1)         # (3, H, W)
        found = class_scores(self.model, pixels, self.model.input_size, flip=self.flip)
        if not self.flip:                                         # of two views it is a softmax
            found = found.softmax(1)
        sure, classes = found[0].max(0)                           # (H, W)
        classes = classes.cpu().numpy().astype(np.uint8)
        percent = (100 * sure).round().cpu().numpy().astype(np.uint8)
        return classes, percent, overlay(image, classes, self.palette)


def encode(classes, percent, colours):
    """-> the answer to /segment: width and height (2 bytes each, the highest first), then the
    classes, the percentages, and the overlay's red, green, blue, row by row."""
    height, width = classes.shape
    head = width.to_bytes(2, "big") + height.to_bytes(2, "big")
    return head + classes.tobytes() + percent.tobytes() + colours.tobytes()


def read_upload(content):
    """The bytes of a picture -> uint8 (H, W, 3), upright, at most LONGEST_SIDE long. Raises
    Refused."""
    try:
        with Image.open(io.BytesIO(content), formats=PHOTO_FORMATS) as picture:
            width, height = picture.size                          # from its head alone
        if width * height > MOST_PIXELS:
            raise Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                          f"a picture of {width}x{height} pixels is too large for this page")
        image = read_picture(io.BytesIO(content), upright=True)
    except BROKEN_PICTURE as error:                               # Refused and DatasetError too
        if isinstance(error, Refused):
            raise
        reason = "not a picture that can be read"
        if isinstance(error, DatasetError):
            reason = str(error).partition(": ")[2]                # without the buffer's name
        raise Refused(HTTPStatus.BAD_REQUEST, reason) from None
    height, width = image.shape[:2]
    factor = LONGEST_SIDE / max(height, width)
    if factor < 1:
        size = (max(1, round(width * factor)), max(1, round(height * factor)))
        image = np.array(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))
    if min(image.shape[:2]) < SMALLEST:
        raise Refused(HTTPStatus.BAD_REQUEST,
                      f"the network needs {SMALLEST}x{SMALLEST} pixels at least")
    return image


# ---------------------------------------------------------------- the server

class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, port, viewers):
        try:
            super().__init__((ADDRESS, port), Handler)
        except OSError as error:
            raise UsageError(f"port {port} is not to be had: {error.strerror}; choose another "
                             f"--port") from None
        self.viewers = viewers
        self.places = threading.Semaphore(MOST_AT_ONCE)
        self.network = threading.Lock()                           # one photo at a time
        self.port = self.server_address[1]
        self.names = {f"{host}:{self.port}" for host in (ADDRESS, "localhost")}

    @property
    def url(self):
        return f"http://{ADDRESS}:{self.port}/"


class Handler(BaseHTTPRequestHandler):
    timeout = PATIENCE
    server_version = "demo"
    sys_version = ""

    def log_message(self, *args):
        """Nothing on the terminal for each request."""

    def do_GET(self):
        self.answer_with({"/": self.page, "/models": self.models}.get(self.path))

    def do_POST(self):
        path, _, query = self.path.partition("?")
        answer = None
        if path == "/segment":
            def answer():
                return self.segment(query)
        self.answer_with(answer)

    def answer_with(self, answer):
        """Send what answer() gives, (content type, bytes), or the sentence of its error."""
        if not self.server.places.acquire(blocking=False):
            self.send(HTTPStatus.SERVICE_UNAVAILABLE, *as_json({"error": "busy, try again"}))
            return
        try:
            self.check_sender()
            if answer is None:
                raise Refused(HTTPStatus.NOT_FOUND, "there is no such page")
            self.send(HTTPStatus.OK, *answer())
        except Refused as error:
            self.close_connection = True
            self.send(error.status, *as_json({"error": str(error)}))
        except OSError:                                           # the browser has gone, or waits
            self.close_connection = True
        finally:
            self.server.places.release()

    def check_sender(self):
        """Only this machine's browser, and only our own page in it: another site could have its
        name lead to this address, or post to it. Raises Refused."""
        if self.headers.get("Host") not in self.server.names:
            raise Refused(HTTPStatus.FORBIDDEN, f"this page is {self.server.url}")
        origin = self.headers.get("Origin")
        own = {f"http://{name}" for name in self.server.names}
        if origin is not None and origin not in own:
            raise Refused(HTTPStatus.FORBIDDEN, "only its own page may ask")
        if self.headers.get("Sec-Fetch-Site") == "cross-site" and self.command == "POST":
            raise Refused(HTTPStatus.FORBIDDEN, "only its own page may ask")

    def send(self, status, kind, content):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Security-Policy", POLICY)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(content)

    # ------------------------------ what there is to ask for

    def page(self):
        return "text/html; charset=utf-8", PAGE.read_bytes()

    def models(self):
        return as_json([viewer.describe() for viewer in self.server.viewers])

    def segment(self, query):
        viewers = self.server.viewers
        if not query.isdecimal() or len(query) > 3 or int(query) >= len(viewers):
            raise Refused(HTTPStatus.NOT_FOUND, "there is no such network")
        image = read_upload(self.read_body())
        try:
            with self.server.network:
                found = viewers[int(query)].look_at(image)
        except (NotFinite, UsageError) as error:
            raise Refused(HTTPStatus.INTERNAL_SERVER_ERROR, str(error)) from None
        return "application/octet-stream", encode(*found)

    def read_body(self):
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or len(length) > 20:
            raise Refused(HTTPStatus.LENGTH_REQUIRED, "a picture must come with its length")
        if int(length) > MOST_BYTES:
            raise Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                          f"a picture of more than {MOST_BYTES >> 20} MiB is too large")
        content = self.rfile.read(int(length))
        if len(content) < int(length):
            raise Refused(HTTPStatus.BAD_REQUEST, "the picture did not come whole")
        return content


def as_json(value):
    return "application/json", json.dumps(value).encode()


# ---------------------------------------------------------------- the command

def build_parser():
    parser = argparse.ArgumentParser(prog="python -m extras.demo",
                                     description="Open a page on this machine: drop a photo, see "
                                     "what one or two networks make of it.")
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT",
                        help="one or two: ours, Hugging Face's, NVlabs' or TransKD's")
    parser.add_argument("--names", nargs="+", metavar="NAME",
                        help="what the page calls the networks (default: their paths)")
    parser.add_argument("--port", type=number(int, 0, 65535), default=8000, metavar="N",
                        help="the port to listen on, 0 for any that is free (default: 8000)")
    parser.add_argument("--size", type=number(int, 0), nargs=2, metavar=("H", "W"),
                        help="resize images to this for the network; 0 0: as they are "
                             "(default: what the checkpoint says)")
    parser.add_argument("--flip", action="store_true",
                        help="average over the image and its mirror image (default: the image)")
    parser.add_argument("--no-browser", action="store_true",
                        help="print the address, open no browser (default: open it)")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu (default: auto)")
    return parser


def main():
    parser = build_parser()
    args = parser.parse_args()
    if len(args.checkpoints) > 2:
        parser.error("one or two checkpoints fit on the page")
    if args.size and args.size != [0, 0] and min(args.size) < SMALLEST:
        parser.error(f"--size must be at least {SMALLEST} {SMALLEST}, or 0 0")
    names = args.names or args.checkpoints
    if len(names) != len(args.checkpoints):
        parser.error(f"--names: {len(names)} names for {len(args.checkpoints)} checkpoints")
    keep_freed_memory()
    device = pick_device(args.device)
    viewers = []
    for path, name in zip(args.checkpoints, names, strict=True):
        viewers.append(Viewer(name, open_model(path, args.size, device), args.flip))
    with Server(args.port, viewers) as server:
        print(f"{server.url} (Ctrl-C ends it)", flush=True)
        if not args.no_browser:
            webbrowser.open(server.url)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("\nended")


if __name__ == "__main__":
    run_command(main)
