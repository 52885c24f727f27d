"""Every exception and warning of nnsight, under one root.

NNsightError
├── NotTracingError (ValueError)      a value was asked for outside a running trace
├── NoInputError (ValueError)         the model was never given an input
├── OrderError
│   ├── OutOfOrderError               the place has already been passed
│   └── NeverRanError                 the place does not come by in this run
├── StoppedError                      the run was ended by ``tracer.stop()``
├── WaitError                         blocks wait for something that cannot come
├── UnknownPathError (AttributeError) no module or attribute of that name
├── NamesError (AttributeError)       a name of the vocabulary that this model cannot serve
│   └── NoLayerError (IndexError)     a layer of a number that the model does not have
├── EditError (TypeError, ValueError) a value cannot be put where it was assigned
├── RowsError                         an invoke's rows cannot be told apart at a place
├── GradientError                     a gradient that cannot be had
├── ScanError                         a shape depends on values, which a scan does not compute
├── InputError (TypeError, ValueError) an input the model cannot take
├── LoadError                         a model or tokenizer cannot be loaded
├── CaptureError                      a deferred block cannot be taken from its source
├── RemoteError                       something about remote execution
│   ├── TravelError (TypeError)       a value that cannot be sent
│   ├── NotSavedError (NameError)     a name of a remote block is used later and was not saved
│   ├── ProtocolError (ValueError)    bytes that are no message
│   ├── ServerError                   the server cannot be reached, or refuses
│   ├── RemoteTimeoutError (TimeoutError)
│   └── JobCancelledError             the job was cancelled
└── SourceError                       a function has no readable operations
"""

from __future__ import annotations


class NNsightError(Exception):
    """Root of every error nnsight raises itself."""


class NotTracingError(NNsightError, ValueError):
    """A module's value was asked for while no trace of its model was running."""


class NoInputError(NNsightError, ValueError):
    """A trace needs an input and got none."""


class OrderError(NNsightError, RuntimeError):
    """A request that the forward pass can no longer serve."""


class OutOfOrderError(OrderError):
    """The forward pass has gone past the place that was asked for."""


class NeverRanError(OrderError):
    """The place that was asked for does not run in this forward pass."""


class StoppedError(NNsightError, RuntimeError):
    """Something was asked of a run after ``tracer.stop()``."""


class WaitError(NNsightError, RuntimeError):
    """Blocks of one trace wait for each other, or for a value that nobody sets."""


class UnknownPathError(NNsightError, AttributeError):
    """A module path or attribute that the model does not have."""


class NamesError(NNsightError, AttributeError):
    """A name of the vocabulary that a model, or one of its layers, cannot serve."""


class NoLayerError(NamesError, IndexError):
    """A layer of a number that the model does not have."""


class EditError(NNsightError, TypeError, ValueError):
    """A value that cannot stand where it was assigned."""


class RowsError(NNsightError, RuntimeError):
    """A place where the rows of one invoke cannot be told from another's."""


class GradientError(NNsightError, RuntimeError):
    """A gradient that does not exist, or was asked for in the wrong order."""


class ScanError(NNsightError, RuntimeError):
    """Shapes that depend on values, which a scan does not compute."""


class InputError(NNsightError, TypeError, ValueError):
    """An input of a kind that the model cannot be given."""


class LoadError(NNsightError, RuntimeError):
    """A model or tokenizer that could not be loaded."""


class CaptureError(NNsightError, RuntimeError):
    """The source of a deferred with-block cannot be had, or cannot be run elsewhere."""


class SourceError(NNsightError, RuntimeError):
    """A function whose operations cannot be listed or intercepted."""


class EngineError(NNsightError, RuntimeError):
    """A vLLM engine cannot do what was asked of it."""


class RemoteError(NNsightError, RuntimeError):
    """Root of what can go wrong about remote execution itself."""


class TravelError(RemoteError, TypeError):
    """A value that cannot be sent to a server, or back."""


class NotSavedError(RemoteError, NameError):
    """A name bound in a remote block is used after it, and was not saved there."""


class ProtocolError(RemoteError, ValueError):
    """Bytes that are no message of the protocol, or of another version."""


class ServerError(RemoteError):
    """The server cannot be reached, refuses the job, or lost it."""


class RemoteTimeoutError(RemoteError, TimeoutError):
    """The job took longer than its `timeout`."""


class JobCancelledError(RemoteError):
    """The job was cancelled before it was done."""


class NNsightWarning(UserWarning):
    """Root of every warning nnsight gives."""


class OutOfOrderWarning(NNsightWarning):
    """A read came after its place had passed; a second forward pass served it."""


class SavedValueChangedWarning(NNsightWarning):
    """A saved tensor was changed in place after it was saved."""


class IterationWarning(NNsightWarning):
    """An iteration was bounded past the end of the generation."""
