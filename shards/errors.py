"""The ways a verb can end other than well, each with its exit code."""


class BadInput(Exception):
    """The input or an option is wrong; the message names file, row or key and the remedy."""

    exit_code = 2


class Unfinished(BadInput):
    """A stage directory without its manifest was given to a reader."""


class Corrupt(BadInput):
    """Stored bytes do not match their checksum, count or form; the message names the file."""


class Unreadable(Corrupt):
    """One item of a shard is broken; those around it may be whole."""


class Failed(Exception):
    """The work itself went wrong; the message says where and what to do."""

    exit_code = 1


class Unreachable(Failed):
    """A remote file did not come, however often it was asked for."""


class CacheFull(Failed):
    """There is no room for the copy of a remote file."""


class Stopped(Exception):
    """A signal asked for a stop; what was done is kept and the same command goes on."""

    exit_code = 3


class NoGPU(Exception):
    """A GPU was asked for by name and there is none."""

    exit_code = 4
