"""Reads over a network: transient faults are tried again with growing waits, permanent ones are told at once."""

import errno
import hashlib
import logging
import random
import re
import time
from collections.abc import Callable
from typing import TypeVar

from txfm_data.address import redact

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

MAX_WAIT_S = 60.0
"""No single wait is longer, however many tries there are."""

_TRANSIENT_TEXT = re.compile(
    r"curlcode|timed?[ -]?out|slow ?down|reduce your request rate|throttl|too many requests|internal ?error"
    r"|service ?unavailable|bad gateway|connection (?:was )?(?:reset|refused|closed|aborted|timed)|broken pipe"
    r"|(?:could not|couldn't|failed to|cannot) (?:connect|resolve)|temporary failure|network is unreachable"
    r"|unable to connect|premature|(?:http|response|status)(?: response)?(?: code)?:? (?:5\d\d|408|429)\b",
    re.IGNORECASE,
)
_DENIED_TEXT = re.compile(
    r"access ?denied|forbidden|invalidaccesskeyid|signaturedoesnotmatch|expiredtoken|(?:http|response|status)"
    r"(?: response)?(?: code)?:? (?:401|403)\b",
    re.IGNORECASE,
)
_DAMAGE_TEXT = re.compile(r"checksum|corrupt", re.IGNORECASE)
_MISSING_TEXT = re.compile(r"no such file|nosuchkey|nosuchbucket|code:? 404\b", re.IGNORECASE)
_PERMANENT_ERRNO = {
    errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENOSPC, errno.EROFS,
    errno.EDQUOT, errno.ENAMETOOLONG, errno.ELOOP, errno.EBADF, errno.EINVAL, errno.EMFILE,
}  # fmt: skip


def is_transient(error: BaseException) -> bool:
    """Whether a read that raised this may succeed when tried again.

    Faults of the network (also as text within the errors of TileDB, which has one class for all) are; missing files,
    refused access, full disks, damaged data and wrong arguments are not.
    """
    text = str(error)
    if isinstance(error, ValueError) or _DAMAGE_TEXT.search(text):
        return False
    if isinstance(error, OSError):
        return _is_transient_os_error(error)
    if not isinstance(error, RuntimeError) and not _is_tiledb(error):
        return False
    if _DENIED_TEXT.search(text) or type(error).__name__ == "DoesNotExistError":
        return False
    return _TRANSIENT_TEXT.search(text) is not None


def _is_transient_os_error(error: OSError) -> bool:
    # requests' HTTPError is an OSError that carries the response
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(status, int):
        return status >= 500 or status in (408, 429)
    if isinstance(
        error, FileNotFoundError | PermissionError | IsADirectoryError | NotADirectoryError | FileExistsError
    ):
        return False
    return error.errno not in _PERMANENT_ERRNO


def _is_tiledb(error: BaseException) -> bool:
    """Errors of tiledbsoma and TileDB, told by name: neither is imported for reading other sources."""
    return any(cls.__name__ in ("SOMAError", "TileDBError") for cls in type(error).__mro__)


def describe_fault(error: BaseException, what: str, remedy: str) -> Exception:
    """The error to raise in place of a permanent fault: names the block, the cause and the remedy."""
    cause = redact(" ".join(str(error).split())) or type(error).__name__
    missing = isinstance(error, FileNotFoundError) or type(error).__name__ == "DoesNotExistError"
    if missing or (not isinstance(error, ValueError) and _MISSING_TEXT.search(cause)):
        return FileNotFoundError(f"{what}: not there: {cause}; {remedy}")
    if isinstance(error, PermissionError) or (not isinstance(error, ValueError) and _DENIED_TEXT.search(cause)):
        return PermissionError(
            f"{what}: access refused: {cause}; check the credentials of the standard chain (or vfs.s3.no_sign_request for "
            f"a public bucket); {remedy}"
        )
    if isinstance(error, OSError) and not isinstance(error, ValueError):
        return OSError(f"{what}: {cause}; {remedy}")
    return ValueError(f"{what}: cannot be read: {cause}; {remedy}")


def with_retries(
    work: Callable[[], _T],
    *,
    what: str,
    remedy: str,
    tries: int = 5,
    first_wait_s: float = 1.0,
    sleep: Callable[[float], None] | None = None,
) -> _T:
    """Do a piece of work that may be done again, over transient faults.

    what : the piece, for messages: source, dataset, rows.  remedy : what the user can do if it never works.
    tries : attempts in all.  first_wait_s : seconds before the second; doubles each time, up to `MAX_WAIT_S`, less a
        jitter of up to a half that depends on `what` alone.  sleep : how to wait, by default `time.sleep`.

    Raises
    ------
    OSError
        After the last try; names the piece, the number of tries, the last cause and the remedy.
    FileNotFoundError, PermissionError, OSError, ValueError
        At once on a permanent fault of reading (damage is a ValueError). Other exceptions pass as they are.
    """
    if tries < 1:
        raise ValueError(f"{what}: {tries} tries; at least one is needed")
    jitter = random.Random(int.from_bytes(hashlib.sha256(what.encode()).digest()[:8], "big"))
    attempt = 1
    while True:
        try:
            return work()
        except Exception as error:
            if not isinstance(error, OSError | RuntimeError | ValueError) and not _is_tiledb(error):
                raise
            cause = _raise_unless_transient(error, what, remedy, attempt, tries)
        wait = min(first_wait_s * 2 ** (attempt - 1), MAX_WAIT_S) * (1 - jitter.random() / 2)
        _log.warning("%s: try %d of %d failed, the next in %.1f s: %s", what, attempt, tries, wait, cause)
        (sleep or time.sleep)(wait)
        attempt += 1


def _raise_unless_transient(error: Exception, what: str, remedy: str, attempt: int, tries: int) -> str:
    """Raise what the user is told, or return the cause of a fault that will be tried again."""
    cause = redact(" ".join(str(error).split())) or type(error).__name__
    # a chained error shows its own text, credentials included
    chained = error if redact(str(error)) == str(error) else None
    if not is_transient(error):
        if isinstance(error, RuntimeError) and not _DAMAGE_TEXT.search(cause) and not _is_tiledb(error):
            raise error
        raise describe_fault(error, what, remedy) from chained
    if attempt == tries:
        raise OSError(f"{what}: failed {tries} times, last with: {cause}; {remedy}") from chained
    return cause
