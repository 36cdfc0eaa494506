"""What the hub and its client say when something fails, in one sentence; and whether it may pass by itself."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import TYPE_CHECKING

from espalier.errors import first_line

if TYPE_CHECKING:
    import httpx

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)
PASSING = (408, 429, 500, 502, 503, 504)
WRONG_TOKEN = "Invalid credentials in Authorization header"  # what the hub says, of something public too


def transient(error: BaseException) -> bool:
    """Return whether the same request may succeed later, and huggingface_hub has not tried it several times itself."""
    import httpx
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, XetDownloadError

    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in PASSING
    if isinstance(error, LocalEntryNotFoundError):
        return False
    return isinstance(error, httpx.TransportError | XetDownloadError) or _is_damage(error)


def explained(error: BaseException, what: str) -> str | None:
    """Return a full sentence about what failed and what to do; None for an error that is not the hub's.

    It names `what` unless that does not matter, as with a wrong token.
    """
    import httpx
    from huggingface_hub import constants
    from huggingface_hub.errors import HfUriError, HFValidationError

    hub = constants.ENDPOINT
    responses = [one.response for one in _chain(error) if getattr(one, "response", None) is not None]
    status = responses[0].status_code if responses else None
    code = responses[0].headers.get("X-Error-Code") if responses else None
    if status == 401 and responses[0].headers.get("X-Error-Message") == WRONG_TOKEN:
        return (
            f"{hub} does not accept the token that is set (HF_TOKEN, or that of `hf auth login`): it is wrong or"
            " expired. Set another, or none: without one, what is public can be read."
        )
    if code == "GatedRepo":
        return (
            f"The {what} is gated: accept its licence at {_page(responses[0])}, and set HF_TOKEN to a token of that"
            " account (or run `hf auth login`)."
        )
    if code == "RevisionNotFound":
        return f"The {what} cannot be downloaded: {hub} has no such revision of it: its page lists its commits."
    if status in (401, 403) or code == "RepoNotFound":
        return (
            f"The {what} cannot be downloaded: {hub} has nothing of this name, or it is private. Check the name; for"
            " something private set HF_TOKEN to a token that may read it."
        )
    if status is not None:
        return (
            f"The {what} cannot be downloaded: {hub} answers with status {status}, again and again. Type the same"
            " command later: what is finished is kept."
        )
    if any(isinstance(one, httpx.TransportError | ConnectionError) for one in _chain(error)):
        return (
            f"The {what} cannot be downloaded: {hub} cannot be reached, or stops answering ({first_line(error)})."
            " Type the same command later: what is finished is kept. Where there is no internet, jobs read with"
            " HF_HUB_OFFLINE=1 what `snakemake prefetch` downloaded elsewhere."
        )
    of_datasets = any(one.__module__.partition(".")[0] == "datasets" for one in type(error).__mro__)
    if of_datasets or isinstance(error, OSError | HFValidationError | HfUriError) or type(error) is ValueError:
        return f"The {what} cannot be downloaded: {first_line(error.__cause__ or error)}."
    return None


def _page(response: httpx.Response) -> str:
    """Return the address of the repository whose file was asked for."""
    return str(response.request.url).partition("/resolve/")[0]


def unwritable(error: BaseException) -> str | None:
    """Return the system's reason if an error came of a disk that is full or may not be written, else None."""
    reasons = (one.strerror for one in _chain(error) if isinstance(one, OSError) and one.errno in NO_ROOM)
    return next(reasons, None)


def _is_damage(error: BaseException) -> bool:
    """Return whether a file came with the wrong size or checksum, which the network may have done."""
    return type(error) is OSError and error.errno is None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and what it came of; libraries that raise an old error again may have closed a circle."""
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
