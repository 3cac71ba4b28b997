"""The errors that end a run on purpose."""

from __future__ import annotations

import errno


class Refused(ValueError):
    """Configuration, data or a directory that cannot be used. One paragraph: what, why, and what to type next."""


class AlsoRefused(Refused):
    """A refusal for all that another process says."""


class TrainingFailed(RuntimeError):
    """Training cannot go on, such as a loss that is not finite; what was saved stays as it is."""


FULL = {errno.ENOSPC, errno.EDQUOT}
# What a storage says that fails now, and may not when the same command is started again.
PASSING = {
    *(errno.EIO, errno.ESTALE, errno.EREMOTEIO, errno.ETIMEDOUT, errno.EAGAIN, errno.EBUSY, errno.EINTR, errno.ENOLINK),
    *(errno.ENOTCONN, errno.ECONNRESET, errno.ECONNREFUSED, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETUNREACH),
}
OF_STORAGE = FULL | PASSING | {errno.EROFS}  # said by a storage, and no mistake of the program's
