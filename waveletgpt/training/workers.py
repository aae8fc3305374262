"""The runs of a comparison, one by one in this process, or side by side in worker processes of this machine.

An engine takes `Job`s and yields each with how it ended. Whatever happens to a worker, its run goes on from its newest
checkpoint: what is computed does not depend on who computes it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import multiprocessing
import multiprocessing.connection
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from waveletgpt.data.parallel import cores
from waveletgpt.errors import UserError
from waveletgpt.runs.folder import RunFolder
from waveletgpt.training import processes
from waveletgpt.training.recipe import Recipe

RESTARTS = 2
"""How often a run whose worker died is given to a new one."""


@dataclass(frozen=True)
class Job:
    """One arm with one seed, to be trained."""

    recipe: Recipe
    store: Any
    folder: Path
    data: str | Sequence[str]
    arm: str
    resume: bool
    at_once: int = 1
    """How many runs share the machine, for the record."""

    @property
    def run(self) -> RunFolder:
        return RunFolder(self.folder)

    @property
    def title(self) -> str:
        return f"{self.arm} seed {self.recipe.seed}"


@dataclass(frozen=True)
class Outcome:
    """How a worker ended with a job; `text` says more."""

    kind: Literal["finished", "diverged", "interrupted", "mistake", "broken", "died"]
    text: str = ""


Ended = Generator[tuple[Job, str | None], None, None]
"""Jobs as they end, with what went wrong; None for those that came to their end."""


def train_job(job: Job, show_progress: bool) -> None:
    """Train one job; raises what `trainer.train` raises."""
    from waveletgpt.training.trainer import train

    train(
        job.recipe,
        job.store,
        job.folder,
        data=job.data,
        arm=job.arm,
        resume=job.resume,
        show_progress=show_progress,
        at_once=job.at_once,
    )


def one_by_one(jobs: list[Job]) -> Ended:
    """Train the jobs in this process."""
    from waveletgpt.training.trainer import Diverged

    for job in jobs:
        error = None
        try:
            train_job(job, show_progress=True)
        except Diverged as diverged:
            error = str(diverged)
        yield job, error


def worker_count(wanted: str | int, device: str, jobs: int) -> int:
    """How many runs to train at once: a number, or "auto" for one a GPU and, on CPUs, one; never more than jobs.

    Raises:
        UserError: neither of these; or several workers where several processes are one run already.
    """
    if wanted == "auto":
        return 1 if processes.count() > 1 else max(1, min(len(gpus(device)), jobs))
    try:
        count = int(wanted)
    except ValueError:
        count = 0
    if count < 1:
        raise UserError(f'workers is "{wanted}"; give a number from 1 on, or auto')
    if count > 1 and processes.count() > 1:
        raise UserError(
            f"{count} workers in each of {processes.count()} processes of one run: start the command without torchrun, "
            "or give 1 worker"
        )
    return min(count, jobs)


def gpus(device: str) -> list[str]:
    """The GPUs that a run may have, as CUDA_VISIBLE_DEVICES calls them."""
    import torch

    if device not in ("auto", "cuda") or not torch.cuda.is_available():
        return []
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return (named or list(map(str, range(torch.cuda.device_count()))))[: torch.cuda.device_count()]


class Worker:
    """A process that trains the jobs it is given, one after the other; it ends, having saved, when this one ends.

    It has a session of its own, so that Ctrl-C on the terminal reaches it through this process only, and once.
    """

    def __init__(self, environment: dict[str, str]):
        self.environment = environment
        self.output = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 - closed in `end`
        self.connection, theirs = multiprocessing.Pipe()
        code = "import sys; from waveletgpt.training.workers import serve; serve(int(sys.argv[1]))"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=self.output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        theirs.close()
        self.job: Job | None = None
        self.interrupted = False

    def give(self, job: Job) -> None:
        self.job = job
        with contextlib.suppress(OSError):  # it died; `take` will tell
            self.connection.send((job, sys.argv))

    def take(self) -> Outcome:
        """Wait for what came of the job."""
        try:
            outcome: Outcome = self.connection.recv()
        except (EOFError, OSError):
            code = self.process.wait()
            how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            outcome = Outcome("died", how)
        self.job = None
        return outcome

    def interrupt(self) -> None:
        """Let it save and stop; a second call does nothing, for a second signal would stop it without saving."""
        if not self.interrupted:
            self.interrupted = True
            self.process.send_signal(signal.SIGINT)

    def kill(self) -> None:
        """End it at once, with the processes that read batches for it."""
        with contextlib.suppress(OSError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def said(self) -> str:
        """The last lines that it printed."""
        self.output.seek(0)
        return "\n".join(self.output.read().splitlines()[-20:])

    def end(self) -> None:
        """See it out: it is idle, has been interrupted, or is dead."""
        if self.job is not None:
            self.take()
        self.connection.close()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.kill()
            self.process.wait()
        self.output.close()


def serve(handle: int) -> None:
    """A worker's life: train what comes through the connection until it closes."""
    connection = multiprocessing.connection.Connection(handle)
    jobs: queue.Queue[tuple[Job, list[str]]] = queue.Queue()

    def listen() -> None:
        with contextlib.suppress(EOFError, OSError):
            while True:
                jobs.put(connection.recv())
        os.kill(os.getpid(), signal.SIGTERM)  # nobody is there any more: a run that is under way is saved

    threading.Thread(target=listen, daemon=True).start()
    while True:
        job, sys.argv = jobs.get()  # the command line is part of a run's record
        outcome = attempt(job)
        with contextlib.suppress(OSError):
            connection.send(outcome)
        if outcome.kind == "interrupted":
            return


def attempt(job: Job) -> Outcome:
    """Train a job, and say how it ended."""
    from waveletgpt.training.trainer import Diverged, Interrupted

    try:
        train_job(job, show_progress=False)
    except Diverged as error:
        return Outcome("diverged", str(error))
    except (Interrupted, KeyboardInterrupt) as error:
        return Outcome("interrupted", str(error))
    except UserError as error:
        return Outcome("mistake", str(error))
    except Exception:
        return Outcome("broken", traceback.format_exc())
    return Outcome("finished")


def side_by_side(jobs: list[Job], count: int) -> Ended:
    """Train the jobs in `count` worker processes, each with a GPU of its own where there are GPUs.

    A run whose worker dies is given to a new one, `RESTARTS` times, and then has failed. One that breaks has failed.

    Raises:
        UserError: a mistake in one of them; the others are saved first.
        Interrupted: Ctrl-C or SIGTERM; all are saved first.
        KeyboardInterrupt: the same once more; nothing is saved.
    """
    devices = gpus(jobs[0].recipe.device)
    threads = {"OMP_NUM_THREADS": str(jobs[0].recipe.training.threads or max(1, cores() // count))}
    slots = [threads | ({"CUDA_VISIBLE_DEVICES": devices[i % len(devices)]} if devices else {}) for i in range(count)]
    waiting, deaths = deque(jobs), Counter[Path]()
    workers = [Worker(slot) for slot in slots]
    mistake: str | None = None
    saved = 0

    def stop_all() -> None:
        waiting.clear()
        for worker in workers:
            if worker.job is not None:
                worker.interrupt()

    with stop_asked() as asked, Table(jobs) as table:
        try:
            for worker in workers:
                worker.give(waiting.popleft())
            while busy := [worker for worker in workers if worker.job is not None]:
                if asked():
                    stop_all()
                table.show([worker.job for worker in busy if worker.job], len(waiting))
                ready = multiprocessing.connection.wait([worker.connection for worker in busy], 0.5)
                for worker in [worker for worker in busy if worker.connection in ready]:
                    assert worker.job is not None
                    job, outcome = worker.job, worker.take()
                    stopping = mistake is not None or asked()
                    saved += outcome.kind == "interrupted"
                    if outcome.kind == "mistake":
                        mistake = mistake or outcome.text
                        stop_all()
                        continue
                    if outcome.kind in ("died", "interrupted"):
                        said = worker.said()
                        worker.end()
                        if stopping:
                            continue
                        worker = _replace(workers, worker)
                        deaths[job.folder] += 1
                        if deaths[job.folder] <= RESTARTS:
                            table.say(f"{job.title}: its worker ended ({outcome.text}); it goes on in a new one")
                            worker.give(dataclasses.replace(job, resume=True))
                            continue
                        if said:
                            table.say(said)
                    error = settle(job, outcome, deaths[job.folder], table)
                    if waiting and not stopping:
                        worker.give(waiting.popleft())
                    table.ended(job, error)
                    yield job, error
        except KeyboardInterrupt:
            for worker in workers:
                worker.kill()
            raise
        finally:
            stop_all()
            for worker in workers:
                worker.end()
    if mistake is not None:
        raise UserError(mistake)
    if asked():
        raise interrupted(saved, jobs)


def settle(job: Job, outcome: Outcome, deaths: int, table: Table) -> str | None:
    """What went wrong with a job that will not be tried again; where training did not write it down, it is here."""
    if outcome.kind in ("finished", "diverged"):
        return outcome.text or None
    error = f"its worker died {deaths} times ({outcome.text})"
    if outcome.kind == "broken":
        table.say(outcome.text)
        error = outcome.text.strip().splitlines()[-1]
    if job.run.exists():
        job.run.update_info(status="failed", error=error)
    return error


def interrupted(saved: int, jobs: list[Job]) -> Exception:
    """What is raised when all have stopped."""
    from waveletgpt.training.trainer import Interrupted

    return Interrupted(f"saved {saved} unfinished run{'' if saved == 1 else 's'} in {jobs[0].folder.parent}")


def _replace(workers: list[Worker], old: Worker) -> Worker:
    new = Worker(old.environment)
    workers[workers.index(old)] = new
    return new


@contextlib.contextmanager
def stop_asked() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C or SIGTERM came, to be asked; the second raises KeyboardInterrupt at once."""
    came = threading.Event()

    def stop(number: int, frame: FrameType | None) -> None:
        if came.is_set():
            raise KeyboardInterrupt
        came.set()
        print("\nsaving all, then stopping (once more to stop at once)", file=sys.stderr, flush=True)

    before = {}
    with contextlib.suppress(ValueError):  # not the main thread: signals stay whose they are
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, stop)
    try:
        yield came.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Table:
    """The runs that are under way: a table on a terminal, a line of each now and then in a log.

    What it shows it reads in the run folders, so it does not matter where the runs are.
    """

    def __init__(self, jobs: list[Job]):
        from rich.console import Console
        from rich.live import Live

        self.jobs, self.done, self.failed = len(jobs), 0, 0
        self.console = Console(stderr=True)
        self.live = Live(console=self.console, refresh_per_second=2, transient=True)
        self.files: dict[Path, Metrics] = {}
        self.printed = time.monotonic()

    def __enter__(self) -> Table:
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.live.stop()

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def ended(self, job: Job, error: str | None) -> None:
        self.done += error is None
        self.failed += error is not None
        if error is None and not self.console.is_terminal:
            self.say(f"{job.title}: finished")

    def show(self, running: list[Job], waiting: int) -> None:
        if self.console.is_terminal:
            self.live.update(self._table(running, waiting))
        elif time.monotonic() - self.printed > 30:
            self.printed = time.monotonic()
            for job in running:
                step, *figures = self._row(job)
                self.say(
                    f"{job.title}: step {step}, loss {figures[0]}, validation loss {figures[1]}, tokens/s {figures[2]}"
                )

    def _table(self, running: list[Job], waiting: int) -> Any:
        from rich.table import Table as RichTable

        failed = f", {self.failed} failed" if self.failed else ""
        caption = f"{self.done} of {self.jobs} finished{failed}, {waiting} waiting"
        table = RichTable("arm", "seed", "step", "loss", "validation", "tokens/s", "left", caption=caption)
        for job in running:
            table.add_row(job.arm, str(job.recipe.seed), *self._row(job))
        return table

    def _row(self, job: Job) -> list[str]:
        """Step, loss, validation loss, tokens per second, time left."""
        seen = self.files.setdefault(job.folder, Metrics(job.run.metrics_path))
        seen.read()
        last, steps = seen.last, job.recipe.max_steps
        step, seconds = last.get("step", 0), last.get("seconds", 0.0)
        figures = [f"{last[key]:.3f}" if key in last else "–" for key in ("loss", "nll")]
        if not step or not seconds:
            return [f"{step}/{steps}", *figures, "–", "–"]
        left = seconds / step * (steps - step)
        return [f"{step}/{steps}", *figures, f"{last['tokens'] / seconds:,.0f}", f"{left / 60:.1f} min"]


class Metrics:
    """The newest value of everything in a metrics.jsonl that grows."""

    def __init__(self, path: Path):
        self.path, self.place = path, 0
        self.last: dict[str, Any] = {}

    def read(self) -> None:
        """Read the lines that are new."""
        try:
            with open(self.path, "rb") as file:
                if file.seek(0, os.SEEK_END) < self.place:  # a resumed run has dropped its last lines
                    self.place, self.last = 0, {}
                file.seek(self.place)
                whole, _, _ = file.read().rpartition(b"\n")
        except OSError:
            return
        if whole:
            self.place += len(whole) + 1
            for line in whole.splitlines():
                with contextlib.suppress(ValueError):
                    self.last |= json.loads(line)
