"""The runs of a comparison as tasks of a Ray cluster, whose machines share the folder of the comparison and the data.

`ray.init` finds the cluster (RAY_ADDRESS, or one that runs on this machine); without one, Ray starts on this machine.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import secrets
import sys
from pathlib import Path
from typing import Any

from waveletgpt.data.mixture import Mixture
from waveletgpt.errors import UserError
from waveletgpt.training import processes
from waveletgpt.training.workers import RESTARTS, Ended, Job, Outcome, Table, attempt, interrupted, settle, stop_asked


def on_ray(jobs: list[Job]) -> Ended:
    """Train the jobs as tasks with a GPU each where there are any, else with as many cores as threads.

    A run whose worker or machine dies is started again by Ray, `RESTARTS` times, and goes on from its checkpoint.

    Raises:
        UserError: Ray is not installed; a machine of the cluster does not see the folder or the data; a mistake in a
            run, when the others are saved.
        Interrupted: Ctrl-C or SIGTERM; all are saved first.
        KeyboardInterrupt: a second Ctrl-C; nothing is saved.
    """
    try:
        import ray
    except ImportError:
        raise UserError("engine ray needs Ray: pip install 'waveletgpt[ray]'") from None
    if processes.count() > 1:
        raise UserError("engine ray starts processes itself: start the command without torchrun")
    if not ray.is_initialized():
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    _check_nodes(ray, jobs[0])
    threads = jobs[0].recipe.training.threads or 1
    with_gpu = jobs[0].recipe.device in ("auto", "cuda") and ray.cluster_resources().get("GPU", 0) >= 1
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    places = [int(node.get("GPU", 0)) if with_gpu else int(node.get("CPU", 0) // threads) for node in nodes]
    if max(places) < 1:
        raise UserError(f"no machine of this Ray cluster has {threads} cores free for a run; give fewer threads")
    at_once = min(max(places), len(jobs))

    task = ray.remote(max_retries=RESTARTS, num_cpus=threads, num_gpus=int(with_gpu))(_attempt)
    argv = list(sys.argv)
    mistake: str | None = None
    saved = 0
    with stop_asked() as asked, Table(jobs) as table:
        # Resumed in any case: a second attempt finds what the first has saved.
        under_way = {task.remote(_elsewhere(job, at_once), argv): job for job in jobs}
        cancelled = False
        try:
            while under_way:
                if (asked() or mistake is not None) and not cancelled:
                    cancelled = True
                    for ref in under_way:
                        ray.cancel(ref, force=False)  # interrupts the runs, which then save
                begun = [job for job in under_way.values() if job.run.metrics_path.is_file()]
                table.show(begun, len(under_way) - len(begun))
                for ref in ray.wait(list(under_way), timeout=0.5)[0]:
                    job = under_way.pop(ref)
                    try:
                        outcome = ray.get(ref)
                    except ray.exceptions.TaskCancelledError:
                        continue
                    except ray.exceptions.RayError as error:
                        outcome = Outcome("died", type(error).__name__)
                    saved += outcome.kind == "interrupted"
                    if outcome.kind == "mistake":
                        mistake = mistake or outcome.text
                    elif (
                        outcome.kind == "interrupted" and not cancelled
                    ):  # by a signal that another process was meant to get
                        under_way[task.remote(_elsewhere(job, at_once), argv)] = job
                    elif not cancelled or outcome.kind in ("finished", "diverged"):
                        failure = settle(job, outcome, RESTARTS + 1, table)
                        table.ended(job, failure)
                        yield job, failure
        finally:
            for ref in under_way:
                ray.cancel(ref, force=True)
    if mistake is not None:
        raise UserError(mistake)
    if asked():
        raise interrupted(saved, jobs)


def _attempt(job: Job, argv: list[str]) -> Outcome:
    sys.argv = argv  # the command line is part of a run's record
    return attempt(job)


def _elsewhere(job: Job, at_once: int) -> Job:
    """The job for a process with another working folder."""
    store = copy.deepcopy(job.store)
    for each in _stores(store):
        each.path = each.path.resolve()
    return dataclasses.replace(job, store=store, folder=job.folder.resolve(), resume=True, at_once=at_once)


def _stores(store: Any) -> list[Any]:
    """The stores that lie on disk: of a mixture several."""
    return [part.store for part in store.parts] if isinstance(store, Mixture) else [store]


def _check_nodes(ray: Any, job: Job) -> None:
    """Whether every machine sees the folder of the comparison and the data.

    Raises:
        UserError: one of them does not.
    """
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    out = job.folder.parent.resolve()
    stores = [store.path.resolve() for store in _stores(job.store)]
    out.mkdir(parents=True, exist_ok=True)
    token = out / f".shared-{secrets.token_hex(8)}"
    token.touch()
    look = ray.remote(num_cpus=0)(_missing)
    try:
        refs = {
            node["NodeManagerHostname"]: look.options(
                scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            ).remote([token, *stores])
            for node in ray.nodes()
            if node["Alive"]
        }
        for host, ref in refs.items():
            if missing := ray.get(ref):
                place = out if missing[0] == token else missing[0]
                raise UserError(f"{host} of the Ray cluster does not see {place}; name folders that all machines share")
    finally:
        token.unlink(missing_ok=True)


def _missing(paths: list[Path]) -> list[Path]:
    return [path for path in paths if not path.exists()]
