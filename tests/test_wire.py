"""Certificates, keys, ports, the relay and processes: what they promise is looked at from outside, with real ones."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import signal
import socket
import ssl
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from fedal_utils.flower.deployment import Processes, Relay, certificates, free_ports, node_key, wait_for

psutil = pytest.importorskip("psutil")
posix = pytest.mark.skipif(sys.platform == "win32", reason="signals and file modes are POSIX'")
linux = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


def read_all(end: socket.socket) -> bytes:
    """Until the other side has no more."""
    parts = []
    while part := end.recv(1 << 16):
        parts.append(part)
    return b"".join(parts)


def connect(port: int, host: str = "127.0.0.1") -> socket.socket:
    return socket.create_connection((host, port), timeout=5)


def is_cut(end: socket.socket) -> bool:
    """Has the connection been broken? A reset, not a proper end."""
    try:
        end.recv(1)
    except ConnectionError:
        return True
    return False


def is_refused(port: int) -> bool:
    """Is a new connection broken at once? The reset may come before or after we have noticed that it stands."""
    try:
        with connect(port) as end:
            return is_cut(end)
    except ConnectionError:
        return True


@contextlib.contextmanager
def server(serve, port: int = 0):
    """A TCP server on 127.0.0.1: `serve(connection)` in a thread for each; yields its port and its connections."""
    listener = socket.create_server(("127.0.0.1", port))
    taken, threads = [], []

    def one(connection):
        with contextlib.suppress(OSError, ssl.SSLError), connection:
            connection.settimeout(5)
            serve(connection)

    def accept():
        with contextlib.suppress(OSError):
            while True:
                taken.append(listener.accept()[0])
                threads.append(threading.Thread(target=one, args=(taken[-1],), daemon=True))
                threads[-1].start()

    door = threading.Thread(target=accept, daemon=True)
    door.start()
    try:
        yield listener.getsockname()[1], taken
    finally:
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)  # wakes accept
        listener.close()
        for thread in (door, *threads):
            thread.join(5)


def echo(connection):
    while part := connection.recv(1 << 16):
        connection.sendall(part)


def answer_at_the_end(connection):
    """Only who passes on a half-close gets an answer."""
    connection.sendall(hashlib.sha256(read_all(connection)).digest())


# --- certificates and keys --------------------------------------------------------------------------------------------


def strict(ca: Path) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=ca)
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    assert context.check_hostname
    return context


def tls_echo(made):
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(made.certificate, made.key)

    def serve(connection):
        with context.wrap_socket(connection, server_side=True) as inner:
            echo(inner)

    return serve


def test_strict_tls_over_a_relay_for_both_names_and_no_other(tmp_path):
    pytest.importorskip("cryptography")
    made = certificates(tmp_path / "own", days=3)
    context, secret = strict(made.ca), b"not to be read on the wire" * 50
    with server(tls_echo(made)) as (port, _), Relay(port) as relay:
        for name in ("localhost", "127.0.0.1"):
            before = relay.up
            with context.wrap_socket(connect(relay.port), server_hostname=name) as end:
                end.sendall(secret)
                got = b""
                while len(got) < len(secret):
                    got += end.recv(1 << 16)
                shown = end.getpeercert()
            assert got == secret
            assert relay.up - before > len(secret)  # TLS costs bytes, and the relay sees them
        for name in ("example.org", "127.0.0.2"):
            with pytest.raises(ssl.SSLCertVerificationError, match="mismatch"):
                context.wrap_socket(connect(relay.port), server_hostname=name)
    now = time.time()
    assert now - 7200 < ssl.cert_time_to_seconds(shown["notBefore"]) < now - 1800  # a clock may be slow
    assert now + 2.9 * 86400 < ssl.cert_time_to_seconds(shown["notAfter"]) < now + 3.1 * 86400


def test_another_authority_is_refused_even_one_made_in_the_same_folder(tmp_path):
    pytest.importorskip("cryptography")
    first = certificates(tmp_path)
    old = strict(first.ca)
    made = certificates(tmp_path)
    assert made == first
    with server(tls_echo(made)) as (port, _):
        with pytest.raises(ssl.SSLCertVerificationError):
            old.wrap_socket(connect(port), server_hostname="localhost")
        with strict(made.ca).wrap_socket(connect(port), server_hostname="localhost") as end:
            assert end.version() == "TLSv1.3"


@posix
def test_certificates_leave_three_files_and_no_key_of_the_authority(tmp_path):
    pytest.importorskip("cryptography")
    from cryptography import x509

    umask = os.umask(0)  # nothing but our own care protects the key
    try:
        made = certificates(tmp_path / "new" / "folder", names=["server.example", "10.1.2.3", "::1"])
    finally:
        os.umask(umask)
    assert sorted(p.name for p in made.ca.parent.iterdir()) == ["ca.crt", "server.key", "server.pem"]
    assert stat.S_IMODE(made.key.stat().st_mode) == 0o600
    assert "PRIVATE" not in made.ca.read_text() + made.certificate.read_text()
    server, authority = (x509.load_pem_x509_certificate(p.read_bytes()) for p in (made.certificate, made.ca))
    server.verify_directly_issued_by(authority)
    named = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert named.get_values_for_type(x509.DNSName) == ["server.example"]
    assert [str(a) for a in named.get_values_for_type(x509.IPAddress)] == ["10.1.2.3", "::1"]
    for certificate, is_ca in ((server, False), (authority, True)):
        limits = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
        assert limits.critical and limits.value.ca is is_ca
        assert certificate.public_key().curve.name == "secp384r1"
        assert certificate.signature_hash_algorithm.name == "sha256"


def test_certificates_refuse_what_they_cannot_certify(tmp_path):
    pytest.importorskip("cryptography")
    for names in ("localhost", [], ["localhost", ""]):
        with pytest.raises(ValueError, match="names must be one or more host names"):
            certificates(tmp_path, names=names)
    with pytest.raises(ValueError, match="days must be >= 1, got 0"):
        certificates(tmp_path, days=0)
    assert not list(tmp_path.iterdir())


@posix
def test_a_node_key_loads_belongs_together_and_is_never_overwritten(tmp_path):
    pytest.importorskip("cryptography")
    from cryptography.hazmat.primitives import serialization

    umask = os.umask(0)
    try:
        private, public = node_key(tmp_path / "keys" / "node")
    finally:
        os.umask(umask)
    assert (private, public) == (tmp_path / "keys" / "node", tmp_path / "keys" / "node.pub")
    assert sorted(p.name for p in private.parent.iterdir()) == ["node", "node.pub"]
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    key = serialization.load_ssh_private_key(private.read_bytes(), password=None)
    assert key.curve.name == "secp384r1"
    shown = serialization.load_ssh_public_key(public.read_bytes())
    assert key.public_key().public_numbers() == shown.public_numbers()
    before = private.read_bytes(), public.read_bytes()
    with pytest.raises(FileExistsError, match="node is there already"):
        node_key(private)
    assert (private.read_bytes(), public.read_bytes()) == before
    private.unlink()
    with pytest.raises(FileExistsError, match=r"node\.pub is there already"):
        node_key(private)
    assert not private.exists() and public.read_bytes() == before[1]


def test_what_is_not_installed_is_named_with_its_extra(tmp_path, monkeypatch):
    for name in ("cryptography", "psutil"):
        for module in [m for m in sys.modules if m.split(".")[0] == name]:
            monkeypatch.setitem(sys.modules, module, None)
        monkeypatch.setitem(sys.modules, name, None)
    for what, call in (("cryptography", certificates), ("cryptography", node_key), ("psutil", Processes)):
        with pytest.raises(ImportError, match=rf'need {what}: pip install "fedal\[flower\]"'):
            call(tmp_path / "none")


# --- ports ------------------------------------------------------------------------------------------------------------


def test_free_ports_differ_and_can_be_bound_all_at_once():
    assert len(set(free_ports(200))) == 200

    def bound(ports):
        with contextlib.ExitStack() as held:
            for port in ports:
                held.enter_context(socket.create_server(("127.0.0.1", port)))
        return len(ports)

    for attempt in range(3):  # somebody else on this machine may have taken one since
        with contextlib.suppress(OSError if attempt < 2 else ()):
            assert bound(free_ports(20)) == 20
            break
    assert free_ports(0) == []
    with pytest.raises(ValueError, match="count must be >= 0, got -1"):
        free_ports(-1)


# --- the relay --------------------------------------------------------------------------------------------------------


def test_the_relay_counts_every_byte_of_several_connections_at_once():
    sizes = [1, 65_536, 65_537, 1_000_003, 2_000_000, 3_145_728]
    wrong = []

    def client(size, port):
        sent = secrets.token_bytes(size)
        with connect(port) as end:
            sender = threading.Thread(target=lambda: (end.sendall(sent), end.shutdown(socket.SHUT_WR)))
            sender.start()
            if read_all(end) != sent:
                wrong.append(size)
            sender.join()

    with server(echo) as (port, _), Relay(port) as relay:
        clients = [threading.Thread(target=client, args=(size, relay.port)) for size in sizes]
        for thread in clients:
            thread.start()
        for thread in clients:
            thread.join()
        assert not wrong
        assert (relay.up, relay.down, relay.connections) == (sum(sizes), sum(sizes), len(sizes))


def test_up_and_down_are_told_apart_and_both_ways_flow_at_once():
    down = secrets.token_bytes(5_000_000)
    up = secrets.token_bytes(3_000_000)
    heard = []

    def serve(connection):
        sender = threading.Thread(target=connection.sendall, args=(down,))
        sender.start()
        heard.append(read_all(connection))
        sender.join()

    with server(serve) as (port, _), Relay(port) as relay:
        with connect(relay.port) as end:
            sender = threading.Thread(target=lambda: (end.sendall(up), end.shutdown(socket.SHUT_WR)))
            sender.start()
            assert read_all(end) == down
            sender.join()
        assert heard == [up]
        assert (relay.up, relay.down) == (len(up), len(down))
    assert (relay.up, relay.down, relay.connections) == (len(up), len(down), 1)  # also when it is closed


def test_what_has_arrived_is_counted_already():
    with server(echo) as (port, _), Relay(port) as relay, connect(relay.port) as end:
        for i in range(1, 301):
            end.sendall(b"x")
            assert end.recv(1) == b"x"
            assert (relay.up, relay.down) == (i, i)


def test_a_slow_receiver_slows_the_sender_down_and_loses_nothing():
    sent, heard, awake = secrets.token_bytes(24_000_000), [], threading.Event()

    def serve(connection):
        awake.wait(5)
        heard.append(read_all(connection))

    with server(serve) as (port, _), Relay(port) as relay, connect(relay.port) as end:
        sender = threading.Thread(target=lambda: (end.sendall(sent), end.shutdown(socket.SHUT_WR)))
        sender.start()
        sender.join(0.3)
        assert sender.is_alive() and relay.up < len(sent)  # the relay does not take in what it cannot hand on
        awake.set()
        sender.join()
        wait_for(lambda: heard, 5, "the receiver")
        assert heard == [sent] and relay.up == len(sent)


def test_a_half_close_is_passed_on_and_the_other_direction_goes_on():
    with server(answer_at_the_end) as (port, _), Relay(port) as relay, connect(relay.port) as end:
        end.sendall(b"question")
        end.shutdown(socket.SHUT_WR)
        assert read_all(end) == hashlib.sha256(b"question").digest()
        assert (relay.up, relay.down) == (8, 32)

    heard = []

    def says_goodbye_first(connection):
        connection.sendall(b"hello")
        connection.shutdown(socket.SHUT_WR)
        heard.append(read_all(connection))

    with server(says_goodbye_first) as (port, _), Relay(port) as relay, connect(relay.port) as end:
        assert read_all(end) == b"hello"
        end.sendall(b"still here")
        end.shutdown(socket.SHUT_WR)
        wait_for(lambda: heard == [b"still here"], 5, "the server to hear it")


def test_a_reset_at_one_end_is_a_reset_at_the_other():
    with server(echo) as (port, taken), Relay(port) as relay, connect(relay.port) as end:
        end.sendall(b"x")
        assert end.recv(1) == b"x"
        taken[0].setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        taken[0].shutdown(socket.SHUT_RD)  # wakes the server's thread, which closes it: a reset, as set above
        assert is_cut(end)


def test_hold_lets_nothing_through_and_mend_loses_nothing():
    heard = []
    many = secrets.token_bytes(12_000_000)  # more than all buffers between here and there hold
    with server(lambda connection: heard.append(read_all(connection))) as (port, taken), Relay(port) as relay:
        with connect(relay.port) as end:
            end.sendall(b"first")
            wait_for(lambda: relay.up == 5, 5, "the first bytes")
            relay.hold()
            sender = threading.Thread(target=lambda: (end.sendall(many), end.shutdown(socket.SHUT_WR)))
            sender.start()
            late = connect(relay.port)  # is let in, and hears nothing
            late.sendall(b"late")
            late.settimeout(0.3)
            wait_for(lambda: relay.connections == 2, 5, "the second connection")
            busy = time.process_time()
            with pytest.raises(TimeoutError):
                late.recv(1)
            assert time.process_time() - busy < 0.15  # it sleeps
            assert sender.is_alive() and relay.up == 5 and len(taken) == 1 and not heard
            for _ in range(20):  # stutters in the middle of the flow
                relay.mend()
                relay.hold()
            before = relay.up
            time.sleep(0.05)
            assert relay.up == before
            relay.mend()
            sender.join()
            late.shutdown(socket.SHUT_WR)
            wait_for(lambda: len(heard) == 2, 5, "both ends")
            late.close()
        assert sorted(heard, key=len) == [b"late", b"first" + many]
        assert relay.up == 9 + len(many)


def test_cut_resets_what_is_open_drops_what_comes_and_mend_lets_new_ones_in():
    broken = []

    def serve(connection):
        connection.sendall(connection.recv(1))
        broken.append(is_cut(connection))

    with server(serve) as (port, _), Relay(port) as relay:
        with connect(relay.port) as end, connect(relay.port) as held:
            end.sendall(b"x")
            assert end.recv(1) == b"x"
            wait_for(lambda: relay.connections == 2, 5, "both connections")
            relay.hold()
            held.sendall(b"y")
            relay.cut()
            assert is_cut(end) and is_cut(held)
            wait_for(lambda: True in broken, 5, "the server to be told")
            counts = relay.up, relay.down, relay.connections
            assert is_refused(relay.port)
            assert (relay.up, relay.down, relay.connections) == counts == (1, 1, 2)
            relay.mend()
            with pytest.raises(ConnectionError):  # a mended line does not bring the old connections back
                end.sendall(b"x")
        with connect(relay.port) as end:
            end.sendall(b"z")
            assert end.recv(1) == b"z"


def test_without_a_target_the_caller_is_dropped_and_the_relay_lives_on():
    (port,) = free_ports(1)
    with Relay(port) as relay:
        for _ in range(3):
            assert is_refused(relay.port)
        with server(echo, port), connect(relay.port) as end:
            end.sendall(b"now")
            assert end.recv(3) == b"now"
        assert (relay.up, relay.down, relay.connections) == (3, 3, 4)


@linux
def test_a_port_that_answers_itself_is_no_target(monkeypatch):
    class Unlucky(socket.socket):
        """Draws, of all outgoing ports, the one that it connects to; the kernel allows it."""

        def connect_ex(self, address):
            self.bind(address)
            return super().connect_ex(address)

    (port,) = free_ports(1)
    monkeypatch.setattr(socket, "socket", Unlucky)
    with Relay(port) as relay:
        assert is_refused(relay.port)


def sockets() -> set[str]:
    """Of this process, as the kernel names them."""
    found = set()
    for file in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            found.add(os.readlink(file))
    return {name for name in found if name.startswith("socket:")}


@linux
def test_close_twice_leaves_no_thread_no_socket_and_no_open_connection():
    with server(echo) as (port, _):
        threads, held = set(threading.enumerate()), sockets()
        relay = Relay(port)
        assert relay.port == 0
        relay.start()
        with connect(relay.port) as end, connect(relay.port) as idle:
            end.sendall(b"x")
            assert end.recv(1) == b"x"
            assert set(threading.enumerate()) > threads
            relay.close()
            assert is_cut(end) and is_cut(idle)
        relay.close()
        extra = {t for t in set(threading.enumerate()) - threads if "relay" in t.name}
        assert not extra
        wait_for(lambda: sockets() <= held, 5, "the server to close its side")
        with pytest.raises(ConnectionRefusedError):
            connect(relay.port)
        for call in (relay.cut, relay.hold, relay.mend):
            with pytest.raises(RuntimeError, match="closed"):
                call()
        with pytest.raises(RuntimeError, match="started once"):
            relay.start()


def test_a_relay_that_never_started_says_so():
    relay = Relay(1)
    with pytest.raises(RuntimeError, match="not started"):
        relay.cut()
    relay.close()
    for port in (0, 65_536):
        with pytest.raises(ValueError, match=f"target_port must be in 1..65535, got {port}"):
            Relay(port)


# --- processes --------------------------------------------------------------------------------------------------------

PYTHON = [sys.executable, "-I", "-S", "-c"]
SLEEP = "import time; time.sleep(60)"
# Says a descendant's pid: a session of its own, and with "bare" an empty environment as well.
FAMILY = f"""
import subprocess, sys, time
bare = {{"env": {{}}}} if "bare" in sys.argv else {{}}
child = subprocess.Popen([sys.executable, "-I", "-S", "-c", {SLEEP!r}], start_new_session=True, **bare)
print(child.pid, flush=True)
time.sleep(0.5 if "short" in sys.argv else 0 if "gone" in sys.argv else 60)
"""
POLITE = """
import signal, sys, time
def end(*_):
    print("bye", flush=True)
    sys.exit(3)
signal.signal(signal.SIGTERM, end)
print("ready", flush=True)
while True:
    time.sleep(0.01)
"""
DEAF = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True); time.sleep(60)"


def runs(pid: int) -> bool:
    """Our own look, that shares no code with the module's."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def says(processes: Processes, name: str, text: str = "\n") -> str:
    """Wait until its log holds this."""
    wait_for(lambda: text in processes.log(name), 10, f"{text!r}", processes, name)
    return processes.log(name)


@pytest.fixture
def processes(tmp_path):
    with Processes(tmp_path / "logs") as started:
        yield started
    assert started.alive() == []


@linux
@pytest.mark.parametrize("way", ["kill", "stop", "stop_all"])
@pytest.mark.parametrize("environment", ["inherited", "bare"])
def test_a_grandchild_in_a_session_of_its_own_goes_too(processes, way, environment):
    child = processes.start("family", [*PYTHON, FAMILY, environment])
    grandchild = int(says(processes, "family"))
    assert os.getsid(grandchild) == grandchild != os.getsid(child.pid)
    assert [int(line.split()[0]) for line in processes.alive()] == sorted([child.pid, grandchild])
    assert all(sys.executable in line for line in processes.alive())
    processes.stop_all() if way == "stop_all" else getattr(processes, way)("family")
    assert not runs(child.pid) and not runs(grandchild) and processes.alive() == []
    assert child.returncode == (-signal.SIGKILL if way == "kill" else -signal.SIGTERM)
    assert not Path(f"/proc/{child.pid}").exists()  # reaped


@linux
@pytest.mark.parametrize("life", ["short bare", "gone"])
def test_an_orphan_is_found_because_it_was_seen_or_by_its_mark(processes, life):
    child = processes.start("family", [*PYTHON, FAMILY, *life.split()])
    grandchild = int(says(processes, "family"))
    if "bare" in life:
        assert len(processes.alive()) == 2  # only this look makes it known
    assert child.wait(5) == 0 and runs(grandchild) and not processes.running("family")
    assert [int(line.split()[0]) for line in processes.alive()] == [grandchild]
    again = processes.start("family", [*PYTHON, SLEEP])  # the name is free; the orphan is not forgotten
    processes.kill("family")
    assert not runs(grandchild) and not runs(again.pid) and processes.alive() == []


@linux
def test_a_process_that_starts_others_all_the_time_leaves_none(processes):
    token = f"60.{secrets.randbelow(10**9):09d}"
    code = (
        "import subprocess, sys, time\n"
        "for i in range(1000):\n"
        f"    subprocess.Popen(['/bin/sleep', '{token}'], start_new_session=True, env={{}})\n"
        "    i == 5 and print('going', flush=True)"
    )
    processes.start("storm", [*PYTHON, code])
    says(processes, "storm")
    processes.kill("storm")
    assert [p.pid for p in psutil.process_iter(["cmdline"]) if token in (p.info["cmdline"] or [])] == []


@linux
def test_a_reused_pid_is_nobody_of_ours(processes):
    processes.start("own", [*PYTHON, SLEEP])
    stranger = subprocess.Popen([*PYTHON, SLEEP])
    try:
        known = psutil.Process(stranger.pid)
        known._ident = (stranger.pid, known._ident[1] - 1)  # the same pid, but of a process that began earlier
        known._hash = None
        processes._seen["own"].add(known)
        assert len(processes.alive()) == 1
        processes.kill("own")
        time.sleep(0.05)
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


@posix
def test_stop_is_polite_first_and_knows_an_exit_code(processes):
    polite = processes.start("polite", [*PYTHON, POLITE])
    says(processes, "polite", "ready")
    begin = time.monotonic()
    processes.stop("polite", patience=10)
    assert time.monotonic() - begin < 5
    assert polite.returncode == 3 and processes.log("polite") == "ready\nbye\n"
    processes.stop("polite")  # again: nothing to do
    processes.kill("polite")


@posix
def test_who_does_not_hear_is_killed_after_patience_all_in_one_time(processes):
    deaf = [processes.start(name, [*PYTHON, DEAF]) for name in "abc"]
    for name in "abc":
        says(processes, name, "ready")
    asked = []
    for name, popen in zip("abc", deaf, strict=True):
        popen.terminate = lambda name=name, real=popen.terminate: (asked.append(name), real())
    begin = time.monotonic()
    processes.stop_all(patience=0.6)
    assert 0.6 <= time.monotonic() - begin < 1.7  # one after the other it would be 1.8
    assert [popen.returncode for popen in deaf] == [-signal.SIGKILL] * 3
    assert asked == ["c", "b", "a"]


@linux
def test_pause_stops_everybody_below_and_resume_lets_them_go_on(processes, tmp_path):
    count = tmp_path / "count"
    counter = (
        "import sys, time\nfor i in range(100000):\n    print(i, file=open(sys.argv[1], 'a'))\n    time.sleep(0.002)"
    )
    parent = "import subprocess, sys; subprocess.run([sys.executable, '-c', *sys.argv[1:]], start_new_session=True)"
    processes.start("counter", [*PYTHON, parent, counter, str(count)])
    wait_for(lambda: count.exists() and count.stat().st_size > 20, 10, "the counter", processes, "counter")
    processes.pause("counter")
    held = count.stat().st_size
    time.sleep(0.3)
    assert count.stat().st_size == held and processes.running("counter") and len(processes.alive()) == 2
    processes.resume("counter")
    wait_for(lambda: count.stat().st_size > held + 20, 5, "the counter to go on", processes, "counter")
    numbers = count.read_text().split("\n")[:-1]
    assert [int(n) for n in numbers] == list(range(len(numbers)))


@posix
def test_a_paused_process_can_be_stopped_politely_and_killed(processes):
    polite, other = processes.start("polite", [*PYTHON, POLITE]), processes.start("other", [*PYTHON, POLITE])
    says(processes, "polite", "ready")
    processes.pause("polite")
    processes.stop("polite", patience=10)
    assert polite.returncode == 3 and "bye" in processes.log("polite")
    says(processes, "other", "ready")
    processes.pause("other")
    processes.kill("other")
    assert other.returncode == -signal.SIGKILL
    with pytest.raises(ValueError, match="'other' has ended"):
        processes.pause("other")


def test_names_logs_environment_and_folder(processes, tmp_path):
    code = "import os, sys; print(os.environ['WORD'], os.getcwd()); print('err', file=sys.stderr); sys.stdin.read()"
    assert processes.log("a") == "" and not processes.running("a")
    for word in ("eins", "zwei"):
        process = processes.start("a", [sys.executable, "-c", code], {**os.environ, "WORD": word}, cwd=tmp_path)
        assert process.wait(10) == 0  # its stdin is empty, not ours
    said = processes.log("a").splitlines()
    assert sorted(said) == sorted([f"eins {tmp_path}", "err", f"zwei {tmp_path}", "err"])
    assert (processes.folder / "a.log").read_text().splitlines() == said
    running = processes.start("a", [*PYTHON, SLEEP])
    with pytest.raises(ValueError, match=f"'a' runs already, as process {running.pid}"):
        processes.start("a", [*PYTHON, SLEEP])
    assert processes.running("a") and len(processes.alive()) == 1
    for name in ("", ".", "..", "b/c", "/b"):
        with pytest.raises(ValueError, match="cannot name a log file"):
            processes.start(name, [*PYTHON, SLEEP])
    with pytest.raises(ValueError, match="command must be a list of words"):
        processes.start("b", "sleep 60")
    with pytest.raises(FileNotFoundError):
        processes.start("b", [str(tmp_path / "none")])
    for call in (processes.kill, processes.pause, processes.resume, processes.stop):
        with pytest.raises(ValueError, match=r"no process 'b' was started: there are \['a'\]"):
            call("b")


@posix
def test_a_child_outlives_the_thread_that_started_it(processes):
    thread = threading.Thread(target=processes.start, args=("child", [*PYTHON, POLITE]))
    thread.start()
    thread.join()
    says(processes, "child", "ready")
    time.sleep(0.1)
    assert processes.running("child")


@linux
@pytest.mark.parametrize("end", ["returns", "raises", "is terminated", "is killed"])
def test_an_interpreter_that_ends_without_stopping_leaves_nothing(root, tmp_path, end):
    code = f"""
import os, sys, time
sys.path.insert(0, {str(root)!r})
from fedal_utils.wire import Processes, wait_for
processes = Processes({str(tmp_path)!r})
child = processes.start("family", [sys.executable, "-c", {FAMILY!r}])
wait_for(lambda: "\\n" in processes.log("family"), 10, "family")
print(child.pid, int(processes.log("family")), processes._watcher.pid, flush=True)
if {end!r} == "raises":
    raise KeyError("oops")
while {end!r}.startswith("is"):
    time.sleep(0.1)
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as script:
        pids = [int(word) for word in script.stdout.readline().split()]
        assert len(pids) == 3, script.stderr.read()
        if end.startswith("is"):
            assert all(runs(pid) for pid in pids)
            script.send_signal(signal.SIGKILL if end == "is killed" else signal.SIGTERM)
        script.communicate(timeout=20)
    assert script.returncode == {"returns": 0, "raises": 1, "is terminated": -15, "is killed": -9}[end]
    if end.startswith("is"):  # the watcher needs a moment
        wait_for(lambda: not any(runs(pid) for pid in pids), 10, f"{pids} to go")
    assert not any(runs(pid) for pid in pids)


@linux
def test_stop_all_ends_the_watcher_too_and_start_works_after_it(tmp_path):
    before = {p.pid for p in psutil.Process().children()}
    processes = Processes(tmp_path)
    for _ in range(2):
        processes.start("a", [*PYTHON, SLEEP])
        assert len({p.pid for p in psutil.Process().children()} - before) == 2
        processes.stop_all()
        assert {p.pid for p in psutil.Process().children()} == before  # zombies would be among them
    processes.stop_all()


# --- waiting ----------------------------------------------------------------------------------------------------------


def test_wait_for_asks_until_it_is_ready_and_says_what_it_waited_for_in_vain(processes):
    asked = []
    wait_for(lambda: asked.append(0) or len(asked) == 3, 5, "three", every=0.01)
    assert len(asked) == 3
    wait_for(lambda: True, 0, "what is there already")
    with pytest.raises(TimeoutError, match=r"waited 0\.2 s for a miracle, in vain$"):
        wait_for(lambda: False, 0.2, "a miracle")
    code = "print(*range(20), sep='\\n', flush=True); import time; time.sleep(60)"
    processes.start("talker", [*PYTHON, code])
    says(processes, "talker", "19\n")
    with pytest.raises(TimeoutError) as raised:
        wait_for(lambda: False, 0.1, "a miracle", processes, "talker")
    lines = str(raised.value).splitlines()
    assert "0.1 s for a miracle" in lines[0] and "talker.log" in lines[0]
    assert lines[1:] == [str(i) for i in range(5, 20)]  # 15 of 20
    with pytest.raises(ValueError, match="belong together"):
        wait_for(lambda: True, 1, "it", processes)
    with pytest.raises(ValueError, match="no process 'nobody' was started"):
        wait_for(lambda: True, 1, "it", processes, "nobody")


def test_wait_for_does_not_wait_for_who_has_ended(processes):
    processes.start("short", [*PYTHON, "print('I give up'); raise SystemExit(7)"])
    begin = time.monotonic()
    with pytest.raises(RuntimeError, match="(?s)short ended with exit code 7 while .* for a miracle.*\nI give up$"):
        wait_for(lambda: False, 30, "a miracle", processes, "short")
    assert time.monotonic() - begin < 10
    wait_for(lambda: True, 1, "what it left", processes, "short")  # ready, and ended: no error
    processes.start("silent", [*PYTHON, ""])
    with pytest.raises(RuntimeError, match=r"silent ended with exit code 0 .*silent\.log is empty"):
        wait_for(lambda: False, 30, "a word", processes, "silent")
