"""Bodies typed at a prompt, piped in, and stepped through with a debugger."""

MODEL = """
import torch
from nnsight import NNsight
_ = torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU(), torch.nn.Linear(2, 1))
model = NNsight(net)
x = torch.ones(3, 2)
"""


def test_prompt(python):
    typed = """
with model.trace(x) as tracer:
    hidden = model[0].output.save()
    model[1].output[:] = 0
    out = tracer.result.save()

print("read", torch.equal(hidden, net[0](x)))
print("edited", torch.equal(out, net[2](torch.zeros(3, 2))))
with model.trace(x): one = model[0].output

print("one line", torch.equal(one, hidden))
with model.trace(x):
    late = model[2].output
    model[0].output = x

print("still here")
"""
    done = python("-i", "-q", stdin=MODEL + typed)
    assert done.returncode == 0
    assert done.stdout.splitlines() == ["read True", "edited True", "one line True", "still here"]
    assert done.stderr.count("Traceback") == 1
    assert "OutOfOrderError" in done.stderr
    assert "line 3 of <stdin>" in done.stderr


def test_standard_input(python):
    typed = """
with model.trace(x):
    hidden = model[0].output
print(torch.equal(hidden, net[0](x)))
"""
    done = python("-", stdin=MODEL + typed)
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr


def test_command_line(python):
    done = python("-c", MODEL + "with model.trace(x): print(torch.equal(model[0].output, net[0](x)))")
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr


def test_debugger_stops_in_the_body(python):
    script = (
        MODEL
        + """
with model.trace(x):
    hidden = model[0].output
    total = 40 + hidden.shape[1]
    model[1].output = hidden * 0
    out = model.output
print("end", out.shape[0])
"""
    )
    line = script.lstrip().splitlines().index("    total = 40 + hidden.shape[1]") + 1
    commands = f"""
        break {line}
        continue
        p "shape", tuple(hidden.shape)
        next
        p "total", total
        p "read here", tuple(model[1].output.shape)
        next
        p "sum", float(model[1].output.sum())
        where
        continue
        quit
        """
    done = python("-m", "pdb", "script.py", script=script, stdin=commands)
    assert f"script.py({line})<module>()" in done.stdout, done.stdout + done.stderr
    assert "('shape', (3, 2))" in done.stdout
    assert "('total', 42)" in done.stdout
    assert "('read here', (3, 2))" in done.stdout
    assert "('sum', 0.0)" in done.stdout
    assert "end 3" in done.stdout


def test_debugger_called_from_the_body(python):
    script = (
        MODEL
        + """
with model.trace(x):
    hidden = model[0].output
    breakpoint()
    out = model.output
print("end", out.shape[0])
"""
    )
    done = python("script.py", script=script, stdin="p 'rows', hidden.shape[0]\ncontinue\n")
    assert "('rows', 3)" in done.stdout, done.stdout + done.stderr
    assert "end 3" in done.stdout


def test_debugger_steps_into_the_model(python):
    script = """
import torch
from nnsight import NNsight

class Twice(torch.nn.Module):
    def forward(self, x):
        secret = x * 2
        return secret

model = NNsight(torch.nn.Sequential(Twice(), Twice()))
with model.trace(torch.ones(1)):
    first = model[0].output
    second = model[1].output
print("end", second.item())
"""
    line = script.lstrip().splitlines().index("        return secret") + 1
    commands = f"""
        break {line}
        continue
        p "first", secret.item()
        continue
        p "second", secret.item()
        continue
        quit
        """
    done = python("-m", "pdb", "script.py", script=script, stdin=commands)
    assert "('first', 2.0)" in done.stdout, done.stdout + done.stderr
    assert "('second', 4.0)" in done.stdout
    assert "end 4.0" in done.stdout


def test_traceback_of_a_program(python):
    script = (
        MODEL
        + """
with model.trace(x):
    hidden = model[0].output
    hidden @ torch.ones(7, 7)
"""
    )
    done = python("script.py", script=script)
    assert done.returncode == 1
    assert "hidden @ torch.ones(7, 7)" in done.stderr
    assert done.stderr.count("  File ") == 1


def test_debug_setting_shows_every_frame(python, environment):
    script = MODEL + "with model.trace(x):\n    model[2].output\n    model[0].output = x\n"
    plain = python("script.py", script=script)
    environment["NNSIGHT_DEBUG"] = "1"
    full = python("script.py", script=script)
    assert plain.stderr.count("  File ") == 1
    assert full.stderr.count("  File ") > 2


def test_strict_order_from_the_environment(python, environment):
    script = MODEL + "with model.trace(x):\n    model[2].output\n    model[0].output\n"
    environment["NNSIGHT_STRICT_ORDER"] = "1"
    done = python("script.py", script=script)
    assert "OutOfOrderError" in done.stderr
    environment["NNSIGHT_STRICT_ORDER"] = "0"
    done = python("script.py", script=script)
    assert done.returncode == 0
    assert done.stderr.count("OutOfOrderWarning") == 1


def test_interrupt_from_the_keyboard(python):
    script = (
        MODEL
        + """
import os, signal

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have had it ignored

class Slow(torch.nn.Module):
    def forward(self, x):
        os.kill(os.getpid(), signal.SIGINT)
        return x + 1

net = torch.nn.Sequential(torch.nn.Linear(2, 2), Slow(), torch.nn.Linear(2, 2))
model = NNsight(net)
before = [dict(vars(module)) for module in net.modules()]
try:
    with model.trace(x):
        model[0].output
        model[2].output
except KeyboardInterrupt:
    print("interrupted", before == [dict(vars(module)) for module in net.modules()])
try:
    with model.trace(x):
        model[0].output
        os.kill(os.getpid(), signal.SIGINT)
except KeyboardInterrupt:
    print("interrupted", before == [dict(vars(module)) for module in net.modules()])
"""
    )
    done = python("script.py", script=script)
    assert done.stdout == "interrupted True\ninterrupted True\n", done.stderr


def test_exit_in_the_body_is_an_exit(python):
    script = MODEL + "with model.trace(x):\n    model[0].output\n    raise SystemExit(3)\n"
    done = python("script.py", script=script)
    assert (done.returncode, done.stderr) == (3, "")


def test_program_that_ends_in_the_middle_of_a_trace(python):
    script = (
        MODEL
        + """
tracer = model.trace(x)
tracer.__enter__()
hidden = model[0].output
print("end")
"""
    )
    done = python("script.py", script=script)
    assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", "")


def test_optimised_python(python):
    script = MODEL + "with model.trace(x):\n    hidden = model[0].output\nprint(torch.equal(hidden, net[0](x)))\n"
    done = python("-OO", "-W", "ignore", "script.py", script=script)
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr
