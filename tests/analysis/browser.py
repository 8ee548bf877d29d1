"""A headless Chromium, driven through the Chrome DevTools Protocol."""

import asyncio
import base64
import json
import os
import pathlib
import shutil
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Callable
from typing import Any, Self

from tornado.websocket import websocket_connect

# Names of the program on Debian and elsewhere; None if there is none.
EXECUTABLE = next(
  filter(
    None,
    map(shutil.which, ("chromium", "chromium-browser", "google-chrome")),
  ),
  None,
)
_SECONDS = 60
_FLAGS = (
  *("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run"),
  *("--disable-background-networking", "--disable-component-update"),
  *("--disable-sync", "--hide-scrollbars", "--remote-debugging-port=0"),
)


class Browser:
  """One page of a browser of its own; a context manager that ends it."""

  def __enter__(self) -> Self:
    self._profile = tempfile.mkdtemp(prefix="edl_jax_browser_")
    self._loop = asyncio.new_event_loop()
    self._process = subprocess.Popen(
      [EXECUTABLE, *_FLAGS, f"--user-data-dir={self._profile}", "about:blank"],
      stdout=subprocess.DEVNULL,
      stderr=subprocess.DEVNULL,
      env={**os.environ, "HOME": self._profile},
    )
    try:
      self._number = 0
      # Events that the browser reported, in order.
      self.events: list[dict[str, Any]] = []
      self._socket = self._wait(websocket_connect, self._address())
      for domain in ("Page", "Runtime", "Log", "Network"):
        self.call(f"{domain}.enable")
    except BaseException:
      self.__exit__()
      raise
    return self

  def __exit__(self, *exception: object) -> None:
    self._process.kill()
    self._process.wait()
    self._loop.close()
    shutil.rmtree(self._profile, ignore_errors=True)

  def _wait(self, start: Callable[..., Any], *arguments: Any) -> Any:
    async def within() -> Any:
      # Called here, as tornado looks for the loop that runs.
      return await asyncio.wait_for(start(*arguments), _SECONDS)

    return self._loop.run_until_complete(within())

  def _address(self) -> str:
    """Returns the address of the page's socket."""
    file = pathlib.Path(self._profile, "DevToolsActivePort")
    end = time.monotonic() + _SECONDS
    while time.monotonic() < end and self._process.poll() is None:
      if file.exists() and (lines := file.read_text().split()):
        with urllib.request.urlopen(
          f"http://127.0.0.1:{lines[0]}/json"
        ) as page:
          for target in json.load(page):
            if target["type"] == "page":
              return target["webSocketDebuggerUrl"]
      time.sleep(0.05)
    raise TimeoutError(f"{EXECUTABLE} opened no page")

  def call(self, method: str, **parameters: Any) -> dict[str, Any]:
    """Calls a method of the protocol and returns its result."""
    self._number += 1
    message = {"id": self._number, "method": method, "params": parameters}
    self._wait(self._socket.write_message, json.dumps(message))
    while True:
      text = self._wait(self._socket.read_message)
      assert text is not None, "the browser closed the connection"
      message = json.loads(text)
      if message.get("id") == self._number:
        assert "error" not in message, (method, message)
        return message["result"]
      self.events.append(message)

  def open(self, path: pathlib.Path) -> None:
    """Opens a file and waits until its scripts have run."""
    self.events.clear()
    self.call("Page.navigate", url=path.as_uri())
    end = time.monotonic() + _SECONDS
    while self.evaluate("document.readyState") != "complete":
      assert time.monotonic() < end, "the page did not load"
      time.sleep(0.05)

  def evaluate(self, expression: str) -> Any:
    """Returns the value of a JavaScript expression."""
    result = self.call(
      "Runtime.evaluate", expression=expression, returnByValue=True
    )
    assert "exceptionDetails" not in result, result["exceptionDetails"]
    return result["result"].get("value")

  def errors(self) -> list[str]:
    """Returns what the console has of errors and warnings."""
    found = []
    for event in self.events:
      parameters = event.get("params", {})
      match event["method"]:
        case "Runtime.exceptionThrown":
          found.append(json.dumps(parameters["exceptionDetails"]))
        case "Runtime.consoleAPICalled" | "Log.entryAdded":
          found.append(json.dumps(parameters))
    return found

  def requests(self) -> list[str]:
    """Returns the addresses that the page asked for."""
    return [
      event["params"]["request"]["url"]
      for event in self.events
      if event["method"] == "Network.requestWillBeSent"
    ]

  def press(self, key: str) -> None:
    """Presses a key that has a name, such as "ArrowRight"."""
    codes = {"Tab": 9, "Enter": 13, "Escape": 27, "End": 35, "Home": 36}
    codes |= {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}
    shared = {"key": key, "code": key, "windowsVirtualKeyCode": codes[key]}
    text = {"text": "\r"} if key == "Enter" else {}
    self.call("Input.dispatchKeyEvent", type="keyDown", **shared, **text)
    self.call("Input.dispatchKeyEvent", type="keyUp", **shared)

  def point(self, selector: str, *, click: bool = False) -> None:
    """Moves the mouse onto the first element of a selector, and clicks."""
    place = f"""(() => {{
      const found = document.querySelector({json.dumps(selector)});
      found.scrollIntoView({{block: "center", inline: "center"}});
      const box = found.getBoundingClientRect();
      return [box.left + box.width / 2, box.top + box.height / 2];
    }})()"""
    # What scrolls into view is laid out then, which may move the rest.
    before, at = None, self.evaluate(place)
    while at != before:
      time.sleep(0.05)
      before, at = at, self.evaluate(place)
    x, y = at
    # The mouse must move, or it enters nothing.
    for at in (0, x), (x, x):
      self.call("Input.dispatchMouseEvent", type="mouseMoved", x=at[0], y=y)
    if click:
      for kind in ("mousePressed", "mouseReleased"):
        self.call(
          "Input.dispatchMouseEvent",
          type=kind,
          x=x,
          y=y,
          button="left",
          clickCount=1,
        )

  def resize(self, width: int, height: int) -> None:
    self.call(
      "Emulation.setDeviceMetricsOverride",
      width=width,
      height=height,
      deviceScaleFactor=1,
      mobile=False,
    )

  def prefer(self, scheme: str) -> None:
    """Sets the system's preference: "dark" or "light"."""
    self.call(
      "Emulation.setEmulatedMedia",
      features=[{"name": "prefers-color-scheme", "value": scheme}],
    )

  def screenshot(self, path: pathlib.Path, *, whole: bool = False) -> None:
    """Writes a picture of the window, or of the whole page."""
    result = self.call(
      "Page.captureScreenshot", format="png", captureBeyondViewport=whole
    )
    path.write_bytes(base64.b64decode(result["data"]))
