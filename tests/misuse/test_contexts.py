"""Edits, sessions, caches and scans used as they are not meant."""

import pytest
import torch

from nnsight.errors import InputError, NeverRanError, NotTracingError, ScanError, StoppedError, UnknownPathError

pytestmark = pytest.mark.timeout(10, func_only=True)


# --- edits -------------------------------------------------------------------------------------------------


def test_an_edit_of_what_never_runs(model, x, refused):
    with model.edit() as edited:
        model.unused.output[:] = 0
    with refused(NeverRanError, r"model\.unused\.output was asked for at line \d+ of test_contexts.py"):
        with edited.trace(x):
            edited.output


def test_an_edit_that_fails(model, x, refused):
    with model.edit() as edited:
        model.first.output
        1 / 0
    with refused(ZeroDivisionError, "division"):
        with edited.trace(x):
            edited.output


def test_an_edit_with_an_unknown_name(model, x, refused):
    with model.edit() as edited:
        model.first.output = nowhere  # noqa: F821
    with refused(NameError, "'nowhere' is not defined"):
        with edited.trace(x):
            edited.output


def test_an_edit_that_is_stored_is_not_run_where_it_stands(model, x):
    ran = []
    with model.edit() as edited:
        ran.append(model.first.output)
    assert not ran
    with edited.trace(x):
        pass
    assert len(ran) == 1


def test_an_edit_inside_a_trace_is_for_later_traces(model, net, x):
    with model.trace(x):
        with model.edit() as edited:
            model.first.output[:] = 0
        output = model.output
    assert torch.equal(output, net(x))
    with edited.trace(x):
        hidden = edited.first.output
    assert not hidden.any()


def test_a_trace_inside_an_edit(model, net, x):
    with model.edit() as edited:
        with model.trace(x * 2):
            inner = model.first.output
        model.first.output[:] = inner
    with edited.trace(x):
        hidden = edited.first.output
    assert torch.equal(hidden, net.first(x * 2))


def test_a_stop_in_the_trace_of_an_edited_model(model, x, refused):
    with model.edit() as edited:
        model.first.output[:] = 0
    with refused(StoppedError, "read what you need before it"):
        with edited.trace(x) as tracer:
            tracer.stop()
            edited.first.output


# --- sessions ------------------------------------------------------------------------------------------------


def test_a_session_is_no_trace(model, x, refused):
    with refused(NotTracingError, "Values exist only while the model runs"):
        with model.session():
            model.first.output


def test_an_error_in_a_session(model, x, refused):
    done = []
    with refused(ZeroDivisionError, "division"):
        with model.session():
            with model.trace(x):
                done.append(model.first.output)
            with model.trace(x):
                model.first.output
                1 / 0
            done.append("never")
    assert len(done) == 1


def test_sessions_inside_each_other(model, net, x):
    with model.session():
        with model.session():
            with model.trace(x):
                hidden = model.first.output
    assert torch.equal(hidden, net.first(x))


# --- caches --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("modules", [["frist"], [3], [torch.nn.Linear(1, 1)], ["model.first.nothing"]], ids=repr)
def test_what_is_no_module_of_the_model(model, x, refused, modules):
    with refused(UnknownPathError, "The model has no module|is not a module of the model"):
        with model.trace(x) as tracer:
            tracer.cache(modules=modules)


def test_a_cache_of_nothing(model, x, refused):
    with refused(InputError, "leave include_output=True, or set include_inputs=True"):
        with model.trace(x) as tracer:
            tracer.cache(include_output=False)


def test_what_a_cache_does_not_have(model, x, refused):
    with model.trace(x) as tracer:
        cache = tracer.cache(modules=[model.first, model.unused])
        with refused(NeverRanError, r"it did not run after tracer\.cache\(\), which belongs before"):
            cache["model.first"].output
    with refused(NeverRanError, r"ask for it with tracer\.cache\(include_inputs=True\)"):
        cache["model.first"].inputs
    with refused(NeverRanError, "did not run"):
        cache["model.unused"].output
    with refused(UnknownPathError, "The closest are"):
        cache.model.frist
    with refused(UnknownPathError, "The closest are"):
        cache["model.frist"]
    with refused(NeverRanError, r"Name it in tracer\.cache\(modules=\[\.\.\.\]\)"):
        cache["model.last"].output


def test_a_cache_that_comes_too_late(model, x, refused):
    with model.trace(x) as tracer:
        model.last.output
        cache = tracer.cache(modules=[model.first])
    with refused(NeverRanError, "which belongs before what the model is to run"):
        cache["model.first"].output


# --- scans ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use", [float, bool, lambda value: value.item(), lambda value: value.tolist()])
def test_numbers_in_a_scan(model, x, refused, use):
    with refused(ScanError, r"depends on numbers, and a scan computes shapes only.*or use trace\(\)"):
        with model.scan(x):
            use(model.first.output.sum())
