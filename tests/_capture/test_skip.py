"""Skipping leaves debuggers, coverage and profilers as they were."""

import json
import re
import sys
import threading

import pytest

from nnsight._capture import is_skip, skip_body


class Skip:
    def __enter__(self):
        skip_body(sys._getframe(1))

    def __exit__(self, exc_type, exc, traceback):
        self.at_exit = sys.gettrace()
        return is_skip(exc_type)


def state(frame):
    return frame.f_trace, frame.f_trace_lines, frame.f_trace_opcodes, sys.gettrace()


@pytest.fixture
def untraced():
    before = sys.gettrace()
    sys.settrace(None)
    yield
    sys.settrace(before)


@pytest.mark.usefixtures("untraced")
class TestTracers:
    def test_none(self):
        def call():
            frame, skip = sys._getframe(), Skip()
            before = state(frame)
            with skip:
                raise AssertionError
            assert state(frame) == before
            assert skip.at_exit is None

        call()
        assert sys.gettrace() is None

    @pytest.mark.parametrize("lines", [True, False])
    @pytest.mark.parametrize("opcodes", [True, False])
    def test_python(self, lines, opcodes):
        def trace(frame, event, arg):
            if frame.f_code is call.__code__:
                frame.f_trace_lines, frame.f_trace_opcodes = lines, opcodes
            return trace

        def call():
            frame, skip = sys._getframe(), Skip()
            before = state(frame)
            with skip:
                raise AssertionError
            assert state(frame) == before
            assert skip.at_exit is trace
            assert before[0] is trace

        sys.settrace(trace)
        try:
            call()
            assert sys.gettrace() is trace
        finally:
            sys.settrace(None)

    def test_events_are_those_of_an_empty_body(self):
        def events(manager):
            def trace(frame, event, arg):
                if frame.f_code is call.__code__ or frame.f_code is type(manager).__exit__.__code__:
                    log.append((frame.f_code.co_name, frame.f_lineno - frame.f_code.co_firstlineno, event))
                return trace

            def call():
                with manager:
                    pass
                return 1

            log = []
            sys.settrace(trace)
            try:
                call()
            finally:
                sys.settrace(None)
            return [entry for entry in log if entry[:2] != ("call", 2)]  # the line of the body

        class Native(Skip):
            def __enter__(self):
                pass

        native, skipped = events(Native()), events(Skip())
        # Python 3.10 to 3.13 go back to the line of the `with` on leaving it, for no code of the user's
        back = ("call", 1, "line")
        assert [entry for entry in skipped if entry != back] == [entry for entry in native if entry != back]

    def test_enter_that_raises_after_all(self):
        class Raises(Skip):
            def __enter__(self):
                skip_body(sys._getframe(1))
                raise KeyError

        def call():
            frame = sys._getframe()
            before = state(frame)
            try:
                with Raises():
                    raise AssertionError
            except KeyError:
                pass
            x = 1
            assert state(frame) == before
            return x

        def trace(frame, event, arg):
            return trace

        assert call() == 1
        sys.settrace(trace)
        try:
            assert call() == 1
            assert sys.gettrace() is trace
        finally:
            sys.settrace(None)

    def test_profilers_stay(self):
        calls = []

        def profile(frame, event, arg):
            if event == "call":
                calls.append(frame.f_code.co_name)

        def after():
            pass

        sys.setprofile(profile)
        try:
            with Skip():
                raise AssertionError
            after()
            assert sys.getprofile() is profile
        finally:
            sys.setprofile(None)
        assert calls[-1] == "after"

    def test_only_the_thread_that_asked(self):
        body = threading.Event()
        inside, leave = threading.Event(), threading.Event()

        def shared(manager):
            with manager:
                body.set()
                inside.set()
                leave.wait(10)

        class Native:
            def __enter__(self):
                pass

            def __exit__(self, *_):
                pass

        other = threading.Thread(target=shared, args=(Native(),))
        other.start()
        inside.wait(10)
        body.clear()
        shared(Skip())
        assert not body.is_set()
        leave.set()
        other.join()


@pytest.mark.usefixtures("untraced")
def test_greenlets():
    greenlet = pytest.importorskip("greenlet")
    log = []

    def work(n):
        with Skip():
            raise AssertionError
        log.append(n)
        main.switch()
        with Skip():
            raise AssertionError
        log.append(n)

    main = greenlet.getcurrent()
    lets = [greenlet.greenlet(work) for _ in range(2)]
    for _ in range(2):
        for n, let in enumerate(lets):
            let.switch(n)
    assert log == [0, 1, 0, 1]


PROGRAM = """
def helper(n):
    return n + 1          # helper

def call():
    total = 0
    with Later(times=2) as n:
        total += helper(n)          # body
        if n == 5:
            total = "never"          # missed
        with Later():
            inner = total          # inner body
    after = total          # after
    return after          # returned

def other():
    return 1          # other

def unused():
    return 2          # unused

for _ in range(2):
    assert call() == 3
assert other() == 1          # last
"""

CORES = ["ctrace", "pytrace", *(["sysmon"] if sys.version_info >= (3, 12) else [])]


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("branch", [False, True])
def test_coverage(script, tmp_path, core, branch, monkeypatch):
    if core == "sysmon" and branch and sys.version_info < (3, 14):
        pytest.skip("coverage has no branches with sys.monitoring before Python 3.14")
    monkeypatch.setenv("COVERAGE_CORE", core)
    options = ["--branch"] if branch else []
    path, done = script(PROGRAM, "-W", "ignore", "-m", "coverage", "run", *options, f"--include={tmp_path}/*")
    assert done.returncode == 0, done.stderr
    report = tmp_path / "coverage.json"
    _, done = script(PROGRAM, "-m", "coverage", "json", "-o", str(report), stdin="")
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = (value for name, value in json.loads(report.read_text())["files"].items() if name.endswith("script.py"))
    lines = path.read_text("utf-8").splitlines()
    marked = {n: line.rpartition("# ")[2] for n, line in enumerate(lines, 1) if "          # " in line}
    missing = {marked[n] for n in found["missing_lines"]}
    assert missing == {"missed", "unused"}
    assert len(found["executed_lines"]) > len(marked)


def test_pdb(script):
    lines = PROGRAM.splitlines()
    offset = 5  # the lines of the prologue
    body = next(n for n, line in enumerate(lines, 1) if "# body" in line) + offset
    after = next(n for n, line in enumerate(lines, 1) if "# after" in line) + offset
    into_helper = [f"b {body}", f"b {after}", "c", "p 'total', total", "s", "s", "p 'in helper', n"]
    onwards = ["cl 1", "c", "p 'after', total", "n", "p 'returned', after", "cl 2", "c", "q", ""]
    commands = "\n".join(into_helper + onwards)
    _, done = script(PROGRAM, "-m", "pdb", stdin=commands)
    out = done.stdout
    assert "('total', 0)" in out, out + done.stderr
    assert "('in helper', 0)" in out, out
    assert "('after', 3)" in out, out
    assert "('returned', 3)" in out, out
    assert "_Skip" not in out
    assert "finished" in out or "restarted" in out


def test_pdb_steps_over_a_block(script):
    source = """
    def call():
        x = 1
        with Later():
            x = 2
        y = x
        return y
    assert call() == 2
    """
    start = 5 + 3
    commands = "\n".join([f"b {start}", "c", "n", "n", "p 'x', x", "n", "p 'y', y", "c", "q", ""])
    _, done = script(source, "-m", "pdb", stdin=commands)
    stops = re.findall(r"script\.py\((\d+)\)call\(\)", done.stdout)
    assert "_Skip" not in done.stdout
    assert "('x', 2)" in done.stdout, done.stdout
    assert "('y', 2)" in done.stdout, done.stdout
    assert [int(line) - start for line in stops] == [0, 1, 3, 4]


def test_python_prompt(script):
    """`python` without a file keeps the source since 3.13, and says so before."""
    _, done = script("", "-i", "-q", stdin=open_script())
    if sys.version_info >= (3, 13):
        assert "the value is 5" in done.stdout, done.stderr
    else:
        assert "not available" in done.stderr
        assert "for step in tracer.iter[...]" in done.stderr


def open_script():
    from pathlib import Path

    text = Path(__file__).with_name("conftest.py")
    return f"""\
import importlib.util
spec = importlib.util.spec_from_file_location("later", {str(text)!r})
later = importlib.util.module_from_spec(spec)
spec.loader.exec_module(later)
with later.Later():
    x = 5

print("the value is", x)
"""


def test_script_by_name(script):
    _, done = script(PROGRAM)
    assert done.returncode == 0, done.stderr
