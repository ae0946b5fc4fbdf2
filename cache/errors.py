"""The one error family. The command line turns each into a single line and exit status 2."""


class KdcacheError(Exception):
    """Something the user can act on: the message says what is wrong, where, and what to do."""


class InputError(KdcacheError):
    """A name, path, option or file given by the user cannot be used."""


class NotFoundError(KdcacheError):
    """The cache, view, teacher or run asked for does not exist (yet)."""


class MismatchError(KdcacheError):
    """Two things that must be the same (teacher, data, views, format) differ."""


class CorruptError(KdcacheError):
    """Stored bytes are not those that were committed."""


class UnservedError(KdcacheError):
    """A loss needs what the cache does not hold."""
