"""The file server's pages in a browser: the figures move while a file is downloaded, and the pages
can be read on a phone, in the dark, from the keyboard and by a screen reader.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

TIMEOUT = 30
PHONE = 320  # CSS pixels, the narrowest that WCAG 2.2 asks for (1.4.10)

#: Finds what is too faint for its background (WCAG 2.2, 1.4.3: 4.5 to 1 for text; 1.4.11: 3 to 1
#: for lines), and what sticks out to the right of a window of the width that is given.
FAULTS = r"""
const light = text => {
  const [r, g, b] = text.match(/[\d.]+/g).slice(0, 3).map(value => {
    value /= 255;
    return value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const contrast = (one, two) => {
  const [less, more] = [light(one), light(two)].sort((a, b) => a - b);
  return (more + 0.05) / (less + 0.05);
};
const behind = element => {
  for (let at = element; at; at = at.parentElement) {
    const color = getComputedStyle(at).backgroundColor;
    if (!/, 0\)$/.test(color)) return color;
  }
  return "rgb(255, 255, 255)";
};
const faults = [];
let looked = 0;
for (const element of document.body.querySelectorAll("*")) {
  if (!element.checkVisibility()) continue;
  const style = getComputedStyle(element);
  const own = [...element.childNodes].some(node => node.nodeType === 3 && node.data.trim());
  if (own && !/SCRIPT|STYLE|NOSCRIPT/.test(element.tagName)) {
    looked += 1;
    const is = contrast(style.color, behind(element));
    if (is < 4.5) faults.push([element.outerHTML.slice(0, 80), "contrast", is]);
  }
  if (element.matches(".plot path, .icon.folder")) {
    looked += 1;
    const is = contrast(element.matches("path") ? style.stroke : style.fill, behind(element));
    if (is < 3) faults.push([element.outerHTML.slice(0, 80), "contrast", is]);
  }
  const box = element.getBoundingClientRect();
  if (box.right > arguments[0] + 1) faults.push([element.outerHTML.slice(0, 80), box.right]);
}
if (document.scrollingElement.scrollWidth > arguments[0]) faults.push(["page", "width"]);
return [looked, faults];
"""

#: Finds what a screen reader would stumble over.
SILENT = r"""
const faults = [];
if (!document.documentElement.lang) faults.push("no language");
if (!document.title) faults.push("no title");
for (const [selector, number] of [["main", 1], ["h1", 1]]) {
  if (document.querySelectorAll(selector).length !== number) faults.push(selector);
}
for (const svg of document.querySelectorAll("svg")) {
  const named = svg.getAttribute("role") === "img" && svg.getAttribute("aria-label");
  if (svg.getAttribute("aria-hidden") !== "true" && !named) faults.push(svg.outerHTML);
}
for (const table of document.querySelectorAll("table")) {
  if (!table.caption && !table.getAttribute("aria-label")) faults.push("table without a name");
}
for (const th of document.querySelectorAll("th")) if (!th.scope) faults.push(th.outerHTML);
for (const control of document.querySelectorAll("a, button")) {
  const name = control.getAttribute("aria-label") || control.textContent;
  if (!name.trim()) faults.push(control.outerHTML);
}
return faults;
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[webdriver.Chrome]:
    driver = shutil.which("chromedriver")
    assert driver is not None, "the Debian packages chromium and chromium-driver are needed"
    options = webdriver.ChromeOptions()
    for option in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options, webdriver.ChromeService(driver))
    browser.set_page_load_timeout(TIMEOUT)
    yield browser
    browser.quit()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("served")
    (root / "sub").mkdir()
    (root / ("a long name without a space " * 4).replace(" ", "-")).write_bytes(bytes(300_000))
    with open(root / "huge", "wb") as file:
        file.truncate(1 << 40)
    return root


@pytest.fixture
def server(root: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    command = [sys.executable, "-m", "gsplice", "serve", "--port", "0", "--workers", "2", str(root)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            address = re.search(r":(\d+)/", process.stdout.readline())
            assert address
            yield process, int(address[1])
        finally:
            process.kill()


def wait_until(condition: Callable[[], object], meanwhile: Callable[[], object]) -> None:
    end = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < end, "it never came to be"
        meanwhile()


def look(browser: webdriver.Chrome, width: int, scheme: str) -> None:
    """Have a window of that width, and somebody who prefers the light or the dark."""
    size = {"width": width, "height": 700, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)


def values(browser: webdriver.Chrome) -> dict[str, str]:
    """What the plots say that it is now."""
    script = """
return Object.fromEntries([...document.querySelectorAll(".plot dl div")].map(
  pair => [pair.querySelector("dt").textContent, pair.querySelector("dd").textContent]));
"""
    return dict(browser.execute_script(script))


def total(browser: webdriver.Chrome) -> str:
    script = """
const rows = [...document.querySelectorAll(".counters tr")];
return rows.find(row => row.textContent.startsWith("bytes spliced"))?.lastChild.textContent;
"""
    return str(browser.execute_script(script))


def pressed(browser: webdriver.Chrome, *keys: str) -> Any:
    """Press keys; return the element that has the focus then."""
    ActionChains(browser).send_keys(*keys).perform()
    return browser.switch_to.active_element


def nothing_to_complain(browser: webdriver.Chrome) -> None:
    assert browser.get_log("browser") == []


def test_the_figures_move_while_a_file_is_downloaded(
    browser: webdriver.Chrome, server: tuple[subprocess.Popen[str], int]
) -> None:
    process, port = server
    look(browser, 1000, "light")
    nothing_to_complain(browser)
    browser.get(f"http://127.0.0.1:{port}/.stats")
    with socket.create_connection(("127.0.0.1", port), TIMEOUT) as download:
        download.sendall(b"GET /huge HTTP/1.1\r\nHost: x\r\n\r\n")

        def receive() -> None:
            for _ in range(100):
                assert download.recv(1 << 16)

        def idle(browser: webdriver.Chrome = browser) -> None:
            time.sleep(0.05)

        wait_until(lambda: "iB/s" in values(browser).get("in the kernel", ""), receive)
        wait_until(lambda: values(browser)["responses"] == "1", receive)
        wait_until(lambda: float(values(browser)["longest"].split()[0]) > 0, receive)
        assert values(browser)["through Python"] == "0 B/s"
        first, path = (
            total(browser),
            "return document.querySelector('.plot path').getAttribute('d')",
        )
        drawn = browser.execute_script(path)
        wait_until(lambda: total(browser) != first, receive)
        wait_until(lambda: browser.execute_script(path).count("L") >= 2, receive)
        assert browser.execute_script(path) != drawn
        assert "in the kernel" in (
            browser.find_element(By.CSS_SELECTOR, ".plot svg").get_attribute("aria-label") or ""
        )
        assert "all 2 workers" in browser.find_element(By.TAG_NAME, "main").text
        for scheme in ("light", "dark"):
            look(browser, PHONE, scheme)
            looked, faults = browser.execute_script(FAULTS, PHONE)
            assert (looked > 30, faults) == (True, []), scheme
        assert browser.execute_script(SILENT) == []
    wait_until(lambda: values(browser)["responses"] == "0", idle)

    button = pressed(browser, Keys.TAB)
    assert button.text == "Pause"
    assert button.value_of_css_property("outline-style") == "solid"
    pressed(browser, Keys.SPACE)
    assert button.get_attribute("aria-pressed") == "true"
    assert browser.find_element(By.ID, "state").text == "Paused."
    pressed(browser, Keys.SPACE)
    wait_until(lambda: browser.find_element(By.ID, "state").text.startswith("Updated"), idle)
    nothing_to_complain(browser)

    process.kill()
    wait_until(lambda: "does not answer" in browser.find_element(By.ID, "state").text, idle)
    browser.get("about:blank")
    browser.get_log("browser")  # that a server did not answer, the browser notes as well


def test_listings_and_error_pages(
    browser: webdriver.Chrome, server: tuple[subprocess.Popen[str], int], root: Path
) -> None:
    _, port = server
    for path, scheme in (("", "light"), ("sub/", "dark"), ("", "dark"), ("nowhere", "light")):
        look(browser, PHONE, scheme)
        browser.get(f"http://127.0.0.1:{port}/{path}")
        looked, faults = browser.execute_script(FAULTS, PHONE)
        assert (looked >= 3, faults) == (True, []), (path, scheme)
        assert browser.execute_script(SILENT) == []
    # That a page was not there, the browser notes.
    assert all("404" in note["message"] for note in browser.get_log("browser"))

    browser.get(f"http://127.0.0.1:{port}/")
    assert browser.execute_script("return matchMedia('(prefers-color-scheme: light)').matches")
    links = []
    while (focused := pressed(browser, Keys.TAB)).tag_name == "a":
        assert focused.value_of_css_property("outline-style") == "solid"
        links.append(focused.text)
        if links[-1] == "Live figures":
            break
    assert links[:3] == ["Name", "Size", "Modified"]
    assert {each + "/" * os.path.isdir(root / each) for each in os.listdir(root)} <= set(links)
    assert pressed(browser, Keys.ENTER)
    assert browser.title == "Live figures"
    nothing_to_complain(browser)
