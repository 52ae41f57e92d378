"""The page in a browser: a person draws, moves sliders, takes digits and saves what is seen."""

import base64
import io
import re
import shutil
import signal
import urllib.request
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import sync_playwright

from data_files import load_mnist
from drawn_digits import DIGITS
from served_page import serve

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
# The page paints its pad in the browser's next frame.
NEXT_FRAME = "new Promise(done => requestAnimationFrame(() => setTimeout(done)))"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM, reason="no chromium: apt-get install chromium"),
]


@pytest.fixture(scope="module")
def address():
    with serve() as (_, address):
        yield address


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser):
    """Opens a page, and fails if anything stands in its console or goes to another host."""
    contexts, complaints, hosts, own = [], [], set(), set()

    def open_page(address, width=1280, scheme="light"):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        context.set_default_timeout(180_000)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: hosts.add(urlsplit(request.url).netloc))
        page.goto(address)
        page.locator(".value").first.filter(has_text=".").wait_for()
        own.add(urlsplit(address).netloc)
        return page

    open_page.complaints = complaints
    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []
    assert hosts <= own | {""}  # data: and blob: have no host


def settle(page) -> None:
    """Waits until every answer is there and shown."""
    page.wait_for_timeout(20)
    page.evaluate(NEXT_FRAME)
    page.locator("body[aria-busy=false]").wait_for()
    page.evaluate(NEXT_FRAME)


def draw(page, strokes: str, *, inset=0.15) -> None:
    """Draws strokes with the mouse."""
    box = page.locator("#pad").bounding_box()
    place = lambda x, y: (  # noqa: E731
        box["x"] + box["width"] * (inset + (1 - 2 * inset) * x),
        box["y"] + box["height"] * (inset + (1 - 2 * inset) * y),
    )
    for stroke in strokes.split(" / "):
        first, *rest = (map(float, point.split(",")) for point in stroke.split())
        page.mouse.move(*place(*first))
        page.mouse.down()
        for point in rest:
            page.mouse.move(*place(*point), steps=5)
        page.mouse.up()
    settle(page)


def read(page, network: int = 0) -> int:
    """Returns the class of the highest score."""
    values = page.locator(".network").nth(network).locator(".bar .value").all_text_contents()
    return int(np.argmax([float(value) for value in values]))


def pictures(page, selector: str) -> list[str]:
    canvases = f"[...document.querySelectorAll('{selector}')]"
    return page.evaluate(f"{canvases}.map(canvas => canvas.toDataURL())")


def picture(page, selector: str) -> str:
    return pictures(page, selector)[0]


def take(page, number: int) -> None:
    page.fill("#number", str(number))
    page.click("#take")
    settle(page)


def test_of_twenty_drawings_at_least_eighteen_are_read_right(open_page, address):
    page = open_page(address)
    wrong = []
    for digit, ways in DIGITS.items():
        for strokes in ways:
            page.click("#clear")
            draw(page, strokes)
            if read(page) != digit:
                wrong.append((digit, read(page)))
    print("misread:", wrong)
    assert len(wrong) <= 2, wrong


def test_a_test_digit_is_read_as_the_network_reads_its_pixels(open_page, address):
    import capsjax

    page, digits = open_page(address), load_mnist().x_test[:6]
    expected = capsjax.predict(capsjax.pretrained(), digits)
    for number, (label, scores) in enumerate(zip(*expected[:2], strict=True)):
        take(page, number)
        assert read(page) == label
        shown = [float(v) for v in page.locator(".bar .value").all_text_contents()]
        np.testing.assert_allclose(shown, scores, atol=0.006)
        assert page.text_content("#label") == f"shows {load_mnist().y_test[number]}"


def test_a_class_is_looked_into_and_sliders_change_what_is_drawn(open_page, address):
    page = open_page(address)
    take(page, 0)
    page.locator(".bar").nth(3).click()
    settle(page)
    assert "capsule of 3" in page.text_content(".drawn-hint")
    assert page.locator(".bar").nth(3).get_attribute("aria-pressed") == "true"
    drawn = picture(page, ".drawn")
    page.locator(".numbers input").nth(2).fill("0.8")
    settle(page)
    assert picture(page, ".drawn") != drawn
    page.click(".reset")
    assert picture(page, ".drawn") == drawn
    page.locator(".numbers button").nth(2).click()
    settle(page)
    assert page.locator(".frames canvas").count() == 11
    assert len({*pictures(page, ".frames canvas")}) == 11
    page.click(".follow")
    settle(page)
    assert "capsule of 7" in page.text_content(".drawn-hint")


def test_iterations_of_routing_change_couplings_and_scores(open_page, address):
    page = open_page(address)
    take(page, 8)
    maps = pictures(page, ".maps canvas")
    assert len(maps) == len({*maps}) == 5
    scores = set()
    for stage in range(1, 6):
        page.locator(".stage").fill(str(stage))
        assert page.text_content(".stages output") == str(stage)
        assert page.text_content(".maps .current figcaption") == f"after {stage}"
        scores.add(tuple(page.locator(".bar .value").all_text_contents()))
    assert len(scores) > 1


def test_turning_shows_and_returns(open_page, address):
    page = open_page(address)
    take(page, 0)
    seen, curve = picture(page, "#seen"), picture(page, ".curve")
    page.locator("#rotation").fill("90")
    settle(page)
    assert picture(page, "#seen") != seen
    assert picture(page, ".curve") != curve
    page.click("#straight")
    settle(page)
    assert picture(page, "#seen") == seen
    assert "0°: 7" in page.locator(".curve").get_attribute("aria-label")


def test_a_second_digit_is_pulled_apart_and_undo_eraser_and_clear_take_back(open_page, address):
    page = open_page(address)
    empty = picture(page, "#pad")
    draw(page, DIGITS[1][0], inset=0.2)
    first = picture(page, "#pad")
    page.check("input[name=layer][value='1']")
    draw(page, DIGITS[0][0])
    assert page.locator(".apart").is_visible()
    assert "in orange" in page.text_content(".apart-hint")
    page.click("#undo")
    settle(page)
    assert picture(page, "#pad") == first
    assert not page.locator(".apart").is_visible()
    page.check("input[name=layer][value='0']")
    page.check("input[name=tool][value='eraser']")
    page.locator("#width").fill("60")
    draw(page, DIGITS[1][0], inset=0.2)
    page.click("#clear")
    settle(page)
    assert picture(page, "#pad") == empty
    page.click("#undo")
    settle(page)
    assert picture(page, "#pad") != first


def test_the_keyboard_draws(open_page, address):
    page = open_page(address)
    page.focus("#pad")
    for key in ["ArrowUp"] * 9 + ["Space"] + ["ArrowDown"] * 19 + ["Space"]:
        page.keyboard.press(key)
    settle(page)
    assert read(page) == 1
    page.get_by_text("Read as 1.").wait_for(state="attached")
    # The pen goes on from where it was lifted: a second stroke crosses the first.
    for key in ["ArrowUp"] * 9 + ["ArrowLeft"] * 6 + ["Space"] + ["ArrowRight"] * 12 + ["Space"]:
        page.keyboard.press(key)
    settle(page)
    ink = np.array(
        page.evaluate(
            "[...document.querySelector('#pad').getContext('2d').getImageData(0, 0, 392, 392).data]"
        )
    )
    _, columns = np.nonzero(ink.reshape(392, 392, 4)[..., 0] > 128)
    assert abs(columns.mean() - 196) < 8
    assert columns.min() < 130
    assert columns.max() > 262


def test_a_second_finger_draws_nothing(open_page, address):
    page = open_page(address)
    page.evaluate(
        """() => {
          const pad = document.querySelector("#pad"), box = pad.getBoundingClientRect();
          pad.setPointerCapture = () => {};
          const send = (name, pointerId, x, y) => pad.dispatchEvent(new PointerEvent(name, {
            pointerId, clientX: box.left + x, clientY: box.top + y, buttons: 1, bubbles: true }));
          send("pointerdown", 1, 100, 50);
          send("pointerdown", 2, 250, 250);
          send("pointermove", 2, 20, 250);
          send("pointermove", 1, 100, 250);
          send("pointerup", 2, 20, 250);
          send("pointermove", 1, 100, 260);
          send("pointerup", 1, 100, 260);
        }"""
    )
    settle(page)
    assert read(page) == 1


def test_a_late_answer_does_not_overwrite_a_newer_picture(open_page, address):
    page = open_page(address)
    take(page, 0)
    drawn = picture(page, ".drawn")
    delayed = []
    page.route("**/draw", lambda route: delayed.append(route))
    with page.expect_request("**/draw"):
        page.locator(".numbers input").nth(2).fill("0.9")
    for _ in range(6000):  # the request is on its way to the route
        if delayed:
            break
        page.wait_for_timeout(10)
    page.click(".reset")
    assert len(delayed) == 1
    delayed[0].continue_()
    settle(page)
    assert picture(page, ".drawn") == drawn


def test_an_image_file_is_opened_and_dark_ink_on_paper_inverted(open_page, address, tmp_path):
    page = open_page(address)
    paper = np.full((280, 280), 250, np.uint8)
    ink = np.kron(load_mnist().x_test[4, 1:27, 1:27, 0], np.ones((10, 10), np.uint8))
    paper[10:270, 10:270] -= ink // 2
    Image.fromarray(paper).save(tmp_path / "scan.png")
    page.set_input_files("#file", tmp_path / "scan.png")
    settle(page)
    assert "was inverted" in page.text_content("#status")
    assert read(page) == 4
    (tmp_path / "text.png").write_text("no image")
    page.set_input_files("#file", tmp_path / "text.png")
    settle(page)
    assert "text.png is no image" in page.text_content("#status")


def test_what_is_seen_is_saved_as_a_picture(open_page, address, tmp_path):
    page = open_page(address)
    take(page, 3)
    with page.expect_download() as download:
        page.click("#save")
    download.value.save_as(tmp_path / "saved.png")
    data = base64.b64decode(picture(page, ".drawn").partition(",")[2])
    drawn = Image.open(io.BytesIO(data)).convert("L").resize((112, 112), Image.Resampling.NEAREST)
    with Image.open(tmp_path / "saved.png") as saved:
        part = saved.convert("L").crop((540, 42, 652, 154))  # where the capsule's drawing stands
        bar = np.asarray(saved.convert("RGB"))[51:64, 320:470]  # class 0
        pad = np.asarray(saved.convert("L").crop((20, 42, 270, 292)))
    np.testing.assert_allclose(np.asarray(part, float), np.asarray(drawn, float), atol=3)
    score = float(page.locator(".bar .value").first.text_content())
    assert abs((bar != bar[0, -1]).any(-1)[6].mean() - score) < 0.02
    assert pad.max() == 255


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_it_fits_phones_and_both_colour_schemes(open_page, address, width, scheme):
    page = open_page(address, width, scheme)
    wide = "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    assert page.evaluate(wide) == [width, width]
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    brightness = np.mean([int(part) for part in re.findall(r"\d+", background)[:3]])
    assert (brightness > 128) == (scheme == "light")
    parts = "[...document.querySelectorAll('input, button, canvas[role=img]')]"
    named = "e.labels?.length || e.getAttribute('aria-label') || e.textContent.trim()"
    assert page.evaluate(f"{parts}.filter(e => !({named})).map(e => e.outerHTML)") == []


def test_two_networks_stand_side_by_side_and_ctrl_c_ends_at_once(open_page, tmp_path):
    from flax import nnx

    import capsjax

    net = capsjax.EfficientCapsNet(
        (36, 36, 1), channels=(4, 8), kernel_sizes=(3, 3), strides=(1, 2), rngs=nnx.Rngs(0)
    )
    capsjax.weights.save(net, tmp_path / "other.safetensors")
    with serve("--weights", "capsnet-mnist", str(tmp_path / "other.safetensors")) as (
        process,
        address,
    ):
        page = open_page(address)
        take(page, 0)
        assert page.locator(".network").count() == 2
        assert read(page, 0) == 7
        assert "images of 36×36×1" in page.locator(".facts").nth(1).text_content()
        left, right = (page.locator(".network").nth(n).bounding_box() for n in range(2))
        assert left["y"] == right["y"]
        urllib.request.urlopen(f"{address}networks").close()
        process.send_signal(signal.SIGINT)
        # The browser keeps its connection, for which the server would wait without end.
        assert process.wait(120) in (0, 130, -signal.SIGINT)
        page.locator(".bar").nth(1).click()
        page.get_by_text("The server does not answer").wait_for()
        open_page.complaints.clear()  # the console tells of it, too
        page.close()
