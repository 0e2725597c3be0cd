"""The ways a verb can end other than well, each with its exit code."""


class BadInput(Exception):
    """The input or an option is wrong; the message names file, row or key and the remedy."""

    exit_code = 2


class Unfinished(BadInput):
    """A stage directory without its manifest was given to a reader."""


class Corrupt(BadInput):
    """Stored bytes do not match their checksum, count or format; the message names the file."""


class Unreadable(Corrupt):
    """One item of a shard is damaged; its neighbours may be intact."""


class Failed(Exception):
    """The work itself went wrong; the message names where and what to do."""

    exit_code = 1


class Unreachable(Failed):
    """A remote file could not be fetched after several tries."""


class CacheFull(Failed):
    """The cache has no space for the copy of a remote file."""


class Stopped(Exception):
    """A signal requested a stop; finished work is kept and the same command resumes it."""

    exit_code = 3


class NoGPU(Exception):
    """A GPU was requested by name and there is none."""

    exit_code = 4
