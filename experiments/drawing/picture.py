"""Draws a 3 on the page in a browser and makes the README's picture of it, experiments/draw.png.

python -m pip install -e ".[dev]" && python experiments/drawing/picture.py

It needs Chromium, such as Debian's package.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

SCRIPT = Path(__file__).parents[1] / "draw.py"
THREE = "24,26 38,16 58,18 66,32 52,46 42,48 60,53 69,68 58,83 36,86 22,78"  # in percent


def draw(page: Page) -> None:
    """Draws the 3 with the mouse."""
    box = page.locator("#pad").bounding_box()
    assert box is not None
    for number, point in enumerate(THREE.split()):
        right, down = (int(share) / 100 for share in point.split(","))
        page.mouse.move(box["x"] + box["width"] * right, box["y"] + box["height"] * down, steps=6)
        if number == 0:
            page.mouse.down()
    page.mouse.up()
    page.wait_for_timeout(500)
    page.locator("body[aria-busy=false]").wait_for()


def main() -> None:
    """Makes the picture."""
    chromium = shutil.which("chromium")
    if chromium is None:
        raise SystemExit("chromium is missing: apt-get install chromium")
    command = [sys.executable, str(SCRIPT), "--no-open", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        found = re.search(r"http://\S+", server.stdout.readline())
        try:
            assert found is not None
            with sync_playwright() as playwright:
                browser = playwright.chromium.launch(
                    executable_path=chromium, args=["--no-sandbox"]
                )
                page = browser.new_page(viewport={"width": 1240, "height": 1180})
                page.goto(found[0])
                page.locator(".value").first.filter(has_text=".").wait_for()
                draw(page)
                page.screenshot(path=SCRIPT.with_suffix(".png"))
                browser.close()
        finally:
            server.terminate()


if __name__ == "__main__":
    main()
