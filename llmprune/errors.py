"""Every error llmprune raises on purpose.

    LlmpruneError                 exit code 1, HTTP 500: ours
    ├── NonFiniteError            a block put out NaN or inf
    ├── FactorizationError        a Gram matrix stayed indefinite under rising damping
    ├── JournalError              a record of the work directory does not match its digest
    ├── ProcessLost               another of several processes ended; says which
    └── UserError                 exit code 2, HTTP 4xx: the request cannot be met as it stands
        ├── ConfigError           a field, or two fields together, make no sense
        │   └── PatternError      n:m does not divide a site's inputs
        ├── ModelNotFound         no such directory or hub repository
        ├── HubUnreachable        the hub did not answer
        ├── GatedModel            the hub wants a licence accepted or a token
        ├── UnsafeModel           pickle weights, or remote code without --trust-remote-code
        ├── CorruptCheckpoint     a weights file is truncated or not safetensors
        ├── UnsupportedModel      no decoder stack that can be replayed; says what was looked for
        ├── TextError             a text source is unknown, unreadable or unreachable
        │   ├── TextUnreachable   the hub did not answer for a text
        │   └── TextTooShort      says how many tokens it found and needs
        ├── OutputError           the output directory is in the way, or is the input
        ├── DiskFull              no space left for the work directory or the checkpoint
        ├── DoesNotFit            the plan needs more memory or disk than there is
        ├── OutOfMemory           a job under way asked the device or the machine for more memory than it has
        ├── ResumeRefused         the work directory belongs to another run; names the field
        └── BudgetNotMet          a search found no model within its budget; says how close the nearest came

A message says what is wrong, what is allowed, and the remedy, in one line.
"""

from __future__ import annotations


def one_line(error: BaseException) -> str:
    """An error's message on one line of at most 300 characters, without the final full stop; its type where it has none."""
    return (" ".join(str(error).split()) or type(error).__name__)[:300].rstrip(" .")


class LlmpruneError(Exception):
    """Base of all errors raised on purpose; ``exit_code`` is what the command line returns.

    ``told`` is true where another of several processes has raised it, and says it.
    """

    exit_code = 1
    told = False


class NonFiniteError(LlmpruneError):
    """A block's output holds NaN or inf."""


class FactorizationError(LlmpruneError):
    """A Gram matrix could not be factorised even with raised damping."""


class JournalError(LlmpruneError):
    """A finished record of the work directory is damaged."""


class ProcessLost(LlmpruneError):
    """Another of the processes that do the job together ended before it."""


class UserError(LlmpruneError):
    """The request cannot be met as it stands; the message names the remedy."""

    exit_code = 2


class ConfigError(UserError):
    """A configuration value, or a combination of values, makes no sense."""


class PatternError(ConfigError):
    """An n:m pattern does not divide the number of inputs of a site."""


class ModelNotFound(UserError):
    """No such model directory or hub repository."""


class HubUnreachable(UserError):
    """The Hugging Face hub did not answer."""


class GatedModel(UserError):
    """The hub asks for an accepted licence or a token."""


class UnsafeModel(UserError):
    """Loading would execute code from the model: pickle weights or remote code."""


class CorruptCheckpoint(UserError):
    """A weights file is truncated or is not safetensors."""


class UnsupportedModel(UserError):
    """The model has no decoder stack that can be recorded and replayed."""


class TextError(UserError):
    """A text source is unknown, unreadable or unreachable."""


class TextUnreachable(TextError):
    """The Hugging Face hub did not answer for a text."""


class TextTooShort(TextError):
    """The text holds fewer tokens than the job needs."""


class OutputError(UserError):
    """The output directory cannot be used."""


class DiskFull(UserError):
    """No space left on the device."""


class DoesNotFit(UserError):
    """The job needs more memory or disk than there is."""


class OutOfMemory(UserError):
    """Memory of the device or of the machine ran out while the job was under way."""


class ResumeRefused(UserError):
    """The work directory belongs to a run with another fingerprint."""


class BudgetNotMet(UserError):
    """No model that was tried is within the budget."""
