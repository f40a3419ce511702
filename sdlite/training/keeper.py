"""What the main process of a run does besides training: checkpoints, exports, the log and the screen."""

import time
from collections.abc import Callable
from pathlib import Path

from rich.progress import BarColumn, Progress, TextColumn

from sdlite.files import atomic_folder, sweep
from sdlite.training import run
from sdlite.training.curves import draw_progress
from sdlite.training.options import TrainConfig
from sdlite.training.state import State, Task
from sdlite.training.stop import Stop

SAID_SECONDS = 60.0  # between lines where no bar can be drawn


def say(text: str) -> None:
    print(text, flush=True)


class Keeper:
    """Keeps a run: call `begin` before the first sample, `step` after every step, `finish` after the last."""

    def __init__(
        self, task: Task, state: State, config: TrainConfig, out: Path, stop: Stop, clock: Callable[[], float]
    ) -> None:
        self.task, self.state, self.config = task, state, config
        self.out, self.stop, self.clock = out, stop, clock
        self.losses: list[float] = []
        self.begun = self.time = self.saved = self.shown = self.said = clock()
        self.first = self.samples = self.shown_samples = state.samples
        self.kept = state.samples if run.checkpoints(out) else None  # samples of the last checkpoint
        self.bar = Progress(TextColumn("{task.description}"), BarColumn(), transient=True)
        self.row = self.bar.add_task("training", total=1.0)

    def begin(self, notes: list[str], changes: run.Changes) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        sweep(self.out)
        run.begin_log(self.out, self.state.samples)
        for note in notes:
            say(f"note: {note}")
        if changes:
            run.add_to_log(self.out, {"samples": self.state.samples, "changed": changes})
            changed = ", ".join(f"{name} {before} is now {now}" for name, (before, now) in changes.items())
            say(f"going on after {self.state.samples} samples with changes: {changed}")
        if self.state.samples == 0 and self.task.begun and not self.stop.asked:
            self._show()
        self.bar.start()

    def step(self, loss: float) -> None:
        self.losses.append(loss)
        self._report()
        show = self._is_due(self.shown, self.config.show_minutes)
        if every := self.config.show_samples:
            show = show or self.state.samples // every > self.shown_samples // every
        if show or self._is_due(self.saved, self.config.save_minutes):
            self._save()
        if show and not self.stop.asked:
            self._export()
            self._show()

    def _is_due(self, last: float, minutes: float) -> bool:
        return minutes > 0 and self.clock() - last > 60 * minutes

    def finish(self) -> None:
        self.bar.stop()
        if self.stop.asked and self.state.samples == self.first:
            return  # nothing was learned
        self._save()
        self._export()
        if self.stop.asked:
            export = self.out / "export"
            say(f"stopped after {self.state.samples} samples; {export} is written, and the run can go on")
        else:
            self._show()

    def _save(self) -> None:
        run.write_settings(self.out, self.state.settings(self.config))
        if self.state.samples != self.kept:
            run.write_checkpoint(self.out, self.state.samples, self.state.tensors())
            self.kept = self.state.samples
        self.saved = self.clock()

    def _export(self) -> None:
        """Writes a new export; the old one stays until the new one is complete."""
        run.check_finite(self.state.average, f"after {self.state.samples} samples")
        with atomic_folder(self.out / "export", force=True) as temporary:
            self.state.with_average(lambda: self.task.export(temporary))

    def _show(self) -> None:
        """Writes figures on held-out data into the log, and a preview."""
        with self.stop.idle():
            self.state.with_average(self._measure_and_draw)
        self.shown, self.shown_samples = self.clock(), self.state.samples

    def _measure_and_draw(self) -> None:
        samples, out = self.state.samples, self.out
        figures = self.task.evaluate()
        run.add_to_log(out, {"samples": samples, **figures})
        say(f"{samples} samples, " + ", ".join(f"{name} {value:.4g}" for name, value in figures.items()))
        if self.task.previews:
            say(f"drawing {self.task.previews} previews")
        self.task.preview(out / f"preview-{samples:010}.png")
        if self.config.plot:
            draw_progress(out)

    def _report(self) -> None:
        """Updates the bar; every `report_every` samples also writes a line to the log and the screen."""
        samples = self.state.samples
        rate = (samples - self.samples) / max(self.clock() - self.time, 1e-9)
        loss = sum(self.losses) / len(self.losses)
        done, left = self._progress(rate)
        text = f"{samples} samples, loss {loss:.4f}, {left:.0f} min left"
        self.bar.update(self.row, completed=done, description=text)
        if not self.bar.console.is_terminal and self.clock() - self.said > SAID_SECONDS:
            say(text)
            self.said = self.clock()
        if samples - self.samples < self.config.report_every:
            return
        rates = {"lr": self.state.optimizer.param_groups[0]["lr"], "samples_per_second": rate}
        run.add_to_log(self.out, {"samples": samples, "loss": loss, **rates, "time": time.time()})
        self.bar.console.print(f"{text}, {rate:.1f} samples/s")
        self.losses, self.samples, self.time = [], samples, self.clock()
        self.said = self.time

    def _progress(self, rate: float) -> tuple[float, float]:
        """Finished part of this call, 0 to 1, and the minutes left, for the budget that ends first."""
        passed, samples = (self.clock() - self.begun) / 60, self.state.samples
        budgets = []
        if (minutes := self.config.minutes) is not None:
            budgets.append((passed / minutes, max(0.0, minutes - passed)))
        if (goal := self.config.samples) is not None:
            done = (samples - self.first) / max(1, goal - self.first)
            budgets.append((done, max(0, goal - samples) / max(rate, 1e-9) / 60))
        return min(budgets, key=lambda budget: budget[1])
