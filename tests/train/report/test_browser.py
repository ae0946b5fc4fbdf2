"""The page in a real browser: it asks for nothing, complains of nothing, and fits onto a phone."""

import os
import shutil

import pytest

from kdcache.tests.helpers.chromium import PROGRAM, browser
from kdcache.tests.helpers.reports import HOSTILE, hostile_cache, write_run
from kdcache.train.report.config import ReportConfig
from kdcache.train.report.report import report

INSTALLABLE = os.geteuid() == 0 and shutil.which("apt-get") is not None
pytestmark = pytest.mark.skipif(
    PROGRAM is None and not INSTALLABLE, reason="Chromium is not installed, and only root can install it"
)


@pytest.fixture(scope="module")
def files(tmp_path_factory, one_thread, no_fsync):
    """A report of everything, with hostile names; and a page that does what none of ours may do."""
    place = tmp_path_factory.mktemp("report")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KDCACHE_HOME", str(place / "home"))
        cache, spec = hostile_cache(place)
        for seed in range(3):
            write_run(place / "runs" / f"a{seed}", seed=seed, student=HOSTILE[0], top1=0.5 + seed / 100)
            write_run(place / "runs" / f"b{seed}", loss=HOSTILE[6], seed=seed, student=HOSTILE[1], top1=0.4)
        what = (str(cache.path), str(place / "runs"))
        report(ReportConfig(what, out=str(place / "report.html"), data=spec, judge=0), lambda _: None)
    bad = '<!doctype html><img src="http://127.0.0.1:9/x.png"><script>console.error("no"); alert(1)</script>'
    (place / "bad.html").write_text(f'{bad}<p style="width:2000px">wide')
    return place


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_is_quiet_and_fits(files, page, width, dark):
    page.requests.clear()
    page.complaints.clear()
    page.open(files / "report.html", width, dark=dark)
    assert page.requests == [(files / "report.html").as_uri()] and page.complaints == []
    assert page.value("document.scrollingElement.scrollWidth") <= width
    assert page.value("document.querySelectorAll('script, iframe, object').length") == 0
    assert page.value("[...document.images].every(one => one.complete && one.naturalWidth)")
    paper = page.value("getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(255, 255, 255)") != dark
    page.picture(files / "shot.png")
    assert (files / "shot.png").stat().st_size > 10_000


CONTRAST = """(() => {
  const rgb = text => text.match(/[0-9.]+/g).map(n => text.startsWith("color(") ? 255 * n : +n);
  const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
    .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = one => {
    for (; one; one = one.parentElement) {
      const colour = rgb(getComputedStyle(one).backgroundColor);
      if (colour.length < 4 || colour[3] > 0) return colour;
    }
    return [255, 255, 255];
  };
  const apart = (one, paper) => {
    const a = light(rgb(getComputedStyle(one).color)), b = light(paper);
    return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  };
  const texts = 'p, b, span, th, td, h1, h2, h3, h4, dt, dd, a, summary, figcaption';
  return Math.min(
    ...[...document.querySelectorAll(texts)].filter(one => one.innerText && one.checkVisibility())
      .map(one => apart(one, behind(one))),
    ...[...document.querySelectorAll('.bars span')]
      .map(one => apart(one, behind(one.parentElement.querySelector('i')))),
  );
})()"""


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_texts_can_be_read(files, page, dark):
    """WCAG 2.2, 1.4.3: a contrast of at least 4.5."""
    page.open(files / "report.html", dark=dark)
    assert page.value(CONTRAST) >= 4.5


def test_the_page_can_be_printed(files, page):
    page.open(files / "report.html")
    assert page.printed().startswith(b"%PDF")


def test_what_no_page_of_ours_does_would_be_seen(files, page):
    page.requests.clear()
    page.complaints.clear()
    page.call("Page.setBypassCSP", enabled=False)
    page.call("Emulation.setScriptExecutionDisabled", value=False)
    page.open(files / "bad.html", 390)
    assert any("127.0.0.1" in one for one in page.requests)
    assert any("console" in one for one in page.complaints) and any("dialog" in one for one in page.complaints)
    assert page.value("document.scrollingElement.scrollWidth") > 390
