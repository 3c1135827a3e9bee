"""`spire-dist monitor`: a live page of runs in a browser, and the same for programs. Read-only, and of nothing but their files.

    /  /run?name=N  /picture?name=N&what=scatter     pages and pictures (`monitor_pages.py`)
    /api/runs  /api/run?name=N                       JSON
    /metrics                                         Prometheus

Who may look: on this machine's own address everyone here, unless a token was given; beyond it whoever has the token, from the
query once (a cookie remembers it) or from `Authorization: Bearer`.
"""

import errno
import gzip
import hashlib
import hmac
import ipaddress
import os
import secrets
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import FrameType
from urllib.parse import parse_qs, quote, urlsplit

from cluster.monitor_pages import ASSETS, Pages, Reply, problem
from cluster.prometheus import write_metrics
from spire_dist.errors import ConfigError, RunError

MIN_TOKEN = 12
METRICS_PERIOD_S = 15.0
POLICY = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")
"""Names by which a page on this machine is asked for; another one is a foreign page that had its own name point here."""


def serve(
    runs: Sequence[Path],
    *,
    host: str = "127.0.0.1",
    port: int = 8321,
    token: str | None = None,
    metrics_file: Path | None = None,
) -> None:
    """Serve the page of `runs` (run directories, or folders in which some are or will be) until Ctrl-C or TERM.

    port          0 takes a free one; the address is printed
    token         asked for; None: SPIRE_TOKEN, else one is made up, though on this machine's own address none is asked for
    metrics_file  where Prometheus metrics are also written every `METRICS_PERIOD_S` seconds, for node_exporter

    Raises ConfigError for an address or token that cannot be used, RunError for a path that is no folder.
    """
    local = _is_loopback(host)
    token = token or os.environ.get("SPIRE_TOKEN") or (None if local else secrets.token_urlsafe(24))
    if token is not None and len(token) < MIN_TOKEN:
        raise ConfigError(f"--token (or SPIRE_TOKEN) of {len(token)} characters: give at least {MIN_TOKEN}")
    with Pages(runs) as pages, _bound(host, port) as server:
        if metrics_file is not None:
            write_metrics(metrics_file, pages.states())
        stop = threading.Event()
        with _stopped_by_signals(stop):
            server.gate, server.pages = Gate(token, local, f"spire_{server.server_port}"), pages
            threading.Thread(target=server.serve_forever, daemon=True).start()
            print(_invitation(host, server.server_port, token, len(pages.states())), flush=True)
            while not stop.wait(METRICS_PERIOD_S):
                if metrics_file is not None:
                    try:
                        write_metrics(metrics_file, pages.states())
                    except RunError as error:  # a full disk does not end the page
                        print(error, file=sys.stderr)
        server.shutdown()


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _invitation(host: str, port: int, token: str | None, runs: int) -> str:
    local = _is_loopback(host)
    name = "localhost" if local else socket.gethostname() if host in ("0.0.0.0", "::", "") else host
    query = f"?token={quote(token)}" if token else ""
    lines = [f"{runs} run{'' if runs == 1 else 's'} at http://{f'[{name}]' if ':' in name else name}:{port}/{query}"]
    if local:
        lines.append(f"from your own machine first: ssh -N -L {port}:localhost:{port} {socket.gethostname()}")
    return "\n".join([*lines, "Ctrl-C ends it"])


@contextmanager
def _stopped_by_signals(stop: threading.Event) -> Iterator[None]:
    def end(number: int, frame: FrameType | None) -> None:
        stop.set()

    handlers = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@contextmanager
def _bound(host: str, port: int) -> Iterator["Server"]:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        server = Server(family, host, port)
    except OverflowError as error:
        raise ConfigError(f"--port {port}: choose one from 1 to 65535, or 0 for a free one") from error
    except socket.gaierror as error:
        raise ConfigError(f"--host {host}: not an address of this machine ({error.strerror})") from error
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(f"--port {port}: in use on {host}; choose another one, or 0 for a free one") from error
        if error.errno == errno.EACCES:
            raise ConfigError(f"--port {port}: not for users; choose one above 1023, or 0 for a free one") from error
        raise ConfigError(f"--host {host}: cannot be listened on ({error.strerror}); give an own address") from error
    with server:
        yield server


@dataclass(frozen=True)
class Gate:
    """Who may look."""

    token: str | None
    local: bool
    """Whether only this machine can reach the page."""
    cookie: str
    """Its name; cookies do not tell ports apart."""

    @property
    def pass_word(self) -> str:
        """What the cookie holds: proof of the token, which it cannot be made back into."""
        return hashlib.sha256(f"spire {self.token}".encode()).hexdigest()

    def refusal(self, path: str, headers: Mapping[str, str], query: Mapping[str, str]) -> Reply | None:
        """Why a request is not answered; None if it is."""
        if self.token is None:
            name = _host_name(headers.get("Host", ""))
            if self.local and name not in LOCAL_NAMES:
                return problem(
                    403, f"This page is for http://localhost only, and was asked for as {name or 'nothing'}."
                )
            return None
        if path.removeprefix("/") in ASSETS:
            return None  # the page that asks for the token is drawn with them too
        if "token" in query:
            good = _same(query["token"], self.token)
        elif "Authorization" in headers:
            good = _same(headers["Authorization"], f"Bearer {self.token}")
        else:
            good = _same(_cookie(headers.get("Cookie", ""), self.cookie), self.pass_word)
        return None if good else problem(401, "This page asks for the token that `spire-dist monitor` printed.")

    def remembered(self, query: Mapping[str, str]) -> dict[str, str]:
        """Headers that save the next request the token."""
        if self.token is None or "token" not in query:
            return {}
        return {"Set-Cookie": f"{self.cookie}={self.pass_word}; HttpOnly; SameSite=Strict; Path=/"}


def _same(given: str, wanted: str) -> bool:
    return hmac.compare_digest(given.encode(errors="surrogateescape"), wanted.encode())


def _host_name(header: str) -> str:
    try:
        return urlsplit(f"//{header}").hostname or ""
    except ValueError:
        return ""


def _cookie(header: str, name: str) -> str:
    try:
        found = SimpleCookie(header).get(name)
    except CookieError:
        return ""
    return found.value if found else ""


class Server(ThreadingHTTPServer):
    """Answers each request in a thread that does not hold up the end."""

    daemon_threads = True
    gate: Gate
    pages: Pages

    def __init__(self, family: socket.AddressFamily, host: str, port: int) -> None:
        self.address_family = family
        super().__init__((host, port), Handler)

    def server_bind(self) -> None:
        """Without asking for this machine's name, which can take a minute."""
        socket.socket.setsockopt(self.socket, socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])


class Handler(BaseHTTPRequestHandler):
    """HTTP around `Pages`; knows only GET and HEAD."""

    server: Server  # type: ignore[assignment]
    protocol_version, server_version, sys_version = "HTTP/1.1", "spire-dist", ""
    timeout = 30

    def do_GET(self) -> None:
        """A page, a picture, JSON or metrics."""
        split = urlsplit(self.path)
        query = {key: values[-1] for key, values in parse_qs(split.query).items()}
        headers: Mapping[str, str] = self.headers  # type: ignore[assignment]
        gate = self.server.gate
        try:
            reply = gate.refusal(split.path, headers, query)
            known = reply is None and split.path.removeprefix("/") not in ASSETS
            more = gate.remembered(query) if known else {}
            self._send(reply or self.server.pages.reply(split.path, query), more)
        except (BrokenPipeError, ConnectionResetError, TimeoutError):
            self.close_connection = True
        except Exception:
            traceback.print_exc(file=sys.stderr)
            self._send(problem(500, "This page has failed; the terminal of `spire-dist monitor` says why."), {})

    do_HEAD = do_GET

    def refuse(self) -> None:
        """Anything that is meant to change something."""
        self.close_connection = True  # whatever it wanted to send stays unread
        self._send(problem(405, "Only to be looked at."), {"Allow": "GET, HEAD", "Connection": "close"})

    do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = refuse

    def _send(self, reply: Reply, more: Mapping[str, str]) -> None:
        body, headers = reply.body, POLICY | {"Content-Type": reply.kind} | dict(reply.headers) | dict(more)
        if reply.kind.startswith(("text/", "application/json")) and "gzip" in self.headers.get("Accept-Encoding", ""):
            body, headers = gzip.compress(body, 5), headers | {"Content-Encoding": "gzip"}
        self.send_response(reply.status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: a page that refreshes itself would fill the terminal."""
