"""What a web server answers, without trusting it with our memory or our time."""

import base64
import http.client
import io
import string
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

from backbones.errors import InputError

# Bytes. A photograph has 2 to 20 million.
MAX_DOWNLOAD = 2**28

# Seconds without a byte, and for a whole picture.
SILENCE_TIMEOUT = 10.0
DOWNLOAD_TIMEOUT = 120.0

BLOCK_SIZE = 2**16


class Answer:
    """The answer to a request, of which only the header has been read.

    Attributes:
        content_type: Such as 'image/jpeg', in lower case; '' where the server does not say.
    """

    def __init__(self, response: http.client.HTTPResponse, limit: int, deadline: float):
        self.content_type = (
            response.headers.get('Content-Type', '').partition(';')[0].strip().lower()
        )
        self._response = response
        self._limit = limit
        self._deadline = deadline
        self._data = bytearray()

    def beginning(self, num_bytes: int) -> bytes:
        """The first bytes; fewer if there are no more."""
        self._read_up_to(num_bytes)
        return bytes(self._data[:num_bytes])

    def download(self) -> io.BytesIO:
        """All of it.

        Raises:
            InputError: It is too large, too slow, or stops in the middle.
        """
        length = self._response.headers.get('Content-Length', '')
        length = int(length) if length.isdigit() else None
        too_large = f'is too large to be downloaded: more than {self._limit / 2**20:g} MiB'
        if length is not None and length > self._limit:
            raise InputError(too_large)
        self._read_up_to(self._limit + 1)
        if len(self._data) > self._limit:
            raise InputError(too_large)
        if length is not None and len(self._data) < length:
            raise InputError(
                f'is cut short: the server sent {len(self._data)} of {length} bytes, then hung up'
            )
        return io.BytesIO(self._data)

    def _read_up_to(self, num_bytes: int) -> None:
        while (missing := num_bytes - len(self._data)) > 0:
            if time.monotonic() > self._deadline:
                raise InputError(
                    f'comes too slowly: {len(self._data)} bytes, and the time for it is over'
                )
            # Of read(), a server that drips could make one call last for ever.
            block = self._response.read1(min(missing, BLOCK_SIZE))
            if not block:
                return
            self._data += block


@contextmanager
def open_address(
    address: str,
    limit: int = MAX_DOWNLOAD,
    silence_timeout: float = SILENCE_TIMEOUT,
    download_timeout: float = DOWNLOAD_TIMEOUT,
) -> Iterator[Answer]:
    """Ask for an http(s) address; a name and a password in it are sent as Basic authentication.

    Args:
        address: Where. Redirections are followed, to http(s) only.
        limit: Bytes that are accepted at most.
        silence_timeout: Seconds without a byte after which to give up.
        download_timeout: Seconds for everything.

    Raises:
        InputError: There is no such server, it refuses, or it breaks off.
    """
    deadline = time.monotonic() + download_timeout
    try:
        with _opener().open(_request(address), timeout=silence_timeout) as response:
            yield Answer(response, limit, deadline)
    except urllib.error.HTTPError as error:
        error.close()
        raise InputError(f'the server answers {error.code} ({error.reason})') from error
    except TimeoutError as error:
        raise InputError(_silent(silence_timeout)) from error
    except urllib.error.URLError as error:
        if isinstance(error.reason, TimeoutError):
            raise InputError(_silent(silence_timeout)) from error
        reason = getattr(error.reason, 'strerror', None) or error.reason
        raise InputError(f'the server cannot be reached: {reason}') from error
    except InputError:
        raise
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise InputError(f'cannot be downloaded: {error}') from error


def _silent(seconds: float) -> str:
    return f'the server is silent: not a byte for {seconds:g} s'


def _opener() -> urllib.request.OpenerDirector:
    """Speaks http and https alone, so that no redirection leads to a file or elsewhere."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPRedirectHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPErrorProcessor,
        urllib.request.UnknownHandler,
    ):
        opener.add_handler(handler())
    return opener


def _request(address: str) -> urllib.request.Request:
    # Letters of other alphabets, and spaces; what is quoted already stays.
    parts = urllib.parse.urlsplit(urllib.parse.quote(address, safe=string.punctuation))
    login, _, host = parts.netloc.rpartition('@')
    request = urllib.request.Request(
        parts._replace(netloc=host, fragment='').geturl(),
        headers={'User-Agent': 'efficientformer-v2-dense', 'Accept': 'image/*, video/*, */*'},
    )
    if login:
        encoded = base64.b64encode(urllib.parse.unquote_to_bytes(login)).decode()
        # Unredirected: a server that sends us elsewhere must not give our password away.
        request.add_unredirected_header('Authorization', f'Basic {encoded}')
    return request
