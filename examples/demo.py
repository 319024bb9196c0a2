"""The main job of Sluice on real sandboxes, step by step: what was typed, what came back, a mark.

``make demo`` runs this. It makes a system of five domains in a temporary folder from the files in
``examples/demo``, starts it, shows seven things and takes everything away again. The exit status is
not zero when a step did not do what it should.
"""

from __future__ import annotations

import contextlib
import http.server
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from sluice import runtime

HERE = Path(__file__).resolve().parent
SLUICE = str(Path(sys.executable).with_name("sluice"))
PRICE = "64219.50"
SIZE = 256 << 20
SPEED_SIZE = 256 << 20
SETUPS = 12


class PriceServer(http.server.BaseHTTPRequestHandler):
    """The world outside: an HTTP server on the host's loopback that knows a price."""

    def do_GET(self) -> None:
        body = f"{PRICE}\n".encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing on the demo's terminal."""


class Screen:
    """Prints the steps and counts the marks."""

    def __init__(self) -> None:
        self.colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        self.good = 0
        self.steps = 0
        self.hidden = 0

    def paint(self, text: str, code: str) -> str:
        return f"\033[{code}m{text}\033[0m" if self.colour else text

    def step(self, title: str) -> None:
        self.steps += 1
        print(f"\n{self.paint(f'{self.steps}. {title}', '1')}")

    def typed(self, where: str, command: str) -> None:
        print(f"   {self.paint(f'[{where}]$', '36')} {command}")

    def came(self, text: str) -> None:
        for line in text.rstrip("\n").splitlines() or ["(nothing)"]:
            print(f"   {line}")

    def note(self, text: str) -> None:
        print(f"   {self.paint(text, '2')}")

    def mark(self, good: bool, what: str) -> bool:
        mark = self.paint("ok  ", "32") if good else self.paint("FAIL", "31")
        print(f"   {mark} {what}")
        return good

    def end_of_step(self, *marks: bool) -> None:
        self.good += all(marks)


class System:
    """The demo's system: a configuration folder of its own, started and stopped by ``sluice``."""

    def __init__(self, root: Path, kind: str) -> None:
        self.root = root
        self.kind = kind
        self.environment = {
            k: v for k, v in os.environ.items() if not k.startswith(("SLUICE", "QREXEC"))
        }

    def prepare(self, port: int) -> None:
        config = self.root / "config"
        shutil.copytree(HERE / "demo", config, symlinks=True)
        (config / "price-port").write_text(f"{port}\n")
        (config / "rpc" / "qubes.ConnectTCP").symlink_to("/dev/tcp/127.0.0.1")
        policy = config / "policy.d" / "30-demo.policy"
        policy.write_text(
            policy.read_text().replace(
                "qubes.ConnectTCP *         ", f"qubes.ConnectTCP +{port}     "
            )
        )
        system = config / "system.toml"
        system.write_text(
            system.read_text().replace('kind = "bubblewrap"', f'kind = "{self.kind}"')
        )
        if self.kind == "process":
            # Such a domain sees the host's files: Sluice lies where it lies on the host.
            link = config / "template/host/etc/qubes-rpc/qrexec-proxy"
            link.unlink()
            link.symlink_to(runtime.launcher("qrexec-proxy"))

    def sluice(
        self, *words: str, stdin: str | None = None, timeout: float = 60
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [SLUICE, *words[:1], "--root", str(self.root), *words[1:]],
            input=stdin if stdin is not None else "",
            capture_output=True,
            text=True,
            timeout=timeout,
            env=self.environment,
            check=False,
        )

    def inside(
        self, domain: str, command: str, timeout: float = 60
    ) -> subprocess.CompletedProcess[str]:
        """Run a shell command in a domain, as a person there would type it."""
        return self.sluice("run", domain, "--", "bash", "-c", command, timeout=timeout)


@contextlib.contextmanager
def price_server() -> Iterator[int]:
    """Serve the price on a port of the loopback while the block runs."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), PriceServer)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()


def show(screen: Screen, system: System, domain: str, command: str) -> tuple[int, str]:
    """Type a command in a domain, show what came back, return exit status and all output."""
    screen.typed(domain, command)
    done = system.inside(domain, command)
    output = done.stdout + done.stderr
    screen.came(output)
    return done.returncode, output


def step_add(screen: Screen, system: System) -> None:
    screen.step("Two domains add two numbers (the first example of the Qubes manual)")
    client = "/usr/local/bin/our_test_add_client"
    if system.kind == "process":
        client = "$SLUICE_PROCESS_ROOT" + client
    code, output = show(
        screen,
        system,
        "work",
        f"qrexec-client-vm vault test.Add {client} 1 2",
    )
    screen.end_of_step(screen.mark(code == 0 and output == "3\n", "the vault answered 3"))


def step_file(screen: Screen, system: System) -> None:
    screen.step("An argument that the policy looks at: who may read which file")
    screen.note("policy: +testfile1 work vault allow; +testfile2 wallet vault allow; the rest deny")
    marks = []
    for domain, name, allowed in (
        ("work", "testfile1", True),
        ("work", "testfile2", False),
        ("wallet", "testfile1", False),
        ("wallet", "testfile2", True),
    ):
        code, output = show(screen, system, domain, f"qrexec-client-vm vault test.File+{name}")
        if allowed:
            expected = (HERE / "demo" / name).read_text()
            marks.append(screen.mark(code == 0 and output == expected, "allowed"))
        else:
            refused = code == 126 and output == "Request refused\n"
            marks.append(screen.mark(refused, "refused by policy, exit status 126"))
    screen.end_of_step(*marks)


def step_price(screen: Screen, system: System) -> None:
    screen.step("A wallet without network learns the price from a domain that may ask for it")
    _, devices = show(screen, system, "wallet", "tail -n +3 /proc/net/dev | cut -d: -f1 | xargs")
    no_network = devices.split() in ([], ["lo"])
    code, output = show(screen, system, "wallet", "qrexec-client-vm untrusted my.GetBTCprice")
    marks = [screen.mark(code == 0 and output.strip() == PRICE, "the price came by a call")]
    port = (system.root / "config" / "price-port").read_text().strip()
    code, _ = show(
        screen, system, "wallet", f"qrexec-client-vm dom0 qubes.ConnectTCP+{port} </dev/null"
    )
    marks.append(screen.mark(code == 126, "the wallet itself may not reach that port"))
    if system.kind == "bubblewrap":
        marks.append(screen.mark(no_network, "the wallet has no network device"))
    else:
        screen.hidden += 1
        screen.note("not shown: the kind `process` does not separate networks")
    screen.end_of_step(*marks)


def step_timeout(screen: Screen, system: System) -> None:
    screen.step("Through the proxy: a call that takes too long is ended (chain `timeout`, 1 s)")
    call = "qrexec-client-vm proxy qrexec-proxy+timeout+vault+qrexec-mirror"
    code, output = show(screen, system, "work", f"{call} <<< 'hello world'")
    marks = [screen.mark(code == 0 and output == "hello world\n", "the mirror answered")]
    code, output = show(screen, system, "work", f"{call} < <(sleep 3; echo 'hello world')")
    marks.append(screen.mark(code != 0 and output == "", "nothing came back"))
    if system.kind == "process":
        # Such a domain uses the host's system log, or a file where there is none.
        _, reason = show(screen, system, "proxy", "tail -n 1 ~/.local/state/sluice/proxy/proxy.log")
    else:
        screen.typed("host", "sluice log --domain proxy")
        reason = wait_for_log(system, "timeout")
        screen.came(reason)
    marks.append(screen.mark("timeout" in reason, "the log says why"))
    screen.end_of_step(*marks)


def wait_for_log(system: System, word: str) -> str:
    """Return the last line that the domain ``proxy`` logged with ``word``; it may lag behind."""
    for _ in range(20):
        done = system.sluice("log", "--domain", "proxy")
        lines = [li for li in done.stdout.splitlines() if word in li and "  proxy: " in li]
        if lines:
            return lines[-1]
        time.sleep(0.1)
    return ""


def step_one_way(screen: Screen, system: System) -> None:
    screen.step("One way only: 256 MiB go in, not one byte comes back (chain `src2dst`)")
    show(
        screen,
        system,
        "work",
        f"head -c {SIZE} /dev/urandom > data; sha256sum < data",
    )
    before = system.inside("work", "sha256sum < data").stdout.split()[0]
    code, output = show(
        screen,
        system,
        "work",
        "qrexec-client-vm proxy qrexec-proxy+src2dst+vault+demo.Keep < data | wc -c; rm data",
    )
    back = screen.mark(output.split()[:1] == ["0"], "not one byte came back, though it spoke")
    _, output = show(screen, system, "vault", "cat kept.sha256")
    same = screen.mark(output.split()[:1] == [before], "all of it arrived, unchanged")
    screen.end_of_step(back, same, code == 0)


def step_admin(screen: Screen, system: System) -> None:
    screen.step("A service of the AdminVM, for those that may call it")
    code, output = show(screen, system, "work", "qrexec-client-vm dom0 demo.Time")
    allowed = screen.mark(code == 0 and output.startswith("work asked at"), "allowed for work")
    code, output = show(screen, system, "wallet", "qrexec-client-vm dom0 demo.Time")
    refused = screen.mark(code == 126, "refused for wallet")
    screen.typed("host", "sluice log")
    lines = system.sluice("log").stdout.splitlines()[-2:]
    screen.came("\n".join(lines))
    told = screen.mark(len(lines) == 2 and "wallet" in lines[-1], "one record for each call")
    screen.end_of_step(allowed, refused, told)


def timed(system: System, command: str) -> tuple[float, bool]:
    """Return the seconds that a command took inside ``work``, timed there."""
    done = system.inside(
        "work", f"a=$(date +%s.%N); {command}; e=$?; b=$(date +%s.%N); echo $a $b $e"
    )
    words = done.stdout.split()
    return (float(words[1]) - float(words[0]), words[2] == "0") if len(words) == 3 else (0.0, False)


def step_speed(screen: Screen, system: System) -> None:
    screen.step("The same call, direct and through the proxy")
    direct, proxied = "vault demo.", "proxy qrexec-proxy+pass+vault+demo."
    rows, good = [], True
    for name, call in (("direct", direct), ("proxied", proxied)):
        send = f"head -c {SPEED_SIZE} /dev/zero | qrexec-client-vm {call}Sink"
        seconds, fine = timed(system, send)
        loop = f"for i in $(seq {SETUPS}); do qrexec-client-vm {call}True </dev/null || exit; done"
        setup, also_fine = timed(system, loop)
        good = good and fine and also_fine and seconds > 0
        rows.append((name, SPEED_SIZE / max(seconds, 1e-9) / (1 << 20), setup / SETUPS * 1000))
    screen.typed("work", f"head -c 256M /dev/zero | qrexec-client-vm {direct}Sink   (and proxied)")
    screen.came(f"{'':<10}{'throughput':>14}{'a whole short call':>22}")
    for name, rate, setup in rows:
        screen.came(f"{name:<10}{rate:>8.0f} MiB/s{setup:>19.1f} ms")
    ratio = rows[1][1] / rows[0][1] if rows[0][1] else 0.0
    screen.came(f"{'ratio':<10}{ratio:>14.2f}{rows[1][2] / max(rows[0][2], 1e-9):>22.2f}")
    screen.end_of_step(screen.mark(good, "both carried 256 MiB"))


STEPS = (
    step_add, step_file, step_price, step_timeout, step_one_way, step_admin, step_speed,
)  # fmt: skip


def choose_kind(screen: Screen) -> str:
    """Return ``bubblewrap`` where this machine can do it, else ``process``, saying why."""
    done = subprocess.run(
        [SLUICE, "doctor", "--can", "bubblewrap"], capture_output=True, text=True, check=False
    )
    if done.returncode == 0:
        return "bubblewrap"
    print(screen.paint("This machine forbids sandboxes:", "31"))
    screen.came(done.stdout + done.stderr)
    print("The demo runs on the kind `process`, WITHOUT ISOLATION, and marks what it cannot show.")
    return "process"


def main() -> int:
    """Run every step; return 0 when all did what they should."""
    screen = Screen()
    kind = choose_kind(screen)
    begun = time.monotonic()
    root = Path(tempfile.mkdtemp(prefix="sluice-", dir="/tmp"))
    root.chmod(0o755)
    system = System(root, kind)
    try:
        with price_server() as port:
            system.prepare(port)
            screen.typed("host", "sluice up --detach")
            up = system.sluice("up", "--detach")
            screen.came(up.stdout + up.stderr)
            if up.returncode != 0:
                print("demo: the system did not start")
                return 1
            for step in STEPS:
                try:
                    step(screen, system)
                except subprocess.TimeoutExpired as error:
                    screen.mark(False, f"did not end within {error.timeout:.0f} s")
    finally:
        down = system.sluice("down")
        if down.returncode != 0:
            screen.came(down.stdout + down.stderr)
        system.sluice("wipe", "--all", "--yes")  # the files of domains are not ours to delete
        shutil.rmtree(root, ignore_errors=True)
    print(f"\nin {time.monotonic() - begun:.0f} s", end="")
    print(f", {screen.hidden} things could not be shown here" if screen.hidden else "")
    print(f"demo: {screen.good} of {len(STEPS)} steps")
    return 0 if screen.good == len(STEPS) else 1


if __name__ == "__main__":
    sys.exit(main())
