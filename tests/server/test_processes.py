"""Confined processes that run jobs one after the other, always of one user, or at once, for forwards of several users."""

from __future__ import annotations

import math
import os
import signal
import socket
import threading
import time

import numpy
import pytest
import torch

from nnsight import LanguageModel
from nnsight.protocol import Answer, Decoder, read_outcome, read_tensors
from nnsight.remote._open import _embedded
from nnsight.sandbox import JOB, OTHER, PLAIN, STAYS, Pipe
from nnsight.server._app import TooLargeError
from nnsight.server._kept import Forked
from nnsight.server._limits import Limits
from nnsight.server._process import ConfinedRunner
from nnsight.server._replica import DiedError

NAME = "nnsight/landmarks"
HERE = {"backend": "local-process", "blocking": False}
PROMPTS = ["The Eiffel Tower is in the city of", "The Brandenburg Gate is in the city of"]


@pytest.fixture(scope="module")
def runner():
    runner = ConfinedRunner(NAME, {}, Limits())
    runner.start()
    yield runner
    runner.close()


@pytest.fixture(scope="module")
def model():
    model = LanguageModel(NAME)
    with model.trace("Hello", **HERE) as job:
        model.lm_head.output.save()
    job.result()
    return model


@pytest.fixture(scope="module")
def frame_of(model):
    """The frame that a block is sent as."""
    service = _embedded[model._tree]._client._transport.app.state.service
    sent, submit = [], service.queue.submit

    def keep(owner, key, name, frame, *args, **options):
        sent.append(frame)
        raise TooLargeError("it was kept for a test")

    service.queue.submit = keep

    def frame_of(make, prompt=PROMPTS[0]):
        sent.clear()
        make(model, prompt)
        while not sent:
            time.sleep(0.005)
        return sent[0]

    yield frame_of
    service.queue.submit = submit


def values_of(answer):
    """The saved values and changes in an answer."""
    outcome, payload = read_outcome(answer)
    assert isinstance(outcome, Answer), outcome
    decoder = Decoder(read_tensors(outcome.tensors, payload), outcome.containers, ((), ()))
    return {name: decoder.decode(node) for name, node in outcome.names.items()}


def together(runner, frames):
    """What jobs of as many users leave."""
    return runner.run_together(frames, [f"user {number}" for number in range(len(frames))])


def check_equal(found, wanted):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(
            found[name], value, rtol=1e-5, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


# --- what blocks do that share ------------------------------------------------------------------------------------


def reads(model, prompt):
    with model.trace(prompt, **HERE):
        embedded = model.transformer.wte.output.save()
        hidden = model.transformer.h[3].output[0].save()
        attention = model.transformer.h[4].attn.output[0].save()
        logits = model.lm_head.output.save()


def reads_the_output(model, prompt):
    with model.trace(prompt, **HERE):
        logits = model.output.logits.save()
        best = logits[0, -1].argmax().item()
        found = [best].save()


def changes_in_place(model, prompt):
    with model.trace(prompt, **HERE):
        hidden = model.transformer.h[2].output[0]
        hidden[:, -1] = 0
        later = model.transformer.h[3].output[0]
        later[:, 0] *= 2
        later.save()
        logits = model.lm_head.output.save()


def assigns(model, prompt):
    with model.trace(prompt, **HERE):
        out = model.transformer.h[4].output
        model.transformer.h[4].output[0] = out[0] * 0.5
        logits = model.lm_head.output.save()


def assigns_what_it_was_shown(model, prompt):
    with model.trace(prompt, **HERE):
        before = model.transformer.h[1].mlp.output
        model.transformer.h[5].mlp.output = before + model.transformer.h[5].mlp.output
        logits = model.lm_head.output.save()


def assigns_inputs(model, prompt):
    with model.trace(prompt, **HERE):
        model.transformer.h[1].input = model.transformer.h[1].input * 2
        args, kwargs = model.transformer.h[2].inputs
        model.transformer.h[2].inputs = (args[0] * 2, *args[1:]), kwargs
        logits = model.output.logits.save()


def looks_at_the_input_at_the_output(model, prompt):
    with model.trace(prompt, **HERE):
        after = model.transformer.h[2].mlp.output.save()
        before = model.transformer.h[2].mlp.input.save()


def skips(model, prompt):
    with model.trace(prompt, **HERE):
        model.transformer.h[2].mlp.skip(model.transformer.h[2].mlp.input * 0.1)
        logits = model.lm_head.output.save()


def calls_modules(model, prompt):
    with model.trace(prompt, **HERE):
        hidden = model.transformer.h[5].output[0]
        early = model.lm_head(model.transformer.ln_f(hidden)).save()


def needs_gradients(model, prompt):
    with model.trace(prompt, **HERE):
        hidden = model.transformer.h[1].output[0]
        hidden[:, -1] += 1
        logits = model.lm_head.output.detach().save()


def without_gradients(model, prompt):
    with torch.no_grad(), model.trace(prompt, **HERE):
        hidden = model.transformer.h[1].output[0].save()
        print(hidden)


def in_inference_mode(model, prompt):
    with torch.inference_mode(), model.trace(prompt, **HERE):
        model.transformer.h[1].output[0][:, -1] = 0
        logits = model.lm_head.output.save()


def several_rows(model, prompt):
    with model.trace([prompt, prompt], **HERE):
        model.transformer.h[1].output[0][1] = 0
        logits = model.lm_head.output.save()


def asks_for_nothing(model, prompt):
    with model.trace(prompt, **HERE):
        found = [1, 2].save()


SHARED = [
    *(reads, reads_the_output, changes_in_place, assigns, assigns_what_it_was_shown, assigns_inputs),
    *(looks_at_the_input_at_the_output, skips, calls_modules, needs_gradients, without_gradients),
    *(in_inference_mode, several_rows, asks_for_nothing),
]


def silent(_event):
    """What happens is not looked at."""


def alone_of(runner, frame):
    return values_of(runner.run(frame, silent, ""))


@pytest.mark.parametrize("make", SHARED, ids=lambda make: make.__name__)
def test_a_block_gets_what_it_gets_alone(runner, frame_of, make):
    """Beside one that changes everything in its rows."""
    frames = [
        frame_of(changes_in_place, PROMPTS[0]),
        frame_of(make, PROMPTS[0]),
        frame_of(changes_in_place, PROMPTS[0]),
    ]
    shared = together(runner, frames)
    assert None not in shared.answers
    check_equal(values_of(shared.answers[1]), alone_of(runner, frames[1]))


def test_sixteen_blocks_on_prompts_of_several_lengths(runner, frame_of):
    makes = [*SHARED, reads, assigns]
    frames = [frame_of(make, PROMPTS[number % 2]) for number, make in enumerate(makes)]
    shared = together(runner, frames)
    assert None not in shared.answers
    for frame, answer in zip(frames, shared.answers, strict=True):
        check_equal(values_of(answer), alone_of(runner, frame))


def test_prints_go_to_their_own_job(runner, frame_of):
    def says(word):
        def make(model, prompt):
            with model.trace(prompt, **HERE):
                print(word, model.lm_head.output.shape[0])

        return make

    shared = together(runner, [frame_of(says("one")), frame_of(says("two"))])
    assert [[event.text for event in events] for events in shared.events] == [["one 1\n"], ["two 1\n"]]


# --- what cannot be right there is run alone -----------------------------------------------------------------------


def reads_another_way(model, prompt):
    with model.trace(prompt, **HERE):
        found = [(lambda value: value * 2)(model.transformer.h[0].output[0])].save()


def shows_a_tensor(model, prompt):
    """Its text says how it was computed."""
    with model.trace(prompt, **HERE):
        print(model.transformer.h[0].output[0])


def reads_too_late(model, prompt):
    with model.trace(prompt, **HERE):
        later = model.transformer.h[5].output[0].save()
        earlier = model.transformer.h[2].output[0].save()


def reads_again(model, prompt):
    with model.trace(prompt, **HERE):
        one = model.transformer.h[2].output[0].save()
        two = model.transformer.h[5].output[0].save()
        again = model.transformer.h[2].output[0].save()


def assigns_the_input_after_the_output(model, prompt):
    with model.trace(prompt, **HERE):
        after = model.transformer.h[2].mlp.output
        model.transformer.h[2].mlp.input = model.transformer.h[2].mlp.input * 2
        logits = model.lm_head.output.save()


def looks_at_the_input_again(model, prompt):
    with model.trace(prompt, **HERE):
        one = model.transformer.h[2].mlp.input.save()
        hidden = model.transformer.h[2].mlp.c_fc.output.save()
        two = model.transformer.h[2].mlp.input.save()


def asks_for_a_later_call(model, prompt):
    with model.trace(prompt, **HERE):
        first = model.transformer.h[2].mlp.act.next().output.save()


def asks_for_an_operation(model, prompt):
    with model.trace(prompt, **HERE):
        pattern = model.layers[2].attn.pattern.save()


def changes_what_another_value_lies_in(model, prompt):
    """The same tensor at two places: what was saved at the first changes with the second."""
    with model.trace(prompt, **HERE):
        saved = model.transformer.h[0].output[0].save()
        model.transformer.h[1].input[:] = 0


def changes_what_has_passed(model, prompt):
    with model.trace(prompt, **HERE):
        hidden = model.transformer.h[0].output[0]
        model.transformer.h[3].output[0].save()
        hidden[:] = 0
        model.lm_head.output.save()


def looks_at_an_object(model, prompt):
    with model.trace(prompt, **HERE):
        kwargs = model.transformer.h[0].inputs[1]
        args = model.transformer.h[0].inputs[0]
        found = [str(value) for value in [*args, *kwargs.values()] if value is not None]


def exchanges_a_part(model, prompt):
    with model.trace(prompt, **HERE):
        out = model.output
        out.logits = out.logits * 0
        logits = model.output.logits.save()


def sets_an_attribute(model, prompt):
    with model.trace(prompt, **HERE):
        model.transformer.h[0].attn.scale_attn_weights = False
        logits = model.lm_head.output.save()


def exchanges_a_module(model, prompt):
    with model.trace(prompt, **HERE):
        model.transformer.h[3].mlp = model.transformer.h[2].mlp
        logits = model.lm_head.output.save()


def changes_a_weight(model, prompt):
    with model.trace(prompt, **HERE):
        model.transformer.wpe.get_parameter("wei" + "ght").detach().mul_(0)
        logits = model.lm_head.output.save()


def draws_random_numbers(model, prompt):
    with model.trace(prompt, **HERE):
        noise = torch.empty(3).exponential_().save()
        logits = model.lm_head.output.save()


def fails(model, prompt):
    with model.trace(prompt, **HERE):
        wrong = model.lm_head.output @ torch.ones(3)


def never_runs(model, prompt):
    with model.trace(prompt, **HERE):
        model.transformer.drop.next().output.save()


def makes_a_shape_that_does_not_fit(model, prompt):
    with model.trace(prompt, **HERE):
        model.transformer.h[2].input = model.transformer.h[2].input[:, :, :5]
        logits = model.lm_head.output.save()


def makes_a_large_value(model, prompt):
    with model.trace(prompt, **HERE):
        model.transformer.h[2].mlp.output = torch.zeros(1, 10, 2**23)
        logits = model.lm_head.output.save()


ALONE = [
    *(reads_another_way, shows_a_tensor, assigns_the_input_after_the_output, looks_at_the_input_again),
    *(reads_too_late, reads_again, asks_for_a_later_call, asks_for_an_operation, changes_what_another_value_lies_in),
    *(changes_what_has_passed, looks_at_an_object, exchanges_a_part, sets_an_attribute, exchanges_a_module),
    *(changes_a_weight, draws_random_numbers, fails, never_runs, makes_a_shape_that_does_not_fit, makes_a_large_value),
]


@pytest.mark.parametrize("make", ALONE, ids=lambda make: make.__name__)
def test_what_needs_the_model_itself_is_run_alone_and_harms_nobody(runner, frame_of, make):
    frames = [frame_of(reads), frame_of(make), frame_of(changes_in_place)]
    shared = together(runner, frames)
    assert shared.answers[1] is None
    for number in (0, 2):
        check_equal(values_of(shared.answers[number]), alone_of(runner, frames[number]))


# --- never another value than alone ------------------------------------------------------------------------------------


def changes_what_stands_at_two_places(model, prompt):
    with model.trace(prompt, **HERE):
        saved = model.transformer.h[0].output[0].save()
        model.transformer.h[1].input[:] = 0
        logits = model.lm_head.output.save()


def changes_an_output_that_is_the_input(model, prompt):
    with model.trace(prompt, **HERE):
        after = model.transformer.drop.output
        after[:] = 0
        before = model.transformer.drop.input.save()


def changes_what_stands_for_a_skipped_call(model, prompt):
    with model.trace(prompt, **HERE):
        given = model.transformer.h[2].mlp.input.save()
        model.transformer.h[2].mlp.skip(given)
        model.transformer.h[2].mlp.output[:] = 0


def changes_what_it_has_put_there(model, prompt):
    with model.trace(prompt, **HERE):
        put = model.transformer.h[2].output[0] * 2
        model.transformer.h[2].output[0] = put
        model.transformer.h[3].attn.output[0].save()
        put[:] = 0
        logits = model.lm_head.output.save()


def changes_what_it_has_put_there_by_another_name(model, prompt):
    with model.trace(prompt, **HERE):
        put = (model.transformer.h[2].output[0] * 2).save()
        model.transformer.h[2].output[0] = put
        model.transformer.h[3].input[:] = 0


def changes_it_inside_of_the_layer(model, prompt):
    with model.trace(prompt, **HERE):
        put = model.transformer.h[2].output[0] * 1
        model.transformer.h[2].output[0] = put
        model.transformer.h[3].ln_1.input[:] = 0
        put.save()


def puts_another_type_there(model, prompt):
    with model.trace(prompt, **HERE):
        model.lm_head.output = model.lm_head.output.double()
        kind = [str(model.output.logits.dtype)].save()


def asks_whether_two_are_one(model, prompt):
    with model.trace(prompt, **HERE):
        same = [model.transformer.h[0].output[0] is model.transformer.h[1].input].save()


def asks_for_the_kind(model, prompt):
    with model.trace(prompt, **HERE):
        found = [torch.is_tensor(model.transformer.wpe.output)].save()


def asks_for_gradients(model, prompt):
    with model.trace(prompt, **HERE):
        model.transformer.h[2].output[0] = model.transformer.h[2].output[0] * 2
        found = [model.transformer.h[3].input.requires_grad].save()


def asks_for_the_seed(model, prompt):
    with model.trace(prompt, **HERE):
        found = [torch.initial_seed() > 0].save()
        model.lm_head.output.save()


def puts_one_that_lies_otherwise(model, prompt):
    with model.trace(prompt, **HERE):
        hidden = model.transformer.h[2].input
        model.transformer.h[2].input = hidden.permute(2, 1, 0).contiguous().permute(2, 1, 0)
        model.transformer.h[2].ln_1.input.reshape(-1)[:] = 0
        logits = model.lm_head.output.save()


def adds_the_input_at_the_output(model, prompt):
    with model.trace(prompt, **HERE):
        model.transformer.h[2].mlp.output = model.transformer.h[2].mlp.output + model.transformer.h[2].mlp.input
        logits = model.lm_head.output.save()


HARD = [
    *(changes_what_stands_at_two_places, changes_an_output_that_is_the_input, changes_what_stands_for_a_skipped_call),
    *(changes_what_it_has_put_there, changes_what_it_has_put_there_by_another_name, changes_it_inside_of_the_layer),
    *(puts_another_type_there, asks_whether_two_are_one, asks_for_the_kind, asks_for_gradients, asks_for_the_seed),
    *(puts_one_that_lies_otherwise, adds_the_input_at_the_output),
]


@pytest.mark.parametrize("other", PROMPTS, ids=["rows of a batch", "a forward of its own"])
@pytest.mark.parametrize("make", HARD, ids=lambda make: make.__name__)
def test_a_block_has_what_it_has_alone_or_is_run_alone(runner, frame_of, make, other):
    frames = [frame_of(make), frame_of(reads, other)]
    answers = together(runner, frames).answers
    for frame, answer in zip(frames, answers, strict=True):
        if answer is not None:
            check_equal(values_of(answer), alone_of(runner, frame))
    if make is adds_the_input_at_the_output:
        assert None not in answers


def test_one_that_prints_much_is_run_alone(runner, frame_of):
    def prints(model, prompt):
        with model.trace(prompt, **HERE):
            for _ in range(100):
                print("x" * 2000000)

    shared = together(runner, [frame_of(prints), frame_of(reads)])
    assert [answer is None for answer in shared.answers] == [True, False]
    assert not shared.events[0]


def makes_the_model_fail(model, prompt):
    with model.trace(prompt, **HERE):
        model.transformer.wte.input = model.transformer.wte.input + 10**6
        logits = model.lm_head.output.save()


def test_what_ends_the_forward_leaves_everybody_to_be_run_alone(runner, frame_of):
    frames = [frame_of(reads), frame_of(makes_the_model_fail)]
    assert together(runner, frames).answers == [None, None]
    again = together(runner, [frames[0], frames[0]])
    for answer in again.answers:
        check_equal(values_of(answer), alone_of(runner, frames[0]))


def test_a_host_that_has_died_is_started_again(runner, frame_of):
    frames = [frame_of(reads)] * 2
    assert None not in together(runner, frames).answers
    os.kill(runner._host.child, signal.SIGKILL)
    with pytest.raises(DiedError):
        together(runner, frames)
    assert None not in together(runner, frames).answers


def test_one_that_hangs_is_left_alone(runner, frame_of):
    """The others have their answers; the process of the one that hangs ends when the server says so."""

    def hangs(model, prompt):
        with model.trace(prompt, **HERE):
            model.transformer.h[0].output[0].save()
            for _ in range(10**12):
                pass

    for seconds, times in ((6, 1), (1, 2)):
        stop = threading.Timer(seconds, lambda times=times: [runner.stop() for _ in range(times)])
        stop.start()
        if times == 1:
            shared = together(runner, [frame_of(reads), frame_of(hangs)])
            assert [answer is None for answer in shared.answers] == [False, True]
        else:
            with pytest.raises(DiedError):
                together(runner, [frame_of(reads), frame_of(hangs)])
        stop.join()
        assert None not in together(runner, [frame_of(reads)] * 2).answers


# --- one after the other -----------------------------------------------------------------------------------------


@pytest.fixture
def kept(runner):
    """The processes that wait, by whose they are: none at first."""
    for owner in runner._kept.children():
        runner._end(runner._kept.take(owner))
    return runner._kept.children


def run(runner, frame, owner="ann"):
    return values_of(runner.run(frame, silent, owner))


def test_a_user_has_one_process_for_jobs_that_leave_nothing(runner, kept, frame_of):
    first = run(runner, frame_of(reads))
    children = kept()
    assert list(children) == ["ann"]
    run(runner, frame_of(changes_in_place))
    check_equal(run(runner, frame_of(reads)), first)
    assert kept() == children


def test_another_user_has_another_process(runner, kept, frame_of):
    for owner in ("ann", "bob"):
        run(runner, frame_of(reads), owner)
    children = kept()
    assert len(set(children.values())) == 2
    shared = runner.run_together([frame_of(reads), frame_of(changes_in_place)], ["bob", "ann"])
    assert None not in shared.answers
    assert kept() == children
    together = runner.run_together([frame_of(reads), frame_of(changes_in_place)], ["bob", "bob"])
    assert None not in together.answers
    assert kept() == children


def test_two_jobs_of_one_of_several_users_have_a_process_each(runner, kept, frame_of):
    shared = runner.run_together([frame_of(reads), frame_of(reads), frame_of(reads)], ["ann", "bob", "ann"])
    assert None not in shared.answers
    assert sorted(kept()) == ["ann", "bob"]


def alone(model, prompt):
    with model.trace(prompt, solo=True, **HERE):
        hidden = model.transformer.h[0].output[0].save()


def imports(model, prompt):
    with model.trace(prompt, **HERE):
        import math as other

        found = [other.pi].save()
        hidden = model.transformer.h[0].output[0].save()


def calls_another_library(model, prompt):
    with model.trace(prompt, **HERE):
        found = [float(numpy.pi)].save()
        hidden = model.transformer.h[0].output[0].save()


def sets_a_default(model, prompt):
    with model.trace(prompt, **HERE):
        torch.set_default_dtype(torch.float64)
        hidden = model.transformer.h[0].output[0].save()


def sets_something_of_the_library(model, prompt):
    with model.trace(prompt, **HERE):
        torch.pi = 3
        hidden = model.transformer.h[0].output[0].save()


def asks_the_tokenizer(model, prompt):
    with model.trace(prompt, **HERE):
        model.tokenizer.add_tokens(["zzz"])
        hidden = model.transformer.h[0].output[0].save()


def reaches_for_the_system(model, prompt):
    with model.trace(prompt, **HERE):
        found = [torch.os.getpid()].save()


def touches_a_weight(model, prompt):
    with model.trace(prompt, **HERE):
        model.transformer.h[0].get_parameter("ln_1.wei" + "ght").detach().mul_(1)
        hidden = model.transformer.h[0].output[0].save()


LEAVE = [alone, imports, calls_another_library, sets_a_default, sets_something_of_the_library, asks_the_tokenizer]
LEAVE += [reaches_for_the_system, touches_a_weight, sets_an_attribute, exchanges_a_module]


@pytest.mark.parametrize("make", LEAVE, ids=lambda make: make.__name__)
def test_what_may_leave_something_ends_its_process(runner, kept, frame_of, make):
    run(runner, frame_of(make))
    assert not kept()


def adds_a_module(model, prompt):
    with model.trace(prompt, **HERE):
        model.transformer.h[0].mlp.add_module("act", torch.nn.ReLU())
        logits = model.lm_head.output.save()


def writes_through_numpy(model, prompt):
    with model.trace(prompt, **HERE):
        model.transformer.wpe.get_parameter("wei" + "ght").detach().numpy()[:] = 0
        logits = model.lm_head.output.save()


def takes_from_the_library(model, prompt):
    with model.trace(prompt, **HERE):
        delattr(torch, "tanh")
        logits = model.lm_head.output.save()


def exchanges_a_function_of_the_library(model, prompt):
    with model.trace(prompt, **HERE):
        torch.tanh = torch.sin
        logits = model.lm_head.output.save()


NOT_PLAIN = [adds_a_module, writes_through_numpy, takes_from_the_library, exchanges_a_function_of_the_library]


@pytest.mark.parametrize("make", NOT_PLAIN, ids=lambda make: make.__name__)
def test_a_block_that_is_not_plain_ends_its_process(runner, kept, frame_of, make):
    first = run(runner, frame_of(reads), "bob")
    runner.run(frame_of(make), silent, "ann")
    assert list(kept()) == ["bob"]
    check_equal(run(runner, frame_of(reads)), first)


def test_what_a_process_says_after_its_job_is_not_believed(runner):
    """Its first word counts, which it says before the job's own code runs."""
    ours, theirs = socket.socketpair()
    for word, stays in ((OTHER, False), (PLAIN, True), (STAYS, False)):
        Pipe(theirs).send(word)
        Pipe(theirs).send(STAYS, b"answer")
        forked = Forked(0, ours, ours)
        assert runner._ask(forked, b"job", silent, JOB) == b"answer"
        assert forked.stays == stays
    ours.close()
    theirs.close()


def test_what_fails_or_draws_random_numbers_leaves_nothing_to_the_next(runner, kept, frame_of):
    first = run(runner, frame_of(reads))
    one = run(runner, frame_of(draws_random_numbers))["noise"]
    other = run(runner, frame_of(draws_random_numbers))["noise"]
    assert not torch.equal(one, other)
    runner.run(frame_of(fails), silent, "ann")
    check_equal(run(runner, frame_of(reads)), first)


def test_one_that_has_died_meanwhile_is_not_used(runner, kept, frame_of):
    first = run(runner, frame_of(reads))
    child = kept()["ann"]
    os.kill(child, signal.SIGKILL)
    time.sleep(0.2)
    check_equal(run(runner, frame_of(reads)), first)
    assert kept()["ann"] != child


def test_one_that_has_worked_much_is_not_kept(runner, kept, frame_of, monkeypatch):
    """Its time on the processors is limited once for all of its jobs."""
    monkeypatch.setattr("nnsight.server._kept._MOST_WORK", 0.0)
    run(runner, frame_of(reads))
    assert not kept()


@pytest.mark.parametrize(("field", "value"), [("since", -math.inf), ("worked", -1.0)])
def test_one_that_waits_for_long_or_works_meanwhile_is_ended(runner, kept, frame_of, field, value):
    run(runner, frame_of(reads))
    child = kept()["ann"]
    forked = runner._kept.take("ann")
    forked.stays = True
    runner._kept.keep(forked, "ann")
    setattr(forked, field, value)
    runner.start()
    assert not kept()
    deadline = time.monotonic() + 10
    while os.path.exists(f"/proc/{child}") and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not os.path.exists(f"/proc/{child}")


def test_it_is_ended_after_many_jobs_and_where_many_users_have_one(runner, kept, frame_of, monkeypatch):
    monkeypatch.setattr("nnsight.server._kept.MOST", 2)
    monkeypatch.setattr("nnsight.server._kept.MOST_JOBS", 3)
    frame = frame_of(reads)
    for owner in ("ann", "bob", "cid"):
        run(runner, frame, owner)
    assert sorted(kept()) == ["bob", "cid"]
    for _ in range(2):
        run(runner, frame, "cid")
    assert sorted(kept()) == ["bob"]
