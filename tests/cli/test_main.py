"""The command line itself: versions, and errors in one line."""

import subprocess
import sys

import pytest

import nnsight
from nnsight.cli import main


def fails(capsys, *arguments):
    assert main(arguments) == 2
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if line.strip() and not line.startswith("Loading weights")]
    assert len(lines) == 1
    assert lines[0].startswith("nnsight: ")
    return lines[0]


@pytest.mark.parametrize("arguments", [["--nope"], ["nope"], ["demo", "--nope"], ["demo", "--out"]])
def test_arguments_it_does_not_know(capsys, arguments):
    assert "nnsight" in fails(capsys, *arguments)


def test_no_such_model(capsys, tmp_path):
    folder = tmp_path / "nothing"
    assert str(folder) in fails(capsys, "demo", "--model", str(folder), "--out", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_no_such_bundled_model(capsys, tmp_path):
    assert "nnsight/nope" in fails(capsys, "demo", "--model", "nnsight/nope", "--out", str(tmp_path))


def test_model_of_another_family(capsys, small_neox, tmp_path):
    message = fails(capsys, "demo", "--model", small_neox, "--out", str(tmp_path))
    assert "transformer.h" in message
    assert "GPTNeoXForCausalLM" in message


def test_empty_prompt(capsys, small_gpt2, tmp_path):
    assert "no tokens" in fails(capsys, "demo", "--model", small_gpt2, "--out", str(tmp_path), "--prompt", "")


def test_folder_that_cannot_be_made(capsys, small_gpt2, tmp_path):
    (tmp_path / "file").touch()
    out = str(tmp_path / "file" / "out")
    assert out in fails(capsys, "demo", "--model", small_gpt2, "--out", out)


def test_folder_that_cannot_be_written(capsys, small_gpt2, tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda *_: False)  # permissions do not bind root
    message = fails(capsys, "demo", "--model", small_gpt2, "--out", str(tmp_path))
    assert message == f"nnsight: {tmp_path}: Permission denied"


def test_version(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out == f"nnsight {nnsight.__version__}\n"


def test_without_a_command_it_says_what_there_is(capsys):
    assert main([]) == 0
    assert "demo" in capsys.readouterr().out


@pytest.mark.parametrize(("arguments", "code"), [(["--version"], 0), (["demo", "--nope"], 2)])
def test_module_runs_the_command(arguments, code):
    done = subprocess.run([sys.executable, "-m", "nnsight", *arguments], capture_output=True, text=True)
    assert done.returncode == code
    assert "Traceback" not in done.stderr


def test_reader_that_goes_away(small_gpt2, tmp_path):
    command = [sys.executable, "-m", "nnsight", "demo", "--model", small_gpt2, "--out", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    _, error = process.communicate()
    assert process.returncode == 1
    assert "Traceback" not in error
    assert "BrokenPipe" not in error
