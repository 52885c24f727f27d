"""A Hugging Face cache that holds one small trained model under GPT-2's names, and no network."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

# huggingface_hub reads these when it is imported, and so do the processes that tests start.
HF_HOME = Path(tempfile.mkdtemp(prefix="nnsight-tests-"))
for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "TRANSFORMERS_CACHE", "HF_TOKEN"):
    os.environ.pop(variable, None)
os.environ |= {
    "HF_HOME": str(HF_HOME),
    "HF_HUB_CACHE": str(HF_HOME / "hub"),
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "XDG_CONFIG_HOME": str(HF_HOME / "config"),  # no login of the person who runs the tests
}
os.environ.setdefault("OMP_NUM_THREADS", "1")  # models this small run faster on one core than threads start

if TYPE_CHECKING:
    from nnsight import LanguageModel

LANDMARKS = Path(__file__).parents[1] / "src" / "nnsight" / "_bundled" / "landmarks"
HUB_NAMES = ("openai-community/gpt2", "gpt2")
REVISION = "0" * 40


@pytest.fixture(scope="session", autouse=True)
def hub_cache() -> Path:
    """The hub cache: `from_pretrained` of any of `HUB_NAMES` loads the bundled model from it."""
    hub = HF_HOME / "hub"
    for name in HUB_NAMES:
        repository = hub / f"models--{name.replace('/', '--')}"
        snapshot = repository / "snapshots" / REVISION
        snapshot.mkdir(parents=True)
        for file in LANDMARKS.glob("*"):
            (snapshot / file.name).symlink_to(file)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(REVISION)
    return hub


@pytest.fixture(scope="session")
def gpt2(hub_cache: Path) -> "LanguageModel":
    from nnsight import LanguageModel

    return LanguageModel("openai-community/gpt2")


class Server:
    """`nnsight serve` in a process of its own."""

    def __init__(self, folder: Path, names: tuple[str, ...], options: tuple[str, ...]) -> None:
        access = () if "--api-keys" in options else ("--no-auth-on-loopback",)
        command = [sys.executable, "-m", "nnsight", "serve", *names, "--port", "0", "--data", str(folder)]
        self.process = subprocess.Popen([*command, *access, *options], stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.startswith("nnsight serves at "), line
        self.host = line.split()[-1]

    def wait_for(self, *names: str, seconds: float = 280) -> None:
        """Until these models take jobs."""
        import nnsight

        deadline = time.monotonic() + seconds
        while not all(nnsight.is_model_running(name) for name in names):
            assert time.monotonic() < deadline
            assert self.process.poll() is None
            time.sleep(0.1)

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(30)
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture(scope="session")
def start_server(hub_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Server]]:
    """Starts servers, which end with the tests: `start_server("gpt2", "--trusted")`."""
    servers: list[Server] = []

    def start(*arguments: str, folder: Path | None = None) -> Server:
        first = next((i for i, argument in enumerate(arguments) if argument.startswith("--")), len(arguments))
        folder = folder or tmp_path_factory.mktemp("server")
        servers.append(Server(folder, arguments[:first], arguments[first:]))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))), None)
_QUIET = (
    "headless no-sandbox disable-gpu no-first-run disable-background-networking disable-component-update disable-sync"
)


@pytest.fixture
def browse(tmp_path: Path) -> Callable[..., str]:
    """Runs a headless browser, `browse("--dump-dom", url)`, and gives what it prints."""
    if BROWSER is None:
        pytest.skip("there is no Chromium on this machine (`make browser` installs it where it may)")

    def run(*arguments: str) -> str:
        folder = tempfile.mkdtemp(dir=tmp_path)
        command = [BROWSER, *(f"--{option}" for option in _QUIET.split()), f"--user-data-dir={folder}", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout

    return run


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def pytest_unconfigure() -> None:
    shutil.rmtree(HF_HOME, ignore_errors=True)
