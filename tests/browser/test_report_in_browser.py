"""A report on the screen of a phone, on a wide one, and on paper: a real browser shows it, and is asked what it shows.

It is the report of the finished demo, if there is one, and else that of a small made-up study.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from chromium import Chromium, Unavailable
from conftest import ROOT
from test_early_figures import finish
from test_report import draw, written

pytestmark = pytest.mark.browser

WIDTHS = (390, 1280)  # a phone's and a screen's, in CSS pixels
DEMO = ROOT / "results/demo/report.html"

WIDTH = "Math.max(document.documentElement.scrollWidth, document.body.scrollWidth)"
OPEN_ALL = "document.querySelectorAll('details').forEach(one => one.open = true)"

# Elements with text of their own, that are shown: tag, text, size of its letters, and their contrast by WCAG 2.
LETTERS = """
(() => {
  const paint = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const parts = colour => {
    paint.clearRect(0, 0, 1, 1); paint.fillStyle = colour; paint.fillRect(0, 0, 1, 1);
    return [...paint.getImageData(0, 0, 1, 1).data];
  };
  const light = colour => {
    const [r, g, b] = parts(colour).map(v => v / 255).map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = one => {
    for (let at = one; at; at = at.parentElement) {
      const colour = getComputedStyle(at).backgroundColor;
      if (parts(colour)[3] === 255) return colour;
    }
    return 'white';
  };
  return [...document.body.querySelectorAll('*')]
    .filter(one => [...one.childNodes].some(node => node.nodeType === 3 && node.data.trim()) && one.checkVisibility())
    .map(one => {
      const [a, b] = [light(getComputedStyle(one).color), light(behind(one))];
      const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
      return [one.tagName, one.textContent.slice(0, 40), parseFloat(getComputedStyle(one).fontSize), contrast];
    });
})()
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Chromium]:
    try:
        with Chromium() as browser:
            yield browser
    except Unavailable as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    if DEMO.is_file():
        return DEMO
    folder = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        study = finish()
        draw(study)
        written(study)
    return folder / "report.html"


@pytest.fixture(params=WIDTHS)
def width(request) -> int:
    return request.param


def test_the_page_never_scrolls_sideways_also_with_all_open(browser, page, width):
    browser.open(page, width)
    assert browser.value(WIDTH) <= width
    browser.value(OPEN_ALL)
    assert browser.value(WIDTH) <= width
    outside = (
        "[...document.querySelectorAll('body *')].filter(one => !one.parentElement.closest('.scroll')"
        " && one.getBoundingClientRect().right > innerWidth + 1).map(one => one.outerHTML.slice(0, 80))"
    )
    assert browser.value(outside) == []


def test_every_picture_is_decoded(browser, page, width):
    browser.open(page, width)
    pictures = browser.value(
        "Promise.all([...document.images].map(one => one.decode().then(() => [one.naturalWidth, one.clientWidth])))"
    )
    assert pictures
    assert all(min(sizes) > 0 for sizes in pictures)


def test_nothing_is_asked_for_but_the_page_and_nothing_is_complained_of(browser, page, width):
    browser.open(page, width)
    browser.value(OPEN_ALL)
    browser.value("new Promise(done => setTimeout(done, 300))")
    asked = {event["request"]["url"] for event in browser.named("Network.requestWillBeSent")}
    assert {url for url in asked if not url.startswith("data:image/svg+xml;base64,")} == {page.resolve().as_uri()}
    complaints = ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown")
    assert [event for name in complaints for event in browser.named(name)] == []


def test_what_is_closed_opens_at_a_touch(browser, page, width):
    browser.open(page, width)
    heights = browser.value(
        "[...document.querySelectorAll('details:not([open])')].map(one => {"
        " const closed = one.offsetHeight; one.querySelector('summary').click(); return [closed, one.offsetHeight]; })"
    )
    assert heights
    assert all(closed < opened for closed, opened in heights)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_letters_are_large_enough_and_stand_out(browser, page, width, scheme):
    browser.open(page, width, scheme=scheme)
    browser.value(OPEN_ALL)
    letters = browser.value(LETTERS)
    assert len(letters) > 20
    assert [one for one in letters if one[2] < 14] == []
    assert [one for one in letters if one[3] < 4.5] == []
    assert browser.value("getComputedStyle(document.body).backgroundColor === 'rgb(255, 255, 255)'") == (
        scheme == "light"
    )


def test_every_link_leads_to_something_that_is_shown(browser, page, width):
    browser.open(page, width)
    lost = (
        "[...document.links].filter(one => !document.getElementById(decodeURIComponent(one.hash.slice(1))))"
        ".map(one => one.href)"
    )
    assert browser.value(lost) == []


def test_on_paper_definitions_are_open_numbers_of_charts_are_not_and_nothing_is_cut(browser, page):
    browser.open(page, 720, media="print")
    assert browser.value(WIDTH) <= 720
    cut = (
        "[...document.querySelectorAll('td, th, img, pre')].filter(one => one.checkVisibility()"
        " && one.getBoundingClientRect().right > 721).map(one => one.outerHTML.slice(0, 80))"
    )
    assert browser.value(cut) == []
    shown = "[...document.querySelectorAll('details:not([open])')].map(one => [one.className, one.offsetHeight > 60])"
    states = {json.dumps(state) for state in browser.value(shown)}
    assert states <= {'["print", true]', '["", false]'}
    assert states
    paper = browser.call("Page.printToPDF", preferCSSPageSize=True)["data"]
    assert base64.b64decode(paper).startswith(b"%PDF")
