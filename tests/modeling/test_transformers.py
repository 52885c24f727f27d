"""TransformersModel: any task, its processor's inputs, and invokes that equal their own single runs."""

from __future__ import annotations

import pytest
import torch
import transformers as tf

from nnsight import LanguageModel, TransformersModel
from nnsight.errors import InputError, LoadError, RowsError

from . import small


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, rtol=1e-4, atol=1e-5)


def bert() -> TransformersModel:
    return TransformersModel(small.bert(), processor=small.tokenizer())


class TestText:
    TEXTS = ("a red cat is in the tower", "a dog", "what is this")

    def test_a_trace_is_the_plain_call(self) -> None:
        net, tokenizer = small.bert(), small.tokenizer()
        model = TransformersModel(net, processor=tokenizer)
        with model.trace(self.TEXTS[0]):
            logits = model.output.logits.save()
        assert torch.equal(logits, net(**tokenizer(self.TEXTS[0], return_tensors="pt")).logits)
        assert torch.equal(model.trace(self.TEXTS[0], trace=False).logits, logits)

    def test_the_forward_ends_after_the_last_request(self) -> None:
        model, ran = bert(), []
        with model.trace(self.TEXTS[0]):
            expected = model.bert.encoder.layer[0].output.clone()
        model.classifier._module.register_forward_hook(lambda *_: ran.append("classifier"))
        with model.trace(self.TEXTS[0], stop_after_last=True):
            found = model.bert.encoder.layer[0].output.clone()
        assert torch.equal(found, expected)
        assert ran == []

    def test_invokes_are_their_own_single_runs(self) -> None:
        model = bert()
        hidden, logits = {}, {}
        with model.trace() as tracer:
            for i, text in enumerate(self.TEXTS):
                with tracer.invoke(text):
                    hidden[i] = model.bert.encoder.layer[0].output
                    model.bert.encoder.layer[1].output[:, :1] *= i
                    logits[i] = model.output.logits
        for i, text in enumerate(self.TEXTS):
            with model.trace(text):
                alone = model.bert.encoder.layer[0].output.save()
                model.bert.encoder.layer[1].output[:, :1] *= i
                answer = model.output.logits.save()
            assert close(hidden[i][:, : alone.shape[1]], alone)
            assert close(logits[i], answer)

    def test_pairs_keep_their_token_types(self) -> None:
        model, tokenizer = bert(), small.tokenizer()
        first = {
            **tokenizer("a red cat", "the dog", return_tensors="pt"),
            "token_type_ids": torch.tensor([[0, 0, 0, 1, 1]]),
        }
        second = tokenizer("this tower is green", return_tensors="pt")
        with model.trace() as tracer:
            with tracer.invoke(first):
                paired = model.output.logits
            with tracer.invoke(second):
                single = model.output.logits
        assert close(paired, model.trace(first, trace=False).logits)
        assert close(single, model.trace(second, trace=False).logits)
        plain = {name: value for name, value in first.items() if name != "token_type_ids"}
        assert not close(paired, model.trace(plain, trace=False).logits)

    def test_a_mask_beside_positional_ids_counts(self) -> None:
        ids, mask = torch.tensor([[8, 9, 10]]), torch.tensor([[1, 1, 0]])
        for model in (bert(), LanguageModel(small.bert(tf.BertForMaskedLM))):
            found = model.trace(ids, attention_mask=mask, trace=False).logits
            assert torch.equal(found, model._module(ids, attention_mask=mask).logits)
            assert not torch.equal(found, model._module(ids).logits)

    def test_masked_language_models_and_token_classifiers(self) -> None:
        for kind in (tf.BertForMaskedLM, tf.BertForTokenClassification, tf.BertModel):
            model = TransformersModel(small.bert(kind), processor=small.tokenizer())
            with model.trace() as tracer:
                with tracer.invoke("a red cat"):
                    first = model.output[0]
                with tracer.invoke("the dog is in the tower"):
                    second = model.output[0]
            assert close(first[:, :3], model.trace("a red cat", trace=False)[0])
            assert close(second, model.trace("the dog is in the tower", trace=False)[0])

    def test_a_forward_without_a_mask_is_not_padded(self) -> None:
        class Unmasked(tf.BertForSequenceClassification):
            def forward(self, input_ids: torch.Tensor) -> object:
                return super().forward(input_ids)

        model = TransformersModel(small.bert(Unmasked), processor=small.tokenizer())
        with pytest.raises(InputError, match="takes no mask"):
            with model.trace() as tracer:
                with tracer.invoke([8, 9]):
                    model.output.save()
                with tracer.invoke([8, 9, 10]):
                    model.output.save()


class TestImages:
    def test_images_through_the_processor(self) -> None:
        net, processor = small.vit()
        model = TransformersModel(net, processor=processor)
        images = [small.image(i, 20 + i, 30) for i in range(3)]
        expected = net(**processor(images, return_tensors="pt")).logits
        pixels = processor(images, return_tensors="pt")["pixel_values"]
        for given in (images, pixels, {"pixel_values": pixels}, [_array(image) for image in images]):
            assert torch.equal(model.trace(given, trace=False).logits, expected)
        assert torch.equal(model.trace(pixel_values=pixels, trace=False).logits, expected)
        assert close(model.trace(pixels[0], trace=False).logits, expected[:1])
        with model.trace() as tracer:
            with tracer.invoke(images[0]):
                hidden = model.vit.layers[0].output
                first = model.output.logits
            with tracer.invoke(images[1:]):
                model.vit.layers[0].output[:] = 0
                second = model.output.logits
        with model.trace(images[0]):
            alone = model.vit.layers[0].output.save()
        assert close(hidden, alone)
        assert close(first, expected[:1])
        with model.trace(images[1:]):
            model.vit.layers[0].output[:] = 0
            zeroed = model.output.logits.save()
        assert close(second, zeroed)

    def test_text_for_a_model_of_images_is_refused(self) -> None:
        model = TransformersModel(*_named(small.vit()))
        with pytest.raises(InputError, match="pixel_values"):
            model.trace("a cat", trace=False)
        with pytest.raises(LoadError, match="no processor that takes images"):
            TransformersModel(small.vit()[0]).trace(small.image(0), trace=False)


class TestTextsAndImages:
    INPUTS = (
        ("a red cat", [0]),
        (["a dog", "the tower is in the"], [1, 2]),
        (["blue", "green dog", "a"], [3]),
    )

    def test_an_invoke_compares_its_own_texts_with_its_own_images(self) -> None:
        net, processor = small.clip()
        model = TransformersModel(net, processor=processor)
        found = {}
        with model.trace() as tracer:
            for i, (texts, numbers) in enumerate(self.INPUTS):
                with tracer.invoke(texts, [small.image(n) for n in numbers]):
                    vision = model.vision_model.encoder.layers[0].output
                    text = model.text_model.encoder.layers[0].output
                    found[i] = vision, text, model.output
        for i, (texts, numbers) in enumerate(self.INPUTS):
            images = [small.image(n) for n in numbers]
            with model.trace(text=texts, images=images):
                vision = model.vision_model.encoder.layers[0].output.save()
                text = model.text_model.encoder.layers[0].output.save()
                output = model.output.save()
            assert close(found[i][0], vision)
            assert close(found[i][1][:, : text.shape[1]], text)
            assert close(found[i][2].logits_per_image, output.logits_per_image)
            assert close(found[i][2].text_embeds, output.text_embeds)

    def test_a_part_in_two_dimensions_can_be_changed_in_place_alone(self) -> None:
        net, processor = small.clip()
        model = TransformersModel(net, processor=processor)
        with model.trace() as tracer:
            with tracer.invoke("a cat", small.image(0)):
                model.output["logits_per_text"][:] = 7
            with tracer.invoke(["a dog", "a tower"], small.image(1)):
                other = model.output.logits_per_text
            with tracer.invoke():
                whole = model.output.logits_per_text.clone()
        assert bool((whole[:1, :1] == 7).all())
        assert close(whole[1:, 1:], other)
        assert close(other, model.trace(["a dog", "a tower"], small.image(1), trace=False).logits_per_text)
        with pytest.raises(RowsError, match="in two dimensions"):
            with model.trace() as tracer:
                with tracer.invoke("a cat", small.image(0)):
                    output = model.output
                    output["logits_per_text"] = output["logits_per_text"] * 2
                    model.output = output
                with tracer.invoke("a dog", small.image(1)):
                    model.output.save()


class TestSound:
    def test_clips_of_whisper(self) -> None:
        net, extractor = small.whisper()
        model = TransformersModel(net, processor=extractor)
        clips = [small.sound(i, length) for i, length in enumerate((8000, 16000, 3000))]
        encoder, tokens = {}, {}
        with model.generate(max_new_tokens=4) as tracer:
            for i, clip in enumerate(clips):
                with tracer.invoke(clip):
                    encoder[i] = model.model.encoder.layers[0].output
                    steps = []
                    with tracer.iter[:]:
                        steps.append(model.proj_out.output)
                    tokens[i] = torch.cat(steps, 1), model.generator.output
        for i, clip in enumerate(clips):
            features = extractor(clip, sampling_rate=16000, return_tensors="pt").input_features
            with model.trace(clip):
                alone = model.model.encoder.layers[0].output.save()
            logits: list[torch.Tensor] = []
            handle = net.proj_out.register_forward_hook(lambda _m, _a, output: logits.append(output))  # noqa: B023
            plain = net.generate(features, max_new_tokens=4)
            handle.remove()
            assert close(encoder[i], alone)
            assert close(tokens[i][0][:, : len(logits)], torch.cat(logits, 1))
            shortest = min(tokens[i][1].shape[1], plain.shape[1])
            assert shortest > 1
            assert torch.equal(tokens[i][1][:, :shortest], plain[:, :shortest])

    def test_a_forward_starts_the_decoder(self) -> None:
        net, extractor = small.whisper()
        model = TransformersModel(net, processor=extractor)
        features = extractor(small.sound(0, 9000), sampling_rate=16000, return_tensors="pt").input_features
        expected = net(features, decoder_input_ids=torch.tensor([[3]])).logits
        assert torch.equal(model.trace(small.sound(0, 9000), trace=False).logits, expected)
        ids = torch.tensor([[3, 5, 6]])
        given = model.trace(small.sound(0, 9000), decoder_input_ids=ids, trace=False).logits
        assert torch.equal(given, net(features, decoder_input_ids=ids).logits)

    def test_clips_of_several_lengths(self) -> None:
        net, extractor = small.wav2vec2("layer")
        model = TransformersModel(net, processor=extractor)
        clips = [small.sound(i, length) for i, length in enumerate((700, 2000))]
        with model.trace() as tracer:
            with tracer.invoke(clips[0]):
                first = model.output.logits
            with tracer.invoke(clips[1]):
                second = model.output.logits
        alone = model.trace(clips[0], trace=False).logits
        assert close(first[:, : alone.shape[1]], alone)
        assert close(second, model.trace(clips[1], trace=False).logits)

    def test_padding_that_would_change_a_clip_is_refused(self) -> None:
        net, extractor = small.wav2vec2("group")
        model = TransformersModel(net, processor=extractor)
        with pytest.raises(InputError, match="normalises over the whole clip"):
            with model.trace() as tracer:
                with tracer.invoke(small.sound(0, 700)):
                    model.output.save()
                with tracer.invoke(small.sound(1, 2000)):
                    model.output.save()
        with model.trace() as tracer:
            with tracer.invoke(small.sound(0, 700)):
                first = model.output.logits
            with tracer.invoke(small.sound(1, 700)):
                model.output.save()
        assert close(first, model.trace(small.sound(0, 700), trace=False).logits)


def _array(image: object) -> object:
    import numpy as np

    return np.asarray(image)


def _named(pair: tuple[object, object]) -> tuple[object, ...]:
    return (pair[0],)
