"""Downloads over HTTP; an interrupted download is resumed at its last byte."""

import http.client
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from http import HTTPStatus
from pathlib import Path

from megabatch.errors import UserError

OnProgress = Callable[[str], None]
"""Receives one line of text about the progress."""

_BLOCK = 1 << 18
_PROGRESS_EVERY_BYTES = 16 << 20


class DownloadError(Exception):
    """A URL could not be downloaded; the message gives the reason."""


def download(
    url: str,
    target: Path,
    *,
    attempts: int = 4,
    timeout_s: float = 30.0,
    pause_s: float = 1.0,
    on_progress: OnProgress | None = None,
) -> Path:
    """Downloads `url` to `target` unless that exists, and returns `target`.

    The data go to `target.part`, from which a later call resumes; `target` appears only when it is complete. If the
    connection breaks, stalls for `timeout_s` seconds, or ends early, the download is resumed at the last byte: up to
    `attempts` attempts in total, with pauses that start at `pause_s` seconds and double.

    Raises:
        DownloadError: the URL is not http(s), the server responds with an error, or all attempts failed.
        UserError: a number is out of its range.
    """
    _check(attempts, timeout_s, pause_s)
    if not url.startswith(("https://", "http://")):
        raise DownloadError(f"{url} is not an http URL; needed: one that starts with https:// or http://")
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
                part.unlink(missing_ok=True)  # the partial file is longer than the file on the server
            elif error.code < HTTPStatus.INTERNAL_SERVER_ERROR:
                raise DownloadError(reason) from error
        except (OSError, http.client.HTTPException) as error:
            reason = f"{url}: {getattr(error, 'reason', None) or error}"
        else:
            part.replace(target)
    if target.exists():
        return target
    raise DownloadError(reason)


def _check(attempts: int, timeout_s: float, pause_s: float) -> None:
    if attempts < 1:
        raise UserError(f"attempts={attempts} was given, needed: at least 1; attempts=4 works")
    if not timeout_s > 0:
        raise UserError(f"timeout_s={timeout_s:g} was given, needed: more than 0; timeout_s=30 works")
    if not pause_s >= 0:
        raise UserError(f"pause_s={pause_s:g} was given, needed: at least 0; pause_s=1 works")


def _continue(url: str, part: Path, timeout_s: float, on_progress: OnProgress | None) -> None:
    """Appends the missing bytes of the file to `part`; OSError if the connection ends before the last one."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})  # noqa: S310
    with urllib.request.urlopen(request, timeout=timeout_s) as response:  # noqa: S310  (http only, checked above)
        resumed = response.status == HTTPStatus.PARTIAL_CONTENT
        done = have if resumed else 0
        length = response.headers.get("Content-Length")
        total = done + int(length) if length is not None else None
        with part.open("ab" if resumed else "wb") as file:
            while block := response.read(_BLOCK):
                file.write(block)
                before, done = done, done + len(block)
                if on_progress is not None and before // _PROGRESS_EVERY_BYTES != done // _PROGRESS_EVERY_BYTES:
                    on_progress(_progress_line(url, done, total))
    if total is not None and done < total:
        raise OSError(f"the connection ended after {done} of {total} bytes")


def _progress_line(url: str, done: int, total: int | None) -> str:
    return f"{url}: {done >> 20}" + (f" of {total >> 20} MiB" if total is not None else " MiB")
