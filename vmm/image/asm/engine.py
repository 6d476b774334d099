"""The assembler's end of the process that runs Keystone (`worker.py`).

The hard part is that the other end may hang or die on any text. Answers come one by one, so the number that
has arrived names the guilty text; a hang is killed after `timeout` seconds without an answer.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import select
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from vmm.errors import ImageError

UNKNOWN_MNEMONIC = 514  # KS_ERR_ASM_MNEMONICFAIL
BATCH = 256  # texts in flight at once; their answers fit a pipe's buffer, so neither end can block the other


class EncoderFailure(Exception):
    """Keystone hung or died on `texts[index]` of a call to `encode`."""

    def __init__(self, index: int, what: str) -> None:
        super().__init__(what)
        self.index, self.what = index, what


def worker_command() -> list[str]:
    """How the worker is started. Raises ImageError if Keystone is not installed."""
    spec = importlib.util.find_spec("keystone")
    if spec is None or spec.origin is None:
        raise ImageError("the assembler needs the package keystone-engine: pip install keystone-engine")
    folder = Path(spec.origin).parent.parent
    return [sys.executable, "-I", "-S", str(Path(__file__).with_name("worker.py")), str(folder)]


class Keystone:
    """Encodes instruction texts in another process, from the first call to the end of the `with`."""

    def __init__(self, timeout: float = 10.0, command: Sequence[str] | None = None) -> None:
        self._timeout, self._command = timeout, command
        self._process: subprocess.Popen[bytes] | None = None
        self._buffer = b""

    def __enter__(self) -> Keystone:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self.close()

    def start(self) -> subprocess.Popen[bytes]:
        """Start the process if it does not run; it loads while the caller goes on."""
        if self._process is None:
            command = self._command or worker_command()
            try:
                self._process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
                )
            except OSError as error:
                raise ImageError(f"the assembler's worker cannot be started: {error.strerror}") from None
        return self._process

    def close(self) -> None:
        """End the process at once; the next call to `encode` starts another."""
        process, self._process, self._buffer = self._process, None, b""
        if process is not None:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    with contextlib.suppress(BrokenPipeError):
                        stream.close()

    def encode(self, texts: Sequence[str]) -> list[bytes | int]:
        """The code of each text, or Keystone's error number. Raises EncoderFailure on a hang or a crash."""
        answers: list[bytes | int] = []
        while len(answers) < len(texts):
            batch = texts[len(answers) : len(answers) + BATCH]
            process = self.start()
            assert process.stdin is not None
            try:
                process.stdin.write("".join(f"{text}\n" for text in batch).encode() + b"\n")
                process.stdin.flush()
                for _ in batch:
                    line = self._line(process)
                    answers.append(bytes.fromhex(line[1:]) if line[:1] == "=" else int(line[1:]))
            except (BrokenPipeError, EOFError, ValueError):
                self.close()
                raise EncoderFailure(len(answers), "the encoder died on this instruction") from None
            except TimeoutError:
                self.close()
                what = f"the encoder found no end to this instruction in {self._timeout:g} seconds"
                raise EncoderFailure(len(answers), what) from None
        return answers

    def _line(self, process: subprocess.Popen[bytes]) -> str:
        assert process.stdout is not None
        while b"\n" not in self._buffer:
            poll = select.poll()
            poll.register(process.stdout, select.POLLIN)
            if not poll.poll(self._timeout * 1000):
                raise TimeoutError
            chunk = os.read(process.stdout.fileno(), 1 << 16)
            if not chunk:
                raise EOFError
            self._buffer += chunk
        line, self._buffer = self._buffer.split(b"\n", 1)
        return line.decode("ascii", "replace")
