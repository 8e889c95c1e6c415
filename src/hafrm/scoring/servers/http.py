"""JSON over HTTP with the standard library: one request, one answer, or a ServerError that says why not."""

import http.client
import json
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any

from hafrm.errors import ConfigError, ServerError

_SHOWN = 300
"""Characters of a server's own words in an error."""


class RefusedError(ServerError):
    """The server answered with an error code."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class ShapeError(ServerError):
    """The server answered in another form than its protocol has."""


@dataclass(frozen=True)
class Address:
    """Where a server is, and how it is spoken to."""

    url: str
    """Without a trailing slash."""
    api_key: str | None = None
    """Sent as a bearer token."""
    timeout: float = 60.0
    """Seconds for one answer."""

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ConfigError(f"a server's address begins with http:// or https://, got {self.url}")


def ask(address: Address, path: str, body: dict[str, Any] | None = None) -> Any:
    """The JSON answer to a POST of `body`, or to a GET where there is none.

    Raises RefusedError for an error code, ShapeError for an answer that is not JSON, ServerError for none.
    """
    url = address.url + path
    headers = {"Content-Type": "application/json", "Accept": "application/json"}
    if address.api_key is not None:
        headers["Authorization"] = f"Bearer {address.api_key}"
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, headers)  # noqa: S310 - Address checks the scheme
    try:
        with urllib.request.urlopen(request, timeout=address.timeout) as answer:  # noqa: S310
            content = answer.read()
    except urllib.error.HTTPError as error:
        raise _refused(url, error) from error
    except TimeoutError as error:
        raise _late(url, address) from error
    except (OSError, http.client.HTTPException) as error:
        if isinstance(getattr(error, "reason", None), TimeoutError):
            raise _late(url, address) from error
        reason = getattr(error, "reason", None) or error
        raise ServerError(f"{url} cannot be reached: {reason}; is the server up?") from error
    try:
        return json.loads(content)
    except ValueError as error:
        raise ShapeError(f"{url} answers no JSON: {_shown(content)}") from error


def _late(url: str, address: Address) -> ServerError:
    return ServerError(
        f"{url} gave no answer within {address.timeout:g} s; raise --timeout, or look at its log"
    )


def _refused(url: str, error: urllib.error.HTTPError) -> RefusedError:
    known = {
        401: "it wants an API key (--api-key)",
        403: "the API key is not accepted",
        404: "it has no such path",
        422: "it cannot read the request: it speaks another protocol",
        429: "it is overloaded; try again",
        503: "it is not ready; try again",
    }
    with error:
        said = _shown(error.read())
    why = known.get(error.code, error.reason)
    return RefusedError(f"{url} answers {error.code}: {why}{said and ' | ' + said}", error.code)


def _shown(content: bytes) -> str:
    return " ".join(content.decode("utf-8", "replace").split())[:_SHOWN]
