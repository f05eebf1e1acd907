"""What real clients need around the experiment: certificates, keys, free ports, a relay that counts bytes, processes.

Everything here is for one machine and for drills on it: a relay listens on 127.0.0.1 only, certificates live for days,
and processes leave nothing behind, however the interpreter that started them ends. `cryptography` and `psutil` come
with an extra and are imported where they are needed; the rest is the standard library.
"""

from __future__ import annotations

import atexit
import contextlib
import ipaddress
import os
import secrets
import selectors
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import psutil

MISSING = 'certificates, keys and processes need {}: pip install "fedal[flower]"'


# ------------------------------------------------------------------------------------------------ certificates and keys


@dataclass(frozen=True)
class Certificates:
    """Three PEM files: the authority that clients trust, the server's certificate, and its private key (PKCS 8)."""

    ca: Path
    certificate: Path
    key: Path


def certificates(folder: str | Path, names: Sequence[str] = ("localhost", "127.0.0.1"), days: int = 7) -> Certificates:
    """A certificate authority and one server's certificate, new: ca.crt, server.pem and server.key (0600) in `folder`.

    names: host names and IP addresses that the server answers to. days: valid from an hour ago (clocks differ) until
    then. EC P-384, SHA-256, with the extensions that a strict check of RFC 5280 asks for. The authority's private key
    is not kept: who needs another certificate makes a new set, which replaces the old one's files.
    """
    try:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec
    except ImportError as error:
        raise ImportError(MISSING.format("cryptography")) from error

    if isinstance(names, str) or not names or not all(names):
        raise ValueError(f"names must be one or more host names or IP addresses, got {names!r}")
    if days < 1:
        raise ValueError(f"days must be >= 1, got {days}")
    begin = datetime.now(timezone.utc) - timedelta(hours=1)
    end = begin + timedelta(hours=1, days=days)
    ca_key, key = ec.generate_private_key(ec.SECP384R1()), ec.generate_private_key(ec.SECP384R1())
    ca_name = _common_name("fedal authority")  # sets are told apart by the key identifiers

    def signed(subject: x509.Name, public: ec.EllipticCurvePublicKey, ca: bool, **uses: bool) -> Any:
        usage = dict.fromkeys(
            (
                "digital_signature",
                "content_commitment",
                "key_encipherment",
                "data_encipherment",
                "key_agreement",
                "key_cert_sign",
                "crl_sign",
                "encipher_only",
                "decipher_only",
            ),
            False,
        )
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(ca_name)
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(begin)
            .not_valid_after(end)
            .add_extension(x509.BasicConstraints(ca=ca, path_length=0 if ca else None), critical=True)
            .add_extension(x509.KeyUsage(**{**usage, **uses}), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
        )

    authority = signed(ca_name, ca_key.public_key(), True, key_cert_sign=True, crl_sign=True)
    server = signed(_common_name("fedal server"), key.public_key(), False, digital_signature=True)
    server = server.add_extension(x509.SubjectAlternativeName([_general_name(n) for n in names]), critical=False)
    server = server.add_extension(x509.ExtendedKeyUsage([x509.ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    made = Certificates(folder / "ca.crt", folder / "server.pem", folder / "server.key")
    pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    _write(made.key, key.private_bytes(pem, pkcs8, serialization.NoEncryption()), 0o600)
    _write(made.certificate, server.sign(ca_key, hashes.SHA256()).public_bytes(pem), 0o644)
    _write(made.ca, authority.sign(ca_key, hashes.SHA256()).public_bytes(pem), 0o644)
    return made


def node_key(path: str | Path) -> tuple[Path, Path]:
    """A new EC P-384 key pair in OpenSSH's format: private at `path` (0600, no passphrase), public at `path`.pub.

    FileExistsError where either file is there already: a node that loses its key is another node.
    """
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ec
    except ImportError as error:
        raise ImportError(MISSING.format("cryptography")) from error

    private, public = Path(path), Path(f"{path}.pub")
    for file in (private, public):
        if os.path.lexists(file):
            raise FileExistsError(f"{file} is there already; a key is never overwritten: move it away, or name another")
    key = ec.generate_private_key(ec.SECP384R1())
    private.parent.mkdir(parents=True, exist_ok=True)
    pem, ssh = serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH
    _write(private, key.private_bytes(pem, ssh, serialization.NoEncryption()), 0o600)
    line = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    _write(public, line + b"\n", 0o644)
    return private, public


def _common_name(text: str) -> Any:
    from cryptography import x509

    return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text)])


def _general_name(name: str) -> Any:
    """A host as a certificate names it: IP addresses are not DNS names, and clients tell them apart."""
    from cryptography import x509

    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _write(path: Path, content: bytes, mode: int) -> None:
    """Under a temporary name, then renamed; a private file is never readable by others, not even for a moment."""
    part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
    try:
        with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(content)
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


# ---------------------------------------------------------------------------------------------------------------- ports


def free_ports(count: int) -> list[int]:
    """`count` different TCP ports that are free on 127.0.0.1 now; nobody keeps them free, so use them soon."""
    if count < 0:
        raise ValueError(f"count must be >= 0, got {count}")
    with contextlib.ExitStack() as held:  # all stay open until all are drawn: otherwise one could be drawn twice
        ports = []
        for _ in range(count):
            drawn = held.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM))
            drawn.bind(("127.0.0.1", 0))
            ports.append(drawn.getsockname()[1])
        return ports


class _Way:
    """One direction of a line: what was read at one end and not yet written to the other."""

    def __init__(self) -> None:
        self.waiting = bytearray()
        self.ended = False  # the sender has no more
        self.told = False  # and the receiver knows


class _Line:
    """A client's connection and the one to the target that belongs to it."""

    def __init__(self, client: socket.socket):
        self.client, self.target = client, None
        self.joined = False  # the target has answered
        self.up, self.down = _Way(), _Way()

    def ways(self) -> tuple[tuple[socket.socket, socket.socket, _Way], ...]:
        """(from, to, way) twice."""
        return (self.client, self.target, self.up), (self.target, self.client, self.down)


class Relay:
    """Forwards TCP from a port of 127.0.0.1 to a target, counts what passes, and breaks the line on request.

    It does not look inside: of TLS it counts what is on the wire. `port`: where it listens, 0 before `start`. `up`:
    bytes passed on from those who connect to the target; `down`: bytes passed back; `connections`: accepted so far
    (those that a cut line drops do not count). All three only grow, may be read from any thread at any time, and stay
    after `close`. target: an IPv4 address or a name of one.
    """

    _CHUNK = 1 << 16  # bytes read at once
    _MOST = 1 << 18  # bytes kept for a receiver who is slower than the sender, who then has to wait

    def __init__(self, target_port: int, target: str = "127.0.0.1"):
        if not 0 < target_port < 1 << 16:
            raise ValueError(f"target_port must be in 1..65535, got {target_port}")
        self.port = 0
        self._address = (target, target_port)
        self._state = "pass"
        self._count = {"up": 0, "down": 0, "connections": 0}
        self._lines: set[_Line] = set()
        self._wishes: deque[tuple[Callable[[], None], threading.Event]] = deque()
        self._closing = False
        self._thread: threading.Thread | None = None
        # Held while bytes move: who has received a byte finds it counted.
        self._lock = threading.Lock()

    # --- for everybody

    @property
    def up(self) -> int:
        with self._lock:
            return self._count["up"]

    @property
    def down(self) -> int:
        with self._lock:
            return self._count["down"]

    @property
    def connections(self) -> int:
        with self._lock:
            return self._count["connections"]

    def start(self) -> Relay:
        """Listen from now on; RuntimeError if it did before, OSError if the target's name is unknown."""
        if self._thread is not None or self._closing:
            raise RuntimeError("a relay is started once: make another")
        self._resolved = socket.getaddrinfo(*self._address, socket.AF_INET, socket.SOCK_STREAM)[0][4]
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self._listener.setblocking(False)
        self.port = self._listener.getsockname()[1]
        self._bell, self._ear = socket.socketpair()  # rung to end the thread's waiting
        for end in (self._bell, self._ear):
            end.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._ear, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._work, name=f"relay to port {self._address[1]}", daemon=True)
        self._thread.start()
        return self

    def cut(self) -> None:
        """Reset all open connections, what they had on the way included, and drop new ones as soon as they come."""
        self._do(lambda: self._turn("cut"))

    def hold(self) -> None:
        """Pass nothing on, but keep all connections and accept new ones: a line that hangs."""
        self._do(lambda: self._turn("hold"))

    def mend(self) -> None:
        """Forward again; after a hold, what was held goes on first, in order."""
        self._do(lambda: self._turn("pass"))

    def close(self) -> None:
        """End it: open connections are reset, the port is free, the thread is gone. Calling it again does nothing."""
        self._closing = True
        if self._thread is not None:
            self._ring()
            self._thread.join()

    def __enter__(self) -> Relay:
        return self if self._thread is not None else self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- between the callers' threads and the relay's

    def _ring(self) -> None:
        with contextlib.suppress(OSError):  # full: it rings already. Closed: nobody is left to hear it.
            self._bell.send(b"!")

    def _do(self, action: Callable[[], None]) -> None:
        """Have the relay's thread do this, and wait for it: when `cut` returns, the line is cut."""
        if self._thread is None:
            raise RuntimeError("the relay was not started")
        done = threading.Event()
        self._wishes.append((action, done))
        self._ring()
        while not done.wait(0.05):
            if not self._thread.is_alive():
                raise RuntimeError("the relay is closed")

    # --- in the relay's thread

    def _work(self) -> None:
        try:
            while not self._closing:
                for key, events in self._selector.select():
                    with self._lock:
                        if key.fileobj is self._listener:
                            self._accept()
                        elif key.fileobj is self._ear:
                            self._hear()
                        else:
                            self._serve(key.data, key.fileobj, events)
        finally:
            with self._lock:
                for line in list(self._lines):
                    self._drop(line)
            self._selector.close()
            for end in (self._listener, self._bell, self._ear):
                end.close()

    def _hear(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._ear.recv(4096)
        while self._wishes:
            action, done = self._wishes.popleft()
            action()
            done.set()

    def _turn(self, state: str) -> None:
        self._state = state
        if state == "cut":
            self._accept()  # those who wait at the door belong to the line that is cut now
        for line in list(self._lines):
            if state == "cut":
                self._drop(line)
            elif state == "pass" and line.target is None:
                self._connect(line)
            else:
                self._listen_to(line)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError:  # no file descriptor is left: the caller stays at the door, so do not ask at full speed
                time.sleep(0.05)
                return
            line = _Line(client)
            self._lines.add(line)
            if self._state == "cut":
                self._drop(line)
                continue
            self._count["connections"] += 1
            client.setblocking(False)
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # a delay of its own is no relay's business
            if self._state == "pass":
                self._connect(line)

    def _connect(self, line: _Line) -> None:
        try:
            line.target = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            line.target.setblocking(False)
            line.target.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            line.target.connect_ex(self._resolved)  # a failure shows when the socket becomes writable
            self._listen_to(line)
        except OSError:
            self._drop(line)

    def _serve(self, line: _Line, end: socket.socket, events: int) -> None:
        if line not in self._lines or self._state != "pass":  # dropped or held since `select` told of it
            return
        try:
            if not line.joined:
                error = end.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                # A port from the range that outgoing connections draw from can, with nobody there, answer itself.
                if error or end.getsockname() == end.getpeername():
                    raise ConnectionRefusedError(error, "the target is not there")
                line.joined = True
            else:
                for source, sink, way in line.ways():
                    if source is end and events & selectors.EVENT_READ:
                        self._read(source, way)
                        self._write_on(sink, way, "up" if way is line.up else "down")
                    elif sink is end and events & selectors.EVENT_WRITE:
                        self._write_on(sink, way, "up" if way is line.up else "down")
            if line.up.told and line.down.told:
                self._forget(line)
            else:
                self._listen_to(line)
        except OSError:  # reset at one end: the other end hears the same
            self._drop(line)

    def _read(self, source: socket.socket, way: _Way) -> None:
        try:
            chunk = source.recv(self._CHUNK)
        except BlockingIOError:
            return
        way.waiting += chunk
        way.ended = not chunk

    def _write_on(self, sink: socket.socket, way: _Way, name: str) -> None:
        while way.waiting:
            try:
                sent = sink.send(way.waiting)
            except BlockingIOError:
                return
            self._count[name] += sent
            del way.waiting[:sent]
        if way.ended and not way.told:
            sink.shutdown(socket.SHUT_WR)
            way.told = True

    def _listen_to(self, line: _Line) -> None:
        """Tell the selector what this line waits for now; nothing on hold: the kernel's buffers fill, senders wait."""
        wanted = {line.client: 0, line.target: 0}
        if self._state == "pass" and not line.joined:
            wanted[line.target] = selectors.EVENT_WRITE
        elif self._state == "pass":
            for source, sink, way in line.ways():
                if not way.ended and len(way.waiting) < self._MOST:
                    wanted[source] |= selectors.EVENT_READ
                if way.waiting:
                    wanted[sink] |= selectors.EVENT_WRITE
        for end, events in wanted.items():
            known = None if end is None else self._selector.get_map().get(end)
            if known and not events:
                self._selector.unregister(end)
            elif known and known.events != events:
                self._selector.modify(end, events, line)
            elif not known and events:
                self._selector.register(end, events, line)

    def _drop(self, line: _Line) -> None:
        """Close with a reset, as a broken line does, and not with the goodbye of a program that has ended."""
        linger = struct.pack("hh" if sys.platform == "win32" else "ii", 1, 0)
        for end in (line.client, line.target):
            if end is not None:
                with contextlib.suppress(OSError):
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self._forget(line)

    def _forget(self, line: _Line) -> None:
        self._lines.discard(line)
        for end in (line.client, line.target):
            if end is not None:
                with contextlib.suppress(KeyError, ValueError):
                    self._selector.unregister(end)
                end.close()


# ------------------------------------------------------------------------------------------------------------ processes

# A child of its own that waits for its parent to end, however that happens, and then kills all that carry the mark.
# PR_SET_PDEATHSIG is not used: setting it needs a preexec_fn, which runs Python between fork and exec and can deadlock
# where other threads hold locks; the signal comes when the *thread* that started the child ends, not the process; and
# grandchildren do not inherit it. It kills again for a while, since a process may be forking at that moment.
_WATCHER = """
import os, signal, sys, time
mark = os.fsencode(sys.argv[1]) + b"="
orphaned = not sys.stdin.buffer.read(1)
quiet, end = 0, time.monotonic() + 60
while orphaned and quiet < 10 and time.monotonic() < end:
    quiet += 1
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/environ", "rb") as file:
                if any(entry.startswith(mark) for entry in file.read().split(b"\\0")):
                    os.kill(int(pid), signal.SIGKILL)
                    quiet = 0
        except OSError:
            pass
    time.sleep(0.05)
"""


class Processes:
    """Named child processes, each with `folder`/name.log, that leave nothing behind.

    A child's descendants are found by their parents and, where they have lost these, by a mark in the environment that
    they inherit; each is remembered by its pid and the time it began, so that no reused pid is mistaken for it. What
    escapes: a descendant that throws its environment away and loses its parent before anybody looks. Leaving the
    `with` stops everything; an interpreter that ends without that stops it at exit; on Linux, one that is killed
    leaves a watcher, which kills what it had started. Children have a session of their own: Ctrl-C reaches them through
    us only. All methods may be called from any thread. kill, pause, resume and stop raise ValueError for a name that
    was never started, and TimeoutError for a process that does not react to a signal nobody can refuse.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._psutil = _psutil()
        self._mark = f"FEDAL_CHILD_{secrets.token_hex(8)}"
        self._popen: dict[str, subprocess.Popen] = {}  # in the order they were started
        self._seen: dict[str, set[psutil.Process]] = {}  # of each name, all that run, as far as we have looked
        self._watcher: subprocess.Popen | None = None
        self._owner = os.getpid()
        self._lock = threading.RLock()

    def start(
        self,
        name: str,
        command: Sequence[str],
        env: Mapping[str, str] | None = None,
        cwd: str | Path | None = None,
    ) -> subprocess.Popen:
        """Start `command` under this name; what it says is appended to its log, and it has nothing to read.

        env: the whole environment, None for ours. ValueError for a name that runs already or is no plain file name;
        OSError where the command is not found.
        """
        if isinstance(command, str) or not command:
            raise ValueError(f"command must be a list of words, got {command!r}")
        if name != Path(name).name or name in ("", ".."):
            raise ValueError(f"{name!r} cannot name a log file: allowed is a file name without folders")
        with self._lock:
            if self.running(name):
                raise ValueError(f"{name!r} runs already, as process {self._popen[name].pid}: stop it first")
            atexit.unregister(self._at_exit)
            atexit.register(self._at_exit)
            self._watch()
            with open(self.folder / f"{name}.log", "ab") as log:
                popen = subprocess.Popen(
                    [str(word) for word in command],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env={**(os.environ if env is None else env), self._mark: name},
                    cwd=cwd,
                    start_new_session=True,
                )
            self._popen.pop(name, None)
            self._popen[name] = popen
            with contextlib.suppress(self._psutil.NoSuchProcess):
                self._seen.setdefault(name, set()).add(self._psutil.Process(popen.pid))
            return popen

    def running(self, name: str) -> bool:
        """Has it been started, and has it not ended? A paused process runs; orphans of an ended one do not count."""
        popen = self._popen.get(name)
        return popen is not None and popen.poll() is None

    def log(self, name: str) -> str:
        """All that processes of this name have said; "" if none was started."""
        path = self.folder / f"{name}.log"
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

    def kill(self, name: str) -> None:
        """SIGKILL to it and all its descendants; they are gone when this returns. No error if they were before."""
        self._known(name)
        self._kill([name])

    def pause(self, name: str) -> None:
        """SIGSTOP to it and all its descendants: it hangs, and its connections stay. ValueError if it has ended."""
        self._known(name)
        if not self.running(name):
            raise ValueError(f"{name!r} has ended: there is nothing to pause")
        frozen = self._freeze([name])
        stopped = (self._psutil.STATUS_STOPPED, self._psutil.STATUS_TRACING_STOP)
        wait_for(
            lambda: all(self._status(process) in (None, *stopped) for process in frozen),
            10,
            f"{name} to stop running after SIGSTOP",
            every=0.01,
        )

    def resume(self, name: str) -> None:
        """SIGCONT to it and all its descendants."""
        self._known(name)
        self._signal(self._look([name]), "resume")

    def stop(self, name: str, patience: float = 10.0) -> None:
        """SIGTERM to it, `patience` seconds to end by itself, then `kill` what is left of it and its descendants.

        A paused process is resumed, to hear it.
        """
        self._known(name)
        self._stop([name], patience)

    def stop_all(self, patience: float = 10.0) -> None:
        """`stop` for all, the last started first: all are asked before any is waited for, `patience` seconds in all."""
        self._stop(None, patience)
        atexit.unregister(self._at_exit)
        self._unwatch()

    def alive(self) -> list[str]:
        """Pid and command of all that were started here, or descend from such, and still run; zombies do not.

        Empty after `stop_all`. The watcher is not told of: it ends with `stop_all`, or with its work.
        """
        told = []
        for process in sorted(self._look(), key=lambda process: process.pid):
            try:
                told.append(f"{process.pid} {' '.join(process.cmdline()) or process.name()}")
            except self._psutil.AccessDenied:
                told.append(f"{process.pid} (its command cannot be read)")
            except self._psutil.NoSuchProcess:  # ended since, or a zombie by now
                continue
        return told

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop_all()

    # --- who is there

    def _known(self, name: str) -> subprocess.Popen:
        if name not in self._popen:
            raise ValueError(f"no process {name!r} was started: there are {list(self._popen)}")
        return self._popen[name]

    def _popens(self, names: Sequence[str] | None) -> list[subprocess.Popen]:
        """What was started last under these names (None: under all), the latest first."""
        with self._lock:
            return [self._popen[name] for name in reversed(self._popen) if names is None or name in names]

    def _status(self, process: psutil.Process) -> str | None:
        """None for one that is gone, a zombie, or no longer the process that we knew under this pid."""
        try:
            if not process.is_running():
                return None
            status = process.status()
        except self._psutil.NoSuchProcess:
            return None
        except self._psutil.AccessDenied:
            return "unknown"
        return None if status in (self._psutil.STATUS_ZOMBIE, self._psutil.STATUS_DEAD) else status

    def _look(self, names: Sequence[str] | None = None) -> set[psutil.Process]:
        """All processes of these names that run now (None: of all names), and remember them; reaps the ended ones."""
        with self._lock:
            for popen in self._popen.values():
                popen.poll()
            for name, seen in self._seen.items():
                self._seen[name] = {process for process in seen if self._status(process)}
            children: dict[int, list[psutil.Process]] = {}  # by their parent's pid
            for pid in self._psutil.pids():
                # A zombie has nobody below it. What we may not look at is not ours.
                with contextlib.suppress(self._psutil.NoSuchProcess, self._psutil.AccessDenied):
                    process = self._psutil.Process(pid)
                    children.setdefault(process.ppid(), []).append(process)
                    marked = process.environ().get(self._mark)
                    if marked is not None:
                        self._seen.setdefault(marked, set()).add(process)
            for seen in self._seen.values():
                below = list(seen)
                while below:
                    # The parent ran a moment ago as the one that we know, so these are its children and no others.
                    fresh = set(children.get(below.pop().pid, ())) - seen
                    seen |= fresh
                    below += fresh
                seen -= {process for process in seen if self._status(process) is None}
            wanted = self._seen if names is None else names
            return set().union(*(self._seen.get(name, set()) for name in wanted))

    # --- what is done to them

    def _signal(self, processes: Iterable[psutil.Process], verb: str) -> None:
        for process in processes:
            with contextlib.suppress(self._psutil.NoSuchProcess, self._psutil.AccessDenied):
                getattr(process, verb)()

    def _freeze(self, names: Sequence[str] | None) -> set[psutil.Process]:
        """SIGSTOP to all of them, until no new one is found: who is stopped starts no further ones."""
        frozen: set[psutil.Process] = set()
        while fresh := self._look(names) - frozen:
            self._signal(fresh, "suspend")
            frozen |= fresh
        return frozen

    def _kill(self, names: Sequence[str] | None) -> None:
        popens = self._popens(names)
        # Found and stopped before the first one dies: with the parent gone, nobody could tell whose children they were.
        victims = self._freeze(names)
        self._signal(victims, "kill")
        for popen in popens:
            popen.kill()
        pids = ", ".join(str(process.pid) for process in victims)
        wait_for(
            lambda: not any(self._status(process) for process in victims) and all(p.poll() is not None for p in popens),
            10,
            f"processes {pids} to end after SIGKILL",
            every=0.01,
        )

    def _stop(self, names: Sequence[str] | None, patience: float) -> None:
        deadline = time.monotonic() + patience
        popens = self._popens(names)
        try:
            self._look()  # remember who belongs to whom as long as the parents can tell
            for popen in popens:
                popen.terminate()
            self._signal(self._look(names), "resume")
            while any(popen.poll() is None for popen in popens) and time.monotonic() < deadline:
                time.sleep(0.1)
                self._look()
        finally:  # an impatient Ctrl-C while we wait comes here, too
            self._kill(names)

    # --- when we end otherwise

    def _watch(self) -> None:
        if sys.platform != "linux" or (self._watcher is not None and self._watcher.poll() is None):
            return
        self._watcher = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _WATCHER, self._mark],
            stdin=subprocess.PIPE,  # its other end is ours alone; the kernel closes it, whatever ends us
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            bufsize=0,
            start_new_session=True,  # a signal to our group would take it along
        )

    def _unwatch(self) -> None:
        with self._lock:
            watcher, self._watcher = self._watcher, None
        if watcher is None:
            return
        with contextlib.suppress(OSError):  # it is gone already
            watcher.stdin.write(b".")
        watcher.stdin.close()
        try:
            watcher.wait(10)
        except subprocess.TimeoutExpired:
            watcher.kill()
            watcher.wait()

    def _at_exit(self) -> None:
        if os.getpid() == self._owner:  # a fork that ends must not take its parent's children along
            self.stop_all(patience=3)


def _psutil() -> Any:
    try:
        import psutil
    except ImportError as error:
        raise ImportError(MISSING.format("psutil")) from error
    return psutil


def wait_for(
    ready: Callable[[], bool],
    seconds: float,
    what: str,
    processes: Processes | None = None,
    name: str | None = None,
    every: float = 0.1,
) -> None:
    """Ask `ready` every so many seconds until it says yes; TimeoutError after `seconds`.

    With `processes` and `name`: RuntimeError as soon as that process has ended without `ready`. Both errors say what
    was waited for, and show the last 15 lines of the process' log.
    """
    if (processes is None) != (name is None):
        raise ValueError(f"processes and name belong together, got {processes!r} and {name!r}")
    popen = None if processes is None else processes._known(name)
    deadline = time.monotonic() + seconds
    while True:
        # Asked before `ready`: one that got ready and then ended is no error.
        code = None if popen is None else popen.poll()
        if ready():
            return
        said = "" if popen is None else _last_lines(processes, name)
        if code is not None:
            raise RuntimeError(f"{name} ended with exit code {code} while we waited for {what}{said}")
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError(f"waited {seconds:g} s for {what}, in vain{said}")
        time.sleep(min(every, left))


def _last_lines(processes: Processes, name: str, count: int = 15) -> str:
    lines = processes.log(name).splitlines()[-count:]
    return "\n".join([f"; the end of {name}.log:", *lines]) if lines else f"; {name}.log is empty"
