"""The status page: what it says, that it asks for nothing else, and how a browser shows it."""

from __future__ import annotations

import re
import threading
import time

import pytest
import uvicorn
from PIL import Image

from nnsight.protocol import ModelInfo, ServerInfo, versions
from nnsight.server._limits import Limits
from nnsight.server._page import page, since

MODELS = [
    ModelInfo("openai-community/gpt2", None, True, 3, 1, 1, 1),
    ModelInfo("org/large", "v2", True, 12, 1, 2, 1),
    ModelInfo("org/late", None, False, 0, 0, 1, 0),
    ModelInfo("<script>alert(1)</script>", None, False, 0, 0, 1, 0, "not available"),
]


def made(models=MODELS, **options):
    return page(ServerInfo(versions(), models, False, Limits().public(), time.time() - 7300), **options)


def text_of(html):
    return " ".join(re.sub(r"<style>.*?</style>|<[^>]*>", " ", html, flags=re.DOTALL).split())


def test_it_says_what_there_is():
    text = text_of(made())
    assert "Replicas ready 2 of 5 Jobs running 2 Jobs waiting 15" in text
    assert "openai-community/gpt2 ready 1 of 1 1 3" in text
    assert "org/large @v2 partly ready 1 of 2 1 12" in text
    assert "org/late loading 0 of 1" in text
    assert "not available" in text
    assert f"PyTorch {versions().torch}" in text
    assert "Size of a job 256 MiB" in text
    assert "running for 2 hours" in text
    assert "None. nnsight deploy MODEL adds one." in text_of(made([]))


def test_names_are_text_and_nothing_comes_from_elsewhere():
    html = made()
    assert "<script" not in html
    assert "&lt;script&gt;alert(1)" in html
    assert not re.search(r"(?:src|href)\s*=|@import|url\(|https?://", html)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0 seconds"), (1, "1 second"), (119, "1 minute"), (7300, "2 hours"), (2e5, "2 days")]
)
def test_durations(seconds, text):
    assert since(seconds) == text


def test_its_headers_allow_nothing_else(site):
    answer = site.ask(None, "GET", "/")
    assert answer.headers["Content-Type"].startswith("text/html")
    assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
    assert answer.headers["Cache-Control"] == "no-store"


def test_it_names_no_users_and_no_jobs(site):
    job = site.submit("ann").json()["id"]
    html = site.ask(None, "GET", "/").text
    assert "Jobs waiting 1" in text_of(html)
    assert job not in html
    assert "ann" not in text_of(html)


# --- in a browser ---------------------------------------------------------------------------------------------


@pytest.fixture
def address(site):
    """The service on a port, and the paths that were asked for."""
    asked = []

    async def app(scope, receive, send):
        asked.append(scope.get("path"))
        await site.app(scope, receive, send)

    server = uvicorn.Server(uvicorn.Config(app, port=0, lifespan="off", log_config=None))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/", asked
    server.should_exit = True
    thread.join()


@pytest.mark.slow
def test_a_browser_shows_it_and_asks_for_nothing_else(site, address, browse):
    site.submit("ann")
    url, asked = address
    dom = browse("--dump-dom", url)
    assert re.search(r'id="waiting">1<', dom)
    assert '<th scope="row">m</th>' in dom
    assert set(asked) <= {"/", "/favicon.ico"}


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "number", "back"), [("light", 1, (251, 251, 250)), ("dark", 0, (20, 22, 26))])
def test_it_is_light_or_dark_as_the_reader_wants(address, browse, tmp_path, scheme, number, back):
    url, _ = address
    picture = tmp_path / f"{scheme}.png"
    browse(f"--blink-settings=preferredColorScheme={number}", f"--screenshot={picture}", "--window-size=900,700", url)
    pixels = Image.open(picture).convert("RGB")
    assert pixels.getpixel((5, 5)) == back
    lightness = sorted(sum(pixel) / 3 for pixel in set(pixels.crop((0, 30, 900, 500)).get_flattened_data()))
    assert lightness[-1] - lightness[0] > 180  # the text stands out


@pytest.mark.slow
@pytest.mark.parametrize("width", [360, 500, 1400])
def test_it_fits_the_window(browse, tmp_path, width):
    file = tmp_path / "page.html"
    measure = (
        "<script>document.title = document.documentElement.scrollWidth <= innerWidth ? 'fits' : 'too wide'</script>"
    )
    file.write_text(made().replace("</body>", f"{measure}</body>"))
    frame = tmp_path / "frame.html"  # a window of a browser has a least width, a frame has none
    tell = 'onload="document.title = this.contentDocument.title"'
    frame.write_text(f'<iframe src="page.html" style="width:{width}px;height:600px;border:0" {tell}></iframe>')
    dom = browse("--allow-file-access-from-files", "--virtual-time-budget=2000", "--dump-dom", frame.as_uri())
    assert "<title>fits</title>" in dom
