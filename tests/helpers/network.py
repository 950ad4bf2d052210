"""Several machines on one: network namespaces, each with one link to a switch that delays, loses and cuts.

The switch is a process of its own that hands on the frames of TAP devices, so that it takes root, /dev/net/tun and
``ip``, and nothing of the kernel's traffic control. A cut link drops all frames and tells nobody, as a cable that is
pulled out far away does.
"""

from __future__ import annotations

import fcntl
import os
import random
import select
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

SUBNET = "10.77.0"
SET_INTERFACE, TAP_WITHOUT_HEADER = 0x400454CA, 0x1002  # TUNSETIFF; IFF_TAP | IFF_NO_PI
FRAME_BYTES, QUEUED_FRAMES = 2**16, 10_000


def obstacle() -> str | None:
    """What is missing here for a ``Network``; None where nothing is."""
    if os.geteuid() != 0:
        return "needs root, for network namespaces"
    if shutil.which("ip") is None:
        return "needs iproute2"
    if not os.path.exists("/dev/net/tun"):
        return "needs /dev/net/tun"
    name = f"try{os.getpid()}"
    if subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode:
        return "needs network namespaces"
    subprocess.run(["ip", "netns", "delete", name], check=True)
    return None


class Network:
    """Nodes 1 to ``nodes``, of the addresses 10.77.0.1 and so on; a context manager.

    At its end all processes that run in its namespaces are killed, and the namespaces removed.
    """

    def __init__(self, nodes: int) -> None:
        self.nodes = list(range(1, nodes + 1))
        self._names = {node: f"knn{os.getpid()}-{node}" for node in self.nodes}

    def __enter__(self) -> Network:
        taps = [f"k{os.getpid()}n{node}"[:15] for node in self.nodes]
        self._switch = subprocess.Popen(
            [sys.executable, __file__, *taps], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._answer()
        for node, tap in zip(self.nodes, taps, strict=True):
            name = self._names[node]
            _ip("netns", "add", name)
            _ip("link", "set", tap, "netns", name, "address", f"02:00:00:00:00:{node:02x}")
            _ip("-n", name, "address", "add", f"{self.address(node)}/24", "dev", tap)
            _ip("-n", name, "link", "set", tap, "txqueuelen", str(QUEUED_FRAMES), "up")
            _ip("-n", name, "link", "set", "lo", "up")
            _ip("-n", name, "route", "add", "default", "dev", tap)  # programs ask for their address by it
        return self

    def __exit__(self, *error: object) -> None:
        for node in self.nodes:
            self.kill(node)
        self._switch.communicate()
        for node in self.nodes:
            subprocess.run(["ip", "netns", "delete", self._names[node]], capture_output=True)

    def address(self, node: int) -> str:
        """A node's IP address."""
        return f"{SUBNET}.{node}"

    def start(self, node: int, command: Sequence[str], **how: Any) -> subprocess.Popen:
        """Start a command on a node; ``how`` is for ``Popen``."""
        return subprocess.Popen(["ip", "netns", "exec", self._names[node], *command], **how)

    def kill(self, node: int) -> None:
        """Kill all processes of a node, as a power cut does; its kernel goes on, and resets their connections."""
        listed = subprocess.run(["ip", "netns", "pids", self._names[node]], capture_output=True, text=True)
        for pid in map(int, listed.stdout.split()):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue

    def set_delay(self, seconds: float) -> None:
        """Have each frame wait so long at the switch: a round trip takes twice that."""
        self._tell(f"delay {seconds}")

    def set_loss(self, share: float) -> None:
        """Have the switch lose that share of the frames."""
        self._tell(f"loss {share}")

    def cut(self, node: int) -> None:
        """Drop all that a node sends and is sent."""
        self._tell(f"cut {node - 1}")

    def mend(self, node: int) -> None:
        """Undo ``cut``."""
        self._tell(f"mend {node - 1}")

    def bytes_passed(self) -> int:
        """Bytes of all frames so far that the switch handed on, headers included."""
        return int(self._tell("count"))

    def _tell(self, line: str) -> str:
        assert self._switch.stdin is not None
        self._switch.stdin.write(line + "\n")
        self._switch.stdin.flush()
        return self._answer()

    def _answer(self) -> str:
        assert self._switch.stdout is not None
        return self._switch.stdout.readline()


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


class Switch:
    """Hands on frames between TAP devices until its standard input ends; told what to do by lines of it."""

    def __init__(self, taps: Sequence[str]) -> None:
        self.ports = [_open_tap(name) for name in taps]
        self.delay = self.loss = 0.0
        self.cut: set[int] = set()
        self.passed = 0
        self._waiting: deque[tuple[float, int, bytes]] = deque()

    def run(self) -> None:
        """Until the end of the input."""
        numbers = {port: number for number, port in enumerate(self.ports)}
        print("ready", flush=True)
        while True:
            wait = max(0.0, self._waiting[0][0] - time.monotonic()) if self._waiting else None
            for readable in select.select([*self.ports, sys.stdin], [], [], wait)[0]:
                if readable is sys.stdin:
                    line = sys.stdin.readline()
                    if not line:
                        return
                    self._obey(*line.split())
                else:
                    self._take(numbers[readable])
            now = time.monotonic()
            while self._waiting and self._waiting[0][0] <= now:
                _, number, frame = self._waiting.popleft()
                self._send(number, frame)

    def _obey(self, word: str, value: str = "0") -> None:
        if word in ("delay", "loss"):
            setattr(self, word, float(value))
        elif word == "cut":
            self.cut.add(int(value))
        elif word == "mend":
            self.cut.discard(int(value))
        print(self.passed, flush=True)

    def _take(self, number: int) -> None:
        while True:
            try:
                frame = os.read(self.ports[number], FRAME_BYTES)
            except BlockingIOError:
                return
            if number in self.cut or (self.loss and random.random() < self.loss):
                continue
            to = frame[5] - 1 if frame[:5] == b"\x02\0\0\0\0" else None  # the last byte of an address is the node
            for other in range(len(self.ports)) if to is None else [to]:
                if other != number and other < len(self.ports) and other not in self.cut:
                    self._waiting.append((time.monotonic() + self.delay, other, frame))

    def _send(self, number: int, frame: bytes) -> None:
        try:
            os.write(self.ports[number], frame)
            self.passed += len(frame)
        except OSError:  # not up yet, or full
            return


def _open_tap(name: str) -> int:
    port = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(port, SET_INTERFACE, struct.pack("16sH22x", name.encode(), TAP_WITHOUT_HEADER))
    return port


if __name__ == "__main__":
    Switch(sys.argv[1:]).run()
