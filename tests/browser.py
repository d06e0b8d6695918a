"""A headless Chromium for the tests, driven through chromedriver (Debian: chromium-driver) by the
W3C WebDriver protocol, https://www.w3.org/TR/webdriver2, with Python's own library."""

import base64
import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request

ABSENT = "chromium and chromedriver are not installed (apt-get install chromium chromium-driver)"
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"          # what the protocol calls an element


def is_there():
    return bool(shutil.which("chromium") and shutil.which("chromedriver"))


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Browser:
    """with Browser(folder) as browser: browser.open(url); browser.run("return 1 + 1")"""

    def __init__(self, profile):
        self.port = free_port()
        self.profile = profile

    def __enter__(self):
        self.driver = subprocess.Popen(["chromedriver", f"--port={self.port}"],
                                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            self.session = self.start_session()
        except BaseException:
            self.driver.kill()
            raise
        return self

    def start_session(self):
        arguments = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                     "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream",
                     "--window-size=1100,1000", f"--user-data-dir={self.profile}"]
        capabilities = {"goog:chromeOptions": {"args": arguments},
                        "goog:loggingPrefs": {"browser": "ALL"}}
        until = time.time() + 60
        while True:
            try:
                answer = self.ask("POST", "/session",
                                  {"capabilities": {"alwaysMatch": capabilities}})
                return f"/session/{answer['sessionId']}"
            except ConnectionError:                               # it is still starting
                if time.time() > until:
                    raise
                time.sleep(0.1)

    def __exit__(self, *error):
        try:
            self.ask("DELETE", self.session)
        finally:
            self.driver.terminate()
            self.driver.wait(20)

    def ask(self, method, path, content=None):
        body = None if content is None else json.dumps(content).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", body,
                                         {"Content-Type": "application/json"}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(error.read().decode()) from None
        except urllib.error.URLError as error:
            raise ConnectionError(error.reason) from None

    # ------------------------------ what a person does

    def open(self, url):
        self.ask("POST", f"{self.session}/url", {"url": url})

    def run(self, script, *args):
        return self.ask("POST", f"{self.session}/execute/sync", {"script": script, "args": args})

    def wait_for(self, script, seconds=60):
        """Until the script returns something that is true -> that."""
        until = time.time() + seconds
        while time.time() < until:
            value = self.run(script)
            if value:
                return value
            time.sleep(0.05)
        raise AssertionError(f"not within {seconds} s: {script}; the page says "
                             f"{self.run('return document.body.innerText')!r}")

    def find(self, selector):
        found = self.ask("POST", f"{self.session}/element",
                         {"using": "css selector", "value": selector})
        return found[ELEMENT]

    def type(self, selector, text):
        self.ask("POST", f"{self.session}/element/{self.find(selector)}/value", {"text": str(text)})

    def click(self, selector):
        self.ask("POST", f"{self.session}/element/{self.find(selector)}/click", {})

    def hover(self, x, y):
        move = {"type": "pointerMove", "duration": 0, "x": round(x), "y": round(y)}
        pointer = {"type": "pointer", "id": "mouse", "parameters": {"pointerType": "mouse"},
                   "actions": [move]}
        self.ask("POST", f"{self.session}/actions", {"actions": [pointer]})

    def errors(self):
        """The errors on the page's console, also those of its content policy."""
        entries = self.ask("POST", f"{self.session}/se/log", {"type": "browser"})
        return [entry["message"] for entry in entries if entry["level"] == "SEVERE"]

    def screenshot(self, path):
        path.write_bytes(base64.b64decode(self.ask("GET", f"{self.session}/screenshot")))
