"""The one family of errors. The command line prints each as a single line and exits with status 2."""

from collections.abc import Callable

from kdcache.cache.secrecy import hide

_LONGEST = 3000  # characters of a message
_MOST = 300  # of what other people's code says, which may name a file by a long path


class KdcacheError(Exception):
    """Something the user can act on: the message says what is wrong, where, and what to do.

    It is one line, whatever the names and values are that it repeats. Neither a credential nor the user or the query of
    an address is ever part of it.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(in_one_line(hide(message)))


def in_one_line(message: str) -> str:
    """The message without line breaks and, where it is a page long, without its middle."""
    line, half = " ".join(message.splitlines()), _LONGEST // 2
    return line if len(line) <= _LONGEST else f"{line[:half]} [...] {line[-half:]}"


class InputError(KdcacheError):
    """A name, path, option or file given by the user cannot be used."""


class NotFoundError(KdcacheError):
    """The cache, view, teacher or run asked for does not exist (yet)."""


class MismatchError(KdcacheError):
    """Two things that must be the same (teacher, data, views, format) differ."""


class ForeignError(MismatchError):
    """A part of a cache belongs to another one, or it is the whole that is damaged: the others of its kind tell."""


class CorruptError(KdcacheError):
    """Stored bytes are not those that were committed."""


class UntrustedError(KdcacheError):
    """Nobody whom the user trusts has signed what is to be read."""


class BusyError(KdcacheError):
    """Another process is writing here."""


class UnreadableError(KdcacheError):
    """A file cannot be read now, whatever its bytes are, because of rights, a disk or a network."""


class UnservedError(KdcacheError):
    """A loss needs what the cache does not hold."""


RANK_ENDED = "another rank of this training has ended or does not answer: its own message, or torchrun's, says why"


# Filled by modules that know more about an error of the machine than this one does.
EXPLANATIONS: list[Callable[[Exception], str | None]] = []


def machine_error(e: Exception) -> str | None:
    """What to do about an error that comes from the machine, such as too little memory; None for other errors."""
    first = (hide(str(e)).splitlines() or [""])[0]
    if isinstance(e, MemoryError) or type(e).__name__ == "OutOfMemoryError" or "can't allocate memory" in first:
        return f"out of memory ({first[:200]}): lower --batch-size or --image-size"
    if type(e).__name__.startswith("Dist") or "gloo" in first or "NCCL" in first:  # torch.distributed's errors
        return RANK_ENDED
    if first.startswith("Expected to have finished reduction"):
        return "the student has weights that take no part in its answers, which several ranks cannot train: freeze them"
    return next((reason for explain in EXPLANATIONS if (reason := explain(e))), None)


def kind_and_message(error: BaseException) -> str:
    """An error of other people's code in one line: its class and its whole message."""
    return hide(" ".join(f"{type(error).__name__}: {error}".split()))


def first_sentence(error: BaseException) -> str:
    """An error of other people's code in short: its class and the beginning of its message, which can be pages long."""
    text = hide(" ".join(str(error).split())).split(". ")[0][:_MOST]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
