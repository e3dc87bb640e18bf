"""A bare Mooncake engine with memory to write to, in a process of its own: `python -m tests.mooncake_reader PAGES PAGE_BYTES`."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType

import numpy as np

import pd_fsm
from pd_fsm.kv.registration import AddressTable, blocks_to_register
from pd_fsm.transports.mooncake_engine import Engine
from pd_fsm.transports.mooncake_peer import pack

ROOT = Path(__file__).parent.parent
CANARY = 0xA5


class Reader:
    """The other end, for tests. Every command is answered by one line."""

    def __init__(self, pages: int, page_bytes: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.mooncake_reader", str(pages), str(page_bytes)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            bufsize=1,
        )
        self.descriptor = bytes.fromhex(self._line())

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the reader ended"
        return line.strip()

    def do(self, command: str) -> str:
        assert self._process.stdin is not None
        self._process.stdin.write(command + "\n")
        return self._line()

    def pages(self) -> list[int]:
        """The first byte of each page, -1 where a page is not of one kind."""
        return [int(number) for number in self.do("pages").split()]

    def send(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait(20)

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self._process.poll() is None:
            self.kill()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()


def main(pages: int, page_bytes: int) -> None:
    buffer = np.full((pages, page_bytes), CANARY, np.uint8)
    layout = pd_fsm.KVLayout([pd_fsm.paged("kv", [buffer], 1)])
    engine = Engine("127.0.0.1", "tcp", "", blocks_to_register(layout))
    print(pack("tcp", "127.0.0.1", engine.port, AddressTable.of(layout)).hex(), flush=True)  # noqa: T201 - the answer
    for line in sys.stdin:
        if line.strip() == "unregister":
            print(engine._engine.batch_unregister_memory([buffer.ctypes.data]), flush=True)  # noqa: T201
        else:
            kinds = [int(page[0]) if (page == page[0]).all() else -1 for page in buffer]
            print(*kinds, flush=True)  # noqa: T201


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
