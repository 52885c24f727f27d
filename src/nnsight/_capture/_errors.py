"""The one error of capturing a block."""


class CaptureError(RuntimeError):
    """A with-block cannot be taken out of its frame; the message says why and what to write instead."""
