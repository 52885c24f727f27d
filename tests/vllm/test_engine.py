"""What an engine does beside a forward: chunks, cached prefixes, several requests at a time, errors, and its end."""

import pytest
import torch

from nnsight.errors import EditError, EngineError, GradientError, InputError, NamesError, NoInputError, OutOfOrderError

from .generations import close

TOWER, FRANCE = "The Eiffel Tower is in the city of", "The capital of France is"
LONG = " ".join([TOWER] * 4)  # more tokens than are left of a step beside others


def logits_of(model, prompt):
    with model.trace(prompt):
        stream, logits = model.resid_post[5].save(), model.logits.save()
    return stream, logits


def test_document(gpt2):
    model = gpt2.engine
    with model.trace("Hello", temperature=0.0, max_tokens=5) as tracer:
        logits = [].save()

        with tracer.iter[:]:
            logits.append(model.logits.output)

    assert 1 <= len(logits) <= 5
    with gpt2.plain.trace("Hello"):
        expected = gpt2.plain.logits.save()
    close(logits[0], expected)


class TestBatches:
    @pytest.fixture(params=[True, False], ids=["cached prefixes", "no cache"])
    def tight(self, engines, request):
        """An engine whose steps hold less than the prompts together."""
        return engines("gpt2", max_num_batched_tokens=64, enable_prefix_caching=request.param)

    def test_a_prompt_is_never_cut(self, tight):
        model = tight.engine
        with model.trace() as tracer:
            for _ in range(4):
                with tracer.invoke(LONG):
                    stream = model.resid_post[5].save()
        with model.trace() as tracer:
            with tracer.invoke(LONG):
                found1 = model.logits.save()
            with tracer.invoke(TOWER):
                found2 = model.logits.save()
            with tracer.invoke(LONG):
                found3 = model.logits.save()
        close(stream, logits_of(tight.plain, LONG)[0])
        close(found1, logits_of(tight.plain, LONG)[1])
        close(found2, logits_of(tight.plain, TOWER)[1])
        close(found3, found1)

    def test_plain_prompts_beside_it_are_cut(self, tight):
        plain = [" ".join([TOWER] * n) for n in (9, 8, 7)]
        expected = [o.outputs[0].token_ids for o in tight.engine.trace(plain, trace=False, max_tokens=3)]
        again = [o.outputs[0].token_ids for o in tight.engine.trace(plain, trace=False, max_tokens=3)]
        assert again == expected

    def test_an_edit_is_not_found_by_others(self, tight):
        model = tight.engine
        before = model.trace(LONG, trace=False, max_tokens=4)[0].outputs[0].token_ids
        for _ in range(2):
            with model.trace(LONG, max_tokens=4):
                model.resid_post[0][:] = 0
                logits = model.logits.save()
            with tight.plain.trace(LONG):
                tight.plain.resid_post[0][:] = 0
                expected = tight.plain.logits.save()
            close(logits, expected)
            assert model.trace(LONG, trace=False, max_tokens=4)[0].outputs[0].token_ids == before
            close(logits_of(model, LONG)[1], logits_of(tight.plain, LONG)[1])

    def test_a_prompt_that_no_step_holds(self, tight):
        with pytest.raises(EngineError, match=r"max_num_batched_tokens=8\d"):
            logits_of(tight.engine, " ".join([TOWER] * 8))

    def test_little_memory(self, engines):
        """Requests that have no room beside each other wait, and each is as if it were alone."""
        small = engines("gpt2", block_size=32, num_gpu_blocks_override=8, enable_prefix_caching=False)
        model, prompt = small.engine, " ".join([TOWER] * 8)
        with model.trace(max_tokens=20, ignore_eos=True) as tracer:
            found = [].save()
            for factor in (1.0, 1.2, 1.4, 1.6):
                with tracer.invoke(prompt):
                    for _ in tracer.iter[:]:
                        model.resid_post[3][:] *= factor
                    found.append(tracer.result)
        assert len(found) == 4
        for factor in (1.0, 1.2, 1.4, 1.6):
            with model.trace(prompt, max_tokens=20, ignore_eos=True) as tracer:
                for _ in tracer.iter[:]:
                    model.resid_post[3][:] *= factor
                alone = tracer.result.save()
            assert any(torch.equal(alone, one) for one in found)


class TestValues:
    def test_they_never_change_afterwards(self, gpt2):
        model = gpt2.engine
        with model.trace(TOWER, max_tokens=3, ignore_eos=True):
            stream = model.resid_pre[0]
            kept = stream.clone()
            model.resid_post[11]
            same = (stream == kept).all().save()
            stream = stream.save()
            kept = kept.save()
        assert same
        assert torch.equal(stream, kept)

    def test_lists_and_numbers_of_the_user(self, gpt2):
        model, factor, seen = gpt2.engine, 0.25, []
        with model.trace(TOWER):
            model.resid_post[3][:] *= factor
            seen.append(model.logits[0, -1].argmax().item())
        with gpt2.plain.trace(TOWER):
            gpt2.plain.resid_post[3][:] *= factor
            expected = gpt2.plain.logits[0, -1].argmax().save()
        assert seen == [expected]

    def test_printing(self, gpt2, capfd):
        model = gpt2.engine
        with model.trace(TOWER):
            print("the shape is", tuple(model.resid_post[2].shape))
        assert "the shape is (1, 10, 128)" in capfd.readouterr().out

    def test_a_session(self, gpt2):
        model = gpt2.engine
        with model.session():
            with model.trace(TOWER):
                source = model.resid_post[6].save()
            with model.trace("The Colosseum is in the city of"):
                model.resid_post[6][:, -1] = source[:, -1]
                token = model.logits[0, -1].argmax().save()
        assert model.tokenizer.decode(token) == " Paris"

    def test_ids_and_chats(self, gpt2):
        ids = gpt2.plain.tokenizer(TOWER)["input_ids"]
        close(logits_of(gpt2.engine, ids)[1], logits_of(gpt2.plain, TOWER)[1])
        close(logits_of(gpt2.engine, torch.tensor([ids]))[1], logits_of(gpt2.plain, TOWER)[1])


class TestErrors:
    def fails(self, model, error, match, body):
        with pytest.raises(error, match=match) as caught:
            body(model)
        assert any(entry.path.name == "test_engine.py" for entry in caught.traceback)
        assert logits_of(model, FRANCE)[1].shape[1] == 5  # the engine serves on

    def test_of_the_user(self, gpt2):
        def body(model):
            with model.trace(TOWER):
                model.resid_post[2]
                raise KeyError("mine")

        self.fails(gpt2.engine, KeyError, "mine", body)

    def test_of_one_invoke(self, gpt2):
        def body(model):
            with model.trace() as tracer:
                with tracer.invoke(TOWER):
                    model.logits.sum() / (1 // 0)
                with tracer.invoke(FRANCE):
                    model.logits.save()

        self.fails(gpt2.engine, ZeroDivisionError, "", body)

    def test_a_wrong_shape(self, gpt2):
        def body(model):
            with model.trace(TOWER):
                model.transformer.h[3].output = torch.zeros(3, 4)

        self.fails(gpt2.engine, EditError, r"\[1, 10, 128\] here, and was assigned one of \[3, 4\]", body)

    def test_out_of_order(self, gpt2):
        def body(model):
            with model.trace(TOWER):
                model.resid_post[4]
                model.resid_post[2].save()

        self.fails(gpt2.engine, OutOfOrderError, "Move that line up", body)

    def test_gradients(self, gpt2):
        def body(model):
            with model.trace(TOWER):
                model.logits.sum().backward()

        self.fails(gpt2.engine, GradientError, "", body)

    def test_heads(self, gpt2):
        def body(model):
            with model.trace(TOWER):
                model.heads[3].z.save()

        self.fails(gpt2.engine, NamesError, "inside vLLM's kernels", body)

    def test_the_whole_batch(self, gpt2):
        def body(model):
            with model.trace() as tracer:
                with tracer.invoke(TOWER):
                    model.logits
                with tracer.invoke():
                    model.logits

        self.fails(gpt2.engine, InputError, "no batch of all invokes", body)

    def test_several_prompts_in_one_block(self, gpt2):
        def body(model):
            with model.trace([TOWER, FRANCE]):
                model.logits

        self.fails(gpt2.engine, InputError, "Several prompts are several invokes", body)

    def test_no_prompt(self, gpt2):
        def body(model):
            with model.trace():
                model.logits.save()

        self.fails(gpt2.engine, NoInputError, "give the trace a prompt", body)

    def test_a_parameter_that_there_is_not(self, gpt2):
        def body(model):
            with model.trace(TOWER, no_such=1):
                model.logits.save()

        self.fails(gpt2.engine, EngineError, "no_such", body)

    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"pipeline_parallel_size": 2}, "pipeline_parallel_size"),
            ({"enforce_eager": False}, "enforce_eager"),
            ({"worker_extension_cls": "x"}, "worker_extension_cls"),
            ({"speculative_config": {"model": "x"}}, "speculative_config"),
        ],
    )
    def test_options_that_cannot_be_had(self, folders, options, match):
        from nnsight.modeling.vllm import VLLM

        with pytest.raises(InputError, match=match):
            VLLM(folders["gpt2"], **options)

    def test_the_second_model_runner(self, folders, monkeypatch):
        from nnsight.modeling.vllm import VLLM

        monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
        with pytest.raises(InputError, match="second model runner"):
            VLLM(folders["gpt2"])
