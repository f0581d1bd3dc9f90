"""The page of a run in a real browser: nothing is missing, wide or complained of."""

import json
import re
import shutil
import subprocess

import pytest

from mosaic_jax import report
from mosaic_jax.run.reader import load
from tests.report.written import FIGURES, mosaic_lines, write_answers, write_run

PROBE = """<script>
addEventListener("load", () => {
  const images = [...document.images];
  document.documentElement.style.width = "WIDTHpx";  // a window is at least 500 wide
  document.title = "found " + JSON.stringify({
    pictures: images.filter(image => image.complete && image.naturalWidth > 0).length,
    right: Math.max(...[...document.querySelectorAll("body, body > *, img")].map(
      element => element.getBoundingClientRect().right)),
    text: getComputedStyle(document.body).color,
    requests: performance.getEntriesByType("resource").filter(r => r.name.includes("//")).length,
  });
});
</script></body>"""
"""What the test adds to the page, which has no script, to ask the browser."""

QUIET = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--enable-logging=stderr", "--hide-scrollbars", "--virtual-time-budget=10000"),
)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    root = tmp_path_factory.mktemp("browser")
    run = write_run(root / "run", mosaic_lines(clients=12), counts=[[30, 4]] * 12, channels=3)
    write_answers(run)
    report.write_page([load(run)], root / "page.html")
    return (root / "page.html").read_text().replace("</body>", PROBE)


def look(page, tmp_path, width: int, dark: bool) -> tuple[dict, str]:
    """What the browser finds on the page, and what it says on the console."""
    browser = shutil.which("chromium")
    if browser is None:
        pytest.skip("no chromium (Debian's package of that name)")
    sized = tmp_path / "page.html"
    sized.write_text(page.replace("WIDTH", str(width)))
    done = subprocess.run(
        [
            *(
                browser,
                *QUIET,
                f"--user-data-dir={tmp_path / 'profile'}",
                f"--window-size={width},900",
            ),
            *(f"--blink-settings=preferredColorScheme={0 if dark else 1}", "--dump-dom"),
            sized.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    title = re.search("<title>found (.*)</title>", done.stdout)
    assert title, done.stderr[-2000:]
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return json.loads(title[1]), "\n".join(console)


@pytest.mark.parametrize(("width", "dark"), [(1200, False), (390, False), (390, True)])
def test_the_page_shows_all_its_pictures_at_any_width_in_any_scheme(page, tmp_path, width, dark):
    found, console = look(page, tmp_path, width, dark)
    assert console == ""
    assert found["pictures"] == len(FIGURES) + 2
    assert found["right"] <= width
    assert found["requests"] == 0
    assert found["text"] == ("rgb(255, 255, 255)" if dark else "rgb(0, 0, 0)")
