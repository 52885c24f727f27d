"""Metrics, against the same from the plain module's logits."""

import pytest
import torch
from torch.nn.functional import cross_entropy as torch_cross_entropy

from nnsight import errors
from nnsight.experiments import cross_entropy, kl, log_prob, logit_diff, measure, prob, rank

ANSWERS = [3, 8, 20]


@pytest.fixture
def logits(plain, pairs):
    with torch.no_grad():
        return plain(pairs[0])


def value(model, prompts, metric):
    return measure(model, prompts, metric).values


def test_of_one_answer_for_each_prompt(model, pairs, logits):
    last, ids, rows = logits[:, -1], torch.tensor(ANSWERS), torch.arange(3)
    chosen = last[rows, ids]
    found = value(model, pairs[0], logit_diff(ANSWERS, [4, 9, 21]))
    torch.testing.assert_close(found, chosen - last[rows, ids + 1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(value(model, pairs[0], prob(ANSWERS)), last.softmax(-1)[rows, ids], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(value(model, pairs[0], log_prob(ANSWERS)), last.log_softmax(-1)[rows, ids])
    torch.testing.assert_close(value(model, pairs[0], cross_entropy(ANSWERS)), -last.log_softmax(-1)[rows, ids])
    order = last.argsort(-1, descending=True)
    expected = [order[i].tolist().index(answer) for i, answer in enumerate(ANSWERS)]
    assert value(model, pairs[0], rank(ANSWERS)).tolist() == expected


def test_of_one_answer_for_all(model, pairs, logits):
    torch.testing.assert_close(value(model, pairs[0], logit_diff(5, 7)), logits[:, -1, 5] - logits[:, -1, 7])
    assert value(model, pairs[0, 0], logit_diff(5, 7)).shape == ()


def test_loss_of_the_prompt_itself(model, plain, pairs):
    prompts = [pairs[0, 0], pairs[0, 1, :4]]
    found = value(model, prompts, cross_entropy())
    for ids, loss in zip(prompts, found, strict=True):
        with torch.no_grad():
            expected = torch_cross_entropy(plain(ids[None])[0, :-1], ids[1:])
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)


def test_padding_changes_no_prompt(model, plain, pairs):
    prompts = [pairs[0, 0], pairs[0, 1, :3]]
    found = value(model, prompts, log_prob(5))
    for ids, number in zip(prompts, found, strict=True):
        with torch.no_grad():
            torch.testing.assert_close(number, plain(ids[None])[0, -1].log_softmax(-1)[5], rtol=1e-4, atol=1e-5)


def test_kl_to_the_run_itself_is_zero(model, pairs):
    torch.testing.assert_close(value(model, pairs[0], kl()), torch.zeros(3), rtol=0, atol=1e-6)


def test_answers_as_text(landmarks):
    prompts = ["The Eiffel Tower is in the city of", "The Colosseum is in the city of"]
    found = value(landmarks, prompts, logit_diff([" Paris", " Rome"], [" Rome", " Paris"]))
    assert (found > 5).all()
    assert value(landmarks, prompts, rank([" Paris", " Rome"])).tolist() == [0, 0]


@pytest.mark.parametrize(("answer", "message"), [(" Eiffel", "not one token"), ("", "not one token")])
def test_an_answer_of_several_tokens_is_refused(landmarks, answer, message):
    with pytest.raises(errors.InputError, match=message):
        value(landmarks, "The", prob(answer))


def test_text_without_a_tokenizer_is_refused(model, ids):
    with pytest.raises(errors.InputError, match="no tokenizer"):
        value(model, ids, prob(" Paris"))
    with pytest.raises(errors.InputError, match="no tokenizer"):
        value(model, "text", prob(3))


@pytest.mark.parametrize("prompts", [[], [[]], torch.zeros(3), 3.5])
def test_what_is_no_prompt_is_refused(model, prompts):
    with pytest.raises((errors.InputError, TypeError)):
        value(model, prompts, prob(3))
