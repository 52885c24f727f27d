"""Two workers, one for this package and one for its peer, each in an environment of its own."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LANDMARKS = ROOT / "src" / "nnsight" / "_bundled" / "landmarks"
PEER = "nnsight==0.8.1"
PEER_VENV = ROOT / ".venv-peer"
CLOCK = "NNSIGHT_BENCHMARK_CLOCK"  # "cpu" where the machine does other work meanwhile: handed to the workers

clock = time.process_time if os.environ.get(CLOCK) == "cpu" else time.perf_counter


class Worker:
    """A worker process."""

    def __init__(self, script, python, folder, source=None):
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
        if source is not None:
            environment["PYTHONPATH"] = str(source)
        command = [str(python), str(Path(script).resolve()), "--worker", "--model", folder]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)
        self._answer()

    def ask(self, question):
        """The answer to one line of JSON."""
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self):
        self._process.stdin.close()
        self._process.wait()

    def _answer(self):
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("a worker ended early; its error stands above")
        return json.loads(line)


def peer_python(given):
    """The interpreter of the peer's environment, which is made if it is not there."""
    if given:
        return given
    python = PEER_VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    package, version = PEER.split("==")
    test = f"import importlib.metadata as m; assert m.version({package!r}) == {version!r}"
    if not python.exists() or subprocess.run([python, "-c", test], capture_output=True).returncode:
        print(f"making {PEER_VENV.name} with {PEER}", file=sys.stderr)
        lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
        pins = [line for line in lines if line.startswith(("torch==", "transformers=="))]
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", PEER, *pins]
        for command in ([sys.executable, "-m", "venv", PEER_VENV], pip):
            if subprocess.run(command).returncode:
                raise SystemExit(f"{PEER} could not be installed; --no-peer measures this package alone")
    return python
