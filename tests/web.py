"""A web server of the tests, on this machine."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Handler(BaseHTTPRequestHandler):
    """Answers with the server's pages."""

    def do_GET(self) -> None:
        path = self.path.partition('?')[0]
        if self.command == 'GET':
            self.server.asked.append(path)
        page = self.server.pages.get(path, 404)
        if isinstance(page, int):
            self.send_error(page)
        elif isinstance(page, bytes):
            self.give('application/octet-stream', page)
        elif callable(page):
            page(self)
        else:
            self.give(*page)

    do_HEAD = do_GET

    def give(self, content_type: str, content: bytes, missing: int = 0) -> None:
        """Answer with a content that lacks some of the bytes that are promised."""
        self.send_response(200)
        self.send_header('Content-Type', content_type)
        self.send_header('Content-Length', str(len(content) + missing))
        self.end_headers()
        if self.command == 'GET':
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    """A server, see :func:`serve`.

    Attributes:
        pages: By path: a status, a content, arguments of ``give``, or a function of the
            handler.
        asked: The paths that were asked for.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(
        self,
        pages: dict[str, int | bytes | tuple | Callable[[Handler], None]],
        handler: type[Handler] = Handler,
    ) -> None:
        super().__init__(('127.0.0.1', 0), handler)
        self.pages, self.asked = pages, []
        self.url = f'http://127.0.0.1:{self.server_port}'


@contextmanager
def serve(*arguments: object) -> Iterator[Server]:
    """A :class:`Server` that answers while the context is open."""
    with Server(*arguments) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.shutdown()
