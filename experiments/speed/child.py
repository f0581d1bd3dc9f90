"""A child process that works when told to, and otherwise sleeps in the read of its input."""

import pickle
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any


class Child:
    """A worker behind two pipes.

    Args:
      name: for messages.
      command: starts it.
      environment: its variables.
    """

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str]):
        self.name = name
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )

    def ask(self, message: Any) -> Any:
        """Send a message and sleep until the answer comes.

        Raises:
          RuntimeError: the process has ended.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            pickle.dump(message, self.process.stdin)
            self.process.stdin.flush()
            return pickle.load(self.process.stdout)
        except (EOFError, BrokenPipeError):
            raise RuntimeError(f"the {self.name} process has ended; its message is above") from None

    def close(self) -> None:
        """Hang up, and wait for the end of the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()
