"""Tells a person how a trial is getting on: a bar on a terminal, a line now and then elsewhere."""

import os
import sys
import time
from typing import Any

from tqdm import tqdm

# Seconds between two lines where there is no terminal.
_LINE_PERIOD = 10.0


class TrialProgress:
    """Steps taken of the steps to take, the last metric, the target."""

    def __init__(
        self,
        title: str,
        num_steps: int,
        metric: str,
        target: float,
        slot: int = 0,
        quiet: bool = False,
    ) -> None:
        """Start the display.

        Args:
            title: Such as "mnist trial 2/5".
            num_steps: Steps of a full bar; more may follow.
            metric: Name of the target metric on the validation split.
            target: Its value to reach.
            slot: Line of the terminal for this bar, from 0; trials in parallel have one each.
            quiet: Show nothing (all ranks but 0).
        """
        self._title = title
        self._num_steps = num_steps
        self._metric = f"validation/{metric}"
        self._target = target
        self._quiet = quiet
        self._start = self._last_line = time.monotonic()
        self._bar = None
        if not quiet and sys.stdout.isatty():
            self._bar = tqdm(
                total=num_steps,
                desc=title,
                unit="step",
                position=slot,
                leave=False,
                # A terminal that does not tell its width would get bars of width 0.
                ncols=None if _terminal_width() else 80,
                dynamic_ncols=bool(_terminal_width()),
                file=sys.stdout,
            )

    def step(self, global_step: int) -> None:
        """A step was taken, or a checkpoint put the trial at this step."""
        if self._bar is not None:
            self._bar.update(global_step - self._bar.n)

    def evaluation(self, global_step: int, result: dict[str, Any]) -> None:
        """An evaluation came in."""
        if self._quiet:
            return
        value = result.get(self._metric)
        text = f"{self._metric} {_short(value)} (target {_short(self._target)})"
        if self._bar is not None:
            self._bar.set_postfix_str(text)
        elif time.monotonic() - self._last_line >= _LINE_PERIOD:
            self._last_line = time.monotonic()
            seconds = self._last_line - self._start
            self._print(f"step {global_step}/{self._num_steps}, {seconds:.0f} s, {text}")

    def finish(self, summary: str) -> None:
        """The trial is over; one line says how it went and stays."""
        self.close()
        if not self._quiet:
            self._print(summary)

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _print(self, text: str) -> None:
        tqdm.write(f"{self._title}: {text}", file=sys.stdout)
        sys.stdout.flush()


def _terminal_width() -> int:
    """Columns of the terminal at standard output; 0 where it does not say."""
    try:
        return os.get_terminal_size(sys.stdout.fileno()).columns
    except OSError:
        return 0


def _short(value: Any) -> str:
    """Four significant digits, or a dash where there is no number."""
    return f"{value:.4g}" if isinstance(value, float | int) else "-"
