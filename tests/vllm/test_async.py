"""Traces awaited and streamed in an event loop, several at a time; what is cancelled; and engines that die."""

import asyncio
import contextlib
import linecache
import os
import signal
import threading
import time

import pytest
import torch

import nnsight
from nnsight.errors import (
    CaptureError,
    EditError,
    EngineError,
    InputError,
    JobCancelledError,
    NotSavedError,
    NotTracingError,
    RemoteError,
)

from .generations import close, plainly, same, steered

TOWER, FRANCE, ROME = "The Eiffel Tower is in the city of", "The capital of France is", "The Colosseum"
PROMPTS = (TOWER, FRANCE, ROME)
LONG = 100  # tokens, enough to be cut short
LIMIT = 60  # seconds that nothing here takes; what hangs fails


def run(work, limit=LIMIT):
    async def limited():
        return await asyncio.wait_for(work, limit)

    return asyncio.run(limited())


def in_time(call, limit=LIMIT):
    """Call in a thread, and give its outcome; what is still busy after `limit` seconds hangs."""
    outcome = []

    def main():
        try:
            outcome.append((call(), None))
        except BaseException as error:
            outcome.append((None, error))

    thread = threading.Thread(target=main, daemon=True)
    thread.start()
    thread.join(limit)
    assert outcome, f"hangs after {limit} seconds"
    value, error = outcome[0]
    if error is not None:
        raise error
    return value


async def awaited(model, prompt, factor, count):
    async with model.generate(prompt, max_tokens=count, min_tokens=count) as tracer:
        streams = [].save()
        for _ in tracer.iter[:]:
            model.resid_post[3][:] *= factor
            streams.append(model.resid_post[8])
        tokens = tracer.result.save()
    return streams, tokens


def send(model, prompt, factor=1.0, count=LONG):
    """A handle of a generation that goes on."""
    with model.generate(prompt, max_tokens=count, min_tokens=count, blocking=False) as job:
        shapes = [].save()
        for _ in job.iter[:]:
            model.resid_post[3][:] *= factor
            shapes.append(tuple(model.resid_post[8].shape))
        tokens = job.result.save()
    return job


class Mine(Exception):
    """An error of the user's own."""


def living(model):
    """What the worker has of jobs."""
    running = model._client.running()
    return running.call(running.ask("nnsight_living")).result(LIMIT)


def settle(model):
    deadline = time.monotonic() + LIMIT
    while any((found := living(model)).values()) or model._client.running().llm.get_num_unfinished_requests():
        assert time.monotonic() < deadline, found
        time.sleep(0.02)


def objects(model):
    """How many lanes, jobs and requests exist in the worker, while there is this one."""
    with model.trace(ROME):
        import gc

        gc.collect()
        kinds = [type(one).__name__ for one in gc.get_objects()]
        counts = {name: kinds.count(name) for name in ("Lane", "Job", "Run", "LanePass", "LaneTracer", "JobReader")}
        runner = next(one for one in gc.get_objects() if type(one).__name__ == "Engine").runner
        model.logits
        counts["requests"] = len(runner.requests)
        counts = counts.save()
    return counts


class TestTogether:
    def test_equal(self, gpt2):
        async def all_of_them():
            return await asyncio.gather(*(awaited(gpt2.engine, p, 1 + i / 10, 4 + i) for i, p in enumerate(PROMPTS)))

        for i, found in enumerate(run(all_of_them())):
            same(found, plainly(gpt2.plain, PROMPTS[i], 1 + i / 10, 4 + i))

    def test_in_the_same_steps(self, gpt2):
        model = gpt2.engine

        async def crowd(prompt):
            async with model.generate(prompt, max_tokens=60, ignore_eos=True) as tracer:
                import gc

                engine = next(one for one in gc.get_objects() if type(one).__name__ == "Engine")
                seen = [].save()
                for _ in tracer.iter[:]:
                    model.resid_post[0]
                    seen.append(engine.living()["of the step"])
            return max(seen)

        async def all_of_them():
            return await asyncio.gather(*map(crowd, PROMPTS))

        assert run(all_of_them()) == [3, 3, 3]

    def test_threads(self, gpt2):
        found = {}

        def one(prompt):
            found[prompt] = steered(gpt2.engine, prompt, 1.1, 5, max_tokens=5, min_tokens=5)

        threads = [threading.Thread(target=one, args=(prompt,), daemon=True) for prompt in PROMPTS]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(LIMIT)
        for prompt in PROMPTS:
            streams, tokens = plainly(gpt2.plain, prompt, 1.1, 5)
            close(found[prompt][0][-1], streams[-1])
            assert torch.equal(found[prompt][1], tokens)

    def test_beside_plain_ones(self, gpt2):
        model = gpt2.engine
        before = model.trace(list(PROMPTS), trace=False, max_tokens=20, ignore_eos=True)

        async def both():
            plain = asyncio.to_thread(model.trace, list(PROMPTS), trace=False, max_tokens=20, ignore_eos=True)
            return await asyncio.gather(awaited(model, TOWER, 1.5, 20), plain)

        (_, tokens), plain = run(both())
        assert [one.outputs[0].token_ids for one in plain] == [one.outputs[0].token_ids for one in before]
        assert torch.equal(tokens, plainly(gpt2.plain, TOWER, 1.5, 20)[1])

    def test_an_awaited_block_is_as_any_other(self, gpt2):
        model, factor = gpt2.engine, 0.5

        async def one():
            async with model.trace(TOWER):
                model.resid_post[2][:] *= factor
                stream = model.resid_post[4].save()
            async with model.trace() as tracer:
                with tracer.invoke(TOWER):
                    source = model.resid_post[6][:, -1]
                with tracer.invoke(ROME):
                    model.resid_post[6][:, -1] = source
                    logits = model.logits.save()
            return stream, logits

        stream, logits = run(one())
        with gpt2.plain.trace(TOWER):
            gpt2.plain.resid_post[2][:] *= factor
            expected = gpt2.plain.resid_post[4].save()
        close(stream, expected)
        with gpt2.plain.trace(TOWER):
            source = gpt2.plain.resid_post[6][:, -1].save()
        with gpt2.plain.trace(ROME):
            gpt2.plain.resid_post[6][:, -1] = source
            expected = gpt2.plain.logits.save()
        close(logits, expected)

    def test_functions_of_files_of_one_name(self, gpt2):
        """Jobs that run by turns have each the sources that they brought."""
        text = "{}def steer(model, tracer, streams):\n    with tracer.iter[:]:\n        model.resid_post[3][:] *= {}\n"
        text += "        streams.append(model.resid_post[8])\n"

        def define(before, factor):
            lines, name, space = text.format(before, factor).splitlines(keepends=True), "/mine/steering.py", {}
            linecache.cache[name] = (1, None, lines, name)
            exec(compile("".join(lines), name, "exec"), space)
            return space["steer"]

        async def one(model, steer):
            async with model.generate(TOWER, max_tokens=6, min_tokens=6) as tracer:
                streams = [].save()
                model.resid_post[0]  # others begin meanwhile
                steer(model, tracer, streams)
            return streams

        async def all_of_them():
            found = []
            for before, factor in (("", 1.1), ("import os\n\n", 0.9), ("", 1.3)):
                found.append(asyncio.ensure_future(one(gpt2.engine, define(before, factor))))
                await asyncio.sleep(0)  # it is sent with what the cache has now
            return await asyncio.gather(*found)

        for streams, factor in zip(run(all_of_them()), (1.1, 0.9, 1.3), strict=True):
            for found, value in zip(streams, plainly(gpt2.plain, TOWER, factor, 6)[0], strict=True):
                close(found, value)

    def test_what_is_written_wrongly(self, gpt2):
        model = gpt2.engine

        async def not_waiting():
            async with model.trace(TOWER, blocking=False):
                model.logits.save()

        async def not_last():
            async with model.trace(TOWER), contextlib.AsyncExitStack():
                model.logits.save()

        async def streamed():
            async with model.trace(TOWER) as tracer:
                model.logits.save()
            async for _ in tracer.stream():
                pass

        async def not_saved():
            async with model.trace(TOWER):
                logits = model.logits
            return logits.sum()

        async def twice():
            tracer = model.trace(TOWER)
            async with tracer:
                model.logits.save()
            async with tracer:
                model.logits.save()

        for wrong, error, match in (
            (not_waiting, CaptureError, "write `with` and await"),
            (not_last, CaptureError, "must come last"),
            (streamed, InputError, "blocking=False"),
            (not_saved, NotSavedError, "logits"),
            (twice, NotTracingError, "entered once"),
        ):
            with pytest.raises(error, match=match):
                run(wrong())


class TestStreams:
    def test_tokens_come_while_it_runs(self, gpt2):
        async def one():
            job = send(gpt2.engine, TOWER)
            pieces, early = [], 0
            async for piece in job.stream():
                early += job.status == "running"
                pieces.append(piece)
            values = await job
            assert (await job) is not None
            return pieces, early, values

        pieces, early, values = run(one())
        ids = [token for piece in pieces for token in piece.ids]
        count = len(gpt2.plain.tokenizer(TOWER)["input_ids"])
        assert early > 10
        assert len(ids) == LONG
        assert ids == values["tokens"][0, count:].tolist()
        assert torch.equal(values["tokens"], plainly(gpt2.plain, TOWER, 1.0, LONG)[1])
        assert values["shapes"] == [(1, count, 128), *[(1, 1, 128)] * (LONG - 1)]
        assert "".join(piece.text for piece in pieces).startswith(" Paris")

    def test_of_several_requests(self, gpt2):
        model = gpt2.engine

        async def one():
            with model.trace(max_tokens=6, ignore_eos=True, blocking=False) as job:
                with job.invoke(TOWER):
                    first = job.result.save()
                with job.invoke(FRANCE):
                    second = job.result.save()
            found = {0: [], 1: []}
            async for piece in job.stream():
                found[piece.request] += piece.ids
            return found, await job

        found, values = run(one())
        assert found == {0: values["first"][0, -6:].tolist(), 1: values["second"][0, -6:].tolist()}

    def test_a_thread_may_wait_for_what_was_sent(self, gpt2):
        job = send(gpt2.engine, TOWER, count=3)
        assert job.result(LIMIT)["tokens"].shape == (1, 13)
        assert job.status == "done"


class TestCancelled:
    """Nothing of it is left, and the others are as if it had never been."""

    @pytest.fixture
    def clean(self, gpt2):
        model = gpt2.engine
        settle(model)
        before = objects(model)
        yield
        settle(model)
        after = objects(model)
        assert after == before
        assert after["requests"] == 1

    async def beside(self, model, stop):
        other = asyncio.ensure_future(awaited(model, FRANCE, 1.1, 30))
        await stop()
        return await other

    def others(self, gpt2, found):
        streams, tokens = found
        expected, ids = plainly(gpt2.plain, FRANCE, 1.1, 30)
        close(streams[-1], expected[-1])
        assert torch.equal(tokens, ids)

    @pytest.mark.usefixtures("clean")
    def test_by_its_task(self, gpt2):
        model = gpt2.engine

        async def stop():
            begun = asyncio.ensure_future(awaited(model, TOWER, 1.0, LONG))
            await asyncio.sleep(0.3)
            begun.cancel()
            with pytest.raises(asyncio.CancelledError):
                await begun

        self.others(gpt2, run(self.beside(model, stop)))

    @pytest.mark.usefixtures("clean")
    def test_by_closing_its_stream(self, gpt2):
        model = gpt2.engine

        async def stop():
            job = send(model, TOWER)
            stream = job.stream()
            async for piece in stream:
                assert piece.ids
                break
            await stream.aclose()
            assert job.status == "cancelled"
            with pytest.raises(JobCancelledError, match=r"line \d+ of test_async.py was cancelled"):
                await job

        self.others(gpt2, run(self.beside(model, stop)))

    @pytest.mark.usefixtures("clean")
    def test_by_hand(self, gpt2):
        model = gpt2.engine

        async def stop():
            job = send(model, TOWER)
            stream = job.stream()
            await stream.__anext__()
            job.cancel()
            with pytest.raises(JobCancelledError):
                await job

        self.others(gpt2, run(self.beside(model, stop)))

    @pytest.mark.usefixtures("clean")
    def test_at_once(self, gpt2):
        """Before anything of it is known elsewhere, and at every moment after."""
        model = gpt2.engine

        async def stop():
            for pause in (0, 0.002, 0.005, 0.01, 0.02, 0.05):
                job = send(model, TOWER)
                await asyncio.sleep(pause)
                job.cancel()

        self.others(gpt2, run(self.beside(model, stop)))

    @pytest.mark.usefixtures("clean")
    def test_of_several_requests(self, gpt2):
        model = gpt2.engine

        async def stop():
            with model.trace(max_tokens=LONG, ignore_eos=True, blocking=False) as job:
                with job.invoke(TOWER):
                    for _ in job.iter[:]:
                        source = model.resid_post[3]
                with job.invoke(ROME):  # waits for the first
                    model.resid_post[3][:] += source.sum()
            async for _ in job.stream():
                job.cancel()
                break

        self.others(gpt2, run(self.beside(model, stop)))

    @pytest.mark.usefixtures("clean")
    def test_by_an_interrupt(self, gpt2):
        """As Ctrl-C does, where a thread waits."""
        model = gpt2.engine

        def interrupt(*_):
            raise KeyboardInterrupt

        before = signal.signal(signal.SIGALRM, interrupt)
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        try:
            with pytest.raises(KeyboardInterrupt):
                steered(model, TOWER, 1.0, LONG, max_tokens=LONG, ignore_eos=True)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        self.others(gpt2, steered(model, FRANCE, 1.1, 30, max_tokens=30, min_tokens=30))


class TestErrors:
    """Each ends its own trace, with the user's line; what runs beside it ends as it should."""

    def fails(self, gpt2, error, match, body):
        """`body` is tried in a loop, and in a thread, with another trace beside it."""
        model = gpt2.engine

        async def awaiting():
            other = asyncio.ensure_future(awaited(model, FRANCE, 1.1, 12))
            with pytest.raises(error, match=match) as caught:
                await body(model)
            return caught, await other

        caught, (_, tokens) = run(awaiting())
        assert torch.equal(tokens, plainly(gpt2.plain, FRANCE, 1.1, 12)[1])
        settle(model)
        return caught

    def line(self, caught, text):
        entry = [entry for entry in caught.traceback if entry.path.name == "test_async.py"][-1]
        assert text in str(entry.statement)

    def test_of_the_user(self, gpt2):
        async def body(model):
            async with model.generate(TOWER, max_tokens=5) as tracer:
                for step in tracer.iter[:]:
                    model.resid_post[2]
                    if step == 2:
                        raise Mine("on purpose")

        caught = self.fails(gpt2, Mine, "on purpose", body)
        self.line(caught, "raise Mine")

        model = gpt2.engine

        def sync():
            with model.trace(TOWER):
                raise Mine(f"with {model.resid_post[2].shape[-1]}")

        with pytest.raises(Mine, match="with 128") as caught:
            in_time(sync)
        self.line(caught, "raise Mine")

    def test_of_a_handle(self, gpt2):
        async def body(model):
            with model.trace(TOWER, blocking=False) as job:
                model.resid_post[2].missing
            await job

        self.line(self.fails(gpt2, AttributeError, "missing", body), ".missing")

    def test_of_a_stream(self, gpt2):
        async def body(model):
            with model.generate(TOWER, max_tokens=3, ignore_eos=True, blocking=False) as job:
                for _ in job.iter[:]:
                    model.resid_post[2]
                raise Mine("at its end")
            async for _ in job.stream():
                pass

        self.line(self.fails(gpt2, Mine, "at its end", body), "raise Mine")

    @pytest.mark.parametrize("error", ["KeyboardInterrupt", "SystemExit", "GeneratorExit"])
    def test_that_would_end_a_process(self, gpt2, error):
        async def body(model):
            async with model.trace(TOWER):
                model.resid_post[2]
                raise {
                    "KeyboardInterrupt": KeyboardInterrupt,
                    "SystemExit": SystemExit,
                    "GeneratorExit": GeneratorExit,
                }[error]

        self.fails(gpt2, RemoteError, error, body)

    def test_a_wrong_shape(self, gpt2):
        async def body(model):
            async with model.trace(TOWER):
                model.transformer.h[3].output = torch.zeros(3, 4)

        self.fails(gpt2, EditError, r"\[1, 10, 128\] here, and was assigned one of \[3, 4\]", body)

    @pytest.mark.parametrize("token", [10**6, -1])
    def test_a_token_that_there_is_not(self, gpt2, token):
        async def body(model):
            async with model.generate(TOWER, max_tokens=4) as tracer:
                for _ in tracer.iter[:]:
                    model.samples = torch.tensor([token])

        self.fails(gpt2, EditError, "tokens 0 to", body)

    def test_a_prompt_that_is_too_long(self, gpt2):
        prompt = " ".join([TOWER] * 30)

        async def body(model):
            async with model.trace(prompt):
                model.logits.save()

        self.fails(gpt2, EngineError, r"(?s)128.*", body)

        model = gpt2.engine

        def sync():
            with model.trace(prompt):
                model.logits.save()

        with pytest.raises(EngineError, match="128"):
            in_time(sync)

    def test_one_of_two_prompts_is_too_long(self, gpt2):
        prompt = " ".join([TOWER] * 30)

        async def body(model):
            async with model.trace() as tracer:
                with tracer.invoke(FRANCE):
                    model.logits.save()
                with tracer.invoke(prompt):
                    model.logits.save()

        self.fails(gpt2, EngineError, "128", body)

    def test_a_parameter_that_vllm_refuses(self, gpt2):
        async def body(model):
            async with model.trace(TOWER, top_p=3.0):
                model.logits.save()

        self.fails(gpt2, EngineError, "top_p", body)


def process_of(model):
    """The process in which blocks run."""
    with model.trace(ROME):
        import os

        number = os.getpid()
        number = nnsight.save(number)
    return number


def kill(model, victim):
    """Kill a process while the engine computes some traces; give what became of each, and how long that took."""

    async def awaiting():
        jobs = [send(model, prompt) for prompt in PROMPTS]
        tasks = [asyncio.ensure_future(awaited(model, prompt, 1.1, LONG)) for prompt in PROMPTS]
        stream = jobs[0].stream()
        await stream.__anext__()
        begin = time.monotonic()
        os.kill(victim, signal.SIGKILL)
        found = await asyncio.gather(*jobs, *tasks, return_exceptions=True)
        return found, time.monotonic() - begin

    return run(awaiting())


class TestKilled:
    """Each trace fails at once and says why; the engine starts again when it is told to."""

    def check(self, found, taken):
        assert len(found) == 2 * len(PROMPTS)
        for error in found:
            assert isinstance(error, EngineError), error
            assert "The process of the vLLM engine has ended" in str(error)
            assert "model.dispatch()" in str(error)
            assert "of test_async.py" in str(error)
        assert taken < 20

    def refuses(self, model):
        for options in ({}, {"trace": False}):
            with pytest.raises(EngineError, match=r"Start it again: model\.dispatch\(\)"):
                model.trace(TOWER, **options)

    def test_the_engine(self, gpt2):
        model, caught = gpt2.engine, []
        with model.edit() as edited:
            model.resid_post[3][:] *= 1.1

        def sync():
            with pytest.raises(EngineError, match=r"SIGKILL.*of generations\.py") as error:
                steered(model, TOWER, 1.0, LONG, max_tokens=LONG, min_tokens=LONG)
            caught.append(error)

        thread = threading.Thread(target=sync, daemon=True)
        thread.start()
        (core,) = model._client.running().llm.engine_core.resources.engine_manager.processes
        found, taken = kill(model, core.pid)
        self.check(found, taken)
        assert all("SIGKILL" in str(error) for error in found)
        thread.join(20)
        assert caught
        self.refuses(model)
        self.refuses(edited)
        model.dispatch()
        for again, factor in ((model, 1.0), (edited, 1.1)):
            with again.trace(TOWER):
                logits = again.logits.save()
            with gpt2.plain.trace(TOWER):
                gpt2.plain.resid_post[3][:] *= factor
                expected = gpt2.plain.logits.save()
            close(logits, expected)

    def test_the_worker_and_an_engine_that_is_closed(self, gpt2):
        model = gpt2.engine
        worker = process_of(model)
        (core,) = model._client.running().llm.engine_core.resources.engine_manager.processes
        assert worker not in (core.pid, os.getpid())
        self.check(*kill(model, worker))
        self.refuses(model)
        model.dispatch()
        job = send(model, TOWER)
        model.close()
        with pytest.raises(EngineError, match=r"was closed.*test_async\.py"):
            job.result(LIMIT)  # the next trace starts it again
