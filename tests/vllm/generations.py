"""A steered generation, with and without an engine, and what it is to be equal."""

import torch


def steered(model, prompt, factor, count, **options):
    """The stream and tokens of a generation."""
    with model.generate(prompt, **options) as tracer:
        streams = [].save()
        for _ in tracer.iter[:]:
            model.resid_post[3][:] *= factor
            streams.append(model.resid_post[8])
        tokens = tracer.result.save()
    assert len(streams) == count
    return streams, tokens


def plainly(model, prompt, factor, count):
    """The same in transformers, greedy."""
    return steered(model, prompt, factor, count, max_new_tokens=count, min_new_tokens=count, do_sample=False)


def close(found, expected):
    assert found.shape == expected.shape
    torch.testing.assert_close(found.detach(), expected.detach(), atol=1e-4, rtol=1e-4)


def same(found, expected):
    """Streams and tokens of two generations."""
    assert found[1].tolist() == expected[1].tolist()
    for mine, other in zip(found[0], expected[0], strict=True):
        close(mine, other)
