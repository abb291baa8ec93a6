"""Files over HTTP, resumed where they broke off."""

import http.client
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from http import HTTPStatus
from pathlib import Path

OnProgress = Callable[[str], None]
"""Takes one line of news for a person."""

_BLOCK = 1 << 18
_NEWS_EVERY_BYTES = 16 << 20


class DownloadError(Exception):
    """One address could not be downloaded, with the reason."""


def download(
    url: str,
    target: Path,
    *,
    attempts: int = 4,
    timeout_s: float = 30.0,
    pause_s: float = 1.0,
    on_progress: OnProgress | None = None,
) -> Path:
    """`target`, downloaded from `url` unless it is there; what an earlier try left in `target.part` is continued.

    A connection that breaks, stalls for `timeout_s`, or ends before all bytes came is taken up again at the last
    byte, up to `attempts` times, with a pause that doubles. `target` appears only when it is complete.

    Raises:
        DownloadError: an address that is not http(s), an answer that is an error, or no attempts left.
    """
    if not url.startswith(("https://", "http://")):
        raise DownloadError(f"{url} is not an http address")
    part = target.with_name(target.name + ".part")
    for attempt in range(attempts):
        if target.exists():
            return target
        if attempt:
            time.sleep(pause_s * 2 ** (attempt - 1))
        try:
            _continue(url, part, timeout_s, on_progress)
        except urllib.error.HTTPError as error:
            reason = f"{url}: {error.code} {error.reason}"
            error.close()
            if error.code == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                part.unlink(missing_ok=True)  # longer than the file is now
            elif error.code < HTTPStatus.INTERNAL_SERVER_ERROR:
                raise DownloadError(reason) from error
        except (OSError, http.client.HTTPException) as error:
            reason = f"{url}: {getattr(error, 'reason', None) or error}"
        else:
            part.replace(target)
    if target.exists():
        return target
    raise DownloadError(reason)


def _continue(url: str, part: Path, timeout_s: float, on_progress: OnProgress | None) -> None:
    """Append to `part` what is missing of the file; OSError if not all of it came."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})  # noqa: S310
    with urllib.request.urlopen(request, timeout=timeout_s) as answer:  # noqa: S310  (http only, checked above)
        resumed = answer.status == HTTPStatus.PARTIAL_CONTENT
        done = have if resumed else 0
        length = answer.headers.get("Content-Length")
        total = done + int(length) if length is not None else None
        with part.open("ab" if resumed else "wb") as file:
            while block := answer.read(_BLOCK):
                file.write(block)
                if on_progress is not None and done // _NEWS_EVERY_BYTES != (done + len(block)) // _NEWS_EVERY_BYTES:
                    on_progress(_news(url, done + len(block), total))
                done += len(block)
    if total is not None and done < total:
        raise OSError(f"the connection ended after {done} of {total} bytes")


def _news(url: str, done: int, total: int | None) -> str:
    return f"{url}: {done >> 20}" + (f" of {total >> 20} MiB" if total is not None else " MiB")
