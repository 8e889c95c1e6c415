"""A signal asks a run to stop; the run ends its step, saves, and says how to go on."""

import signal
import threading
from typing import Any

import torch

from hafrm.training import parallel


class StopSignal:
    """Remembers SIGTERM and SIGINT instead of dying in the middle of a step; a second one kills."""

    def __init__(self) -> None:
        self.received = ""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return  # Ray Train runs us in a thread, where Python delivers no signals
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._remember)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, _: object) -> None:
        self.received = signal.Signals(number).name
        signal.signal(number, self._before[number])

    def agreed(self, ranks: parallel.Ranks) -> bool:
        """Whether any rank was told to stop, so that all stop after the same step.

        The ranks' hosts talk to each other; no device is waited for.
        """
        flag = torch.tensor(float(bool(self.received)))
        return bool(self.received) if ranks.size == 1 else float(parallel.add_up(flag)) > 0
