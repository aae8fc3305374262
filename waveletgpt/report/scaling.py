"""Scaling laws: a loss as a function of parameters and tokens, and what a lower loss is worth. No files, no torch.

    L(N, D) = E + A / N^a + B / D^b        Hoffmann et al. 2022, arXiv 2203.15556, approach 3

N parameters, D tokens of training, L held-out loss in nats per token. E is what no model and no amount of data gets
rid of; the other two terms are what this model, and this much data, still lack.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from scipy.optimize import least_squares, nnls

__all__ = ["Law", "Point", "can_fit", "can_fit_tokens", "estimate", "fit_law", "fit_tokens", "retention"]

# Where the Huber loss of log-losses turns from square to linear: Hoffmann et al., Appendix D.3.
DELTA = 1e-3
PARAMETERS = ("E", "A", "a", "B", "b")


@dataclass(frozen=True)
class Law:
    """L(N, D) = E + A / N^a + B / D^b; with A = 0 a law of tokens alone, for one size of model."""

    E: float
    A: float
    a: float
    B: float
    b: float

    def loss(self, parameters: float, tokens: float) -> float:
        """Loss after training a model of so many parameters on so many tokens, in nats per token."""
        return float(self.E + self.A * parameters**-self.a + self.B * tokens**-self.b)

    def tokens_for(self, parameters: float, loss: float) -> float:
        """Tokens after which a model of so many parameters has this loss; infinite where it never does."""
        lacking = loss - self.E - self.A * parameters**-self.a
        if not lacking > 0 or not self.B > 0 or not self.b > 0:
            return math.inf
        log = (math.log(self.B) - math.log(lacking)) / self.b
        return math.exp(log) if log < 700 else math.inf


@dataclass(frozen=True)
class Point:
    """One rung of a ladder: a size of model trained on a number of tokens, by every arm, once per seed."""

    size: str
    parameters: float
    tokens: float
    compute: float
    """FLOPs of the baseline's training."""
    losses: Mapping[str, Mapping[int, float]]
    """Arm -> seed -> final held-out loss."""
    throughput: Mapping[str, float] = field(default_factory=dict)
    """Arm -> its tokens per second / the baseline's; 1 where it is not known."""

    def loss(self, arm: str) -> float | None:
        """Mean over seeds; None where there is none."""
        values = list(self.losses.get(arm, {}).values())
        return float(np.mean(values)) if values else None

    def gap(self, arm: str, baseline: str) -> float | None:
        """How far the arm is below the baseline, in nats, over the seeds that both have; None where there is none."""
        ours, theirs = self.losses.get(arm, {}), self.losses.get(baseline, {})
        seeds = [seed for seed in ours if seed in theirs]
        return float(np.mean([theirs[seed] - ours[seed] for seed in seeds])) if seeds else None


def can_fit(points: Sequence[Point], arm: str) -> bool:
    """Whether an arm's rungs tell all five parameters apart.

    That takes three sizes and three numbers of tokens, for a power law with an offset has three parameters along each,
    and rungs that connect them: 3 x 3 is enough, 2 x 5 is not.
    """
    having = [point for point in points if point.losses.get(arm)]
    sizes, budgets = sorted({p.parameters for p in having}), sorted({p.tokens for p in having})
    if len(sizes) < 3 or len(budgets) < 3:
        return False
    # The law is a sum of something of the size and something of the tokens: what such sums can tell apart is this rank.
    places = np.zeros((len(having), len(sizes) + len(budgets)))
    for row, point in zip(places, having, strict=True):
        row[sizes.index(point.parameters)] = row[len(sizes) + budgets.index(point.tokens)] = 1
    return int(np.linalg.matrix_rank(places)) >= len(PARAMETERS)


def can_fit_tokens(points: Sequence[Point], arm: str) -> bool:
    """Whether an arm's rungs, all of one size, tell E + A / N^a, B and b apart: three numbers of tokens do."""
    return len({point.tokens for point in points if point.losses.get(arm)}) >= 3


def fit_law(points: Sequence[Point], arm: str, start: Law | None = None) -> Law:
    """The law of an arm's losses, each seed of each rung a measurement. See `can_fit` for what it takes.

    Minimises the Huber loss (delta 1e-3) of log L - log L(N, D) over E, log A, a, log B, b, from the best of a grid of
    starts; or from `start` alone, less exactly: for the replicates of a bootstrap.
    """
    return _fit(points, arm, True, start)


def fit_tokens(points: Sequence[Point], arm: str, start: Law | None = None) -> Law:
    """The law of tokens alone of an arm's losses at one size, found likewise. See `can_fit_tokens`."""
    return _fit(points, arm, False, start)


def _fit(points: Sequence[Point], arm: str, sized: bool, start: Law | None) -> Law:
    rows = [(p.parameters, p.tokens, loss) for p in points for loss in p.losses.get(arm, {}).values()]
    parameters, tokens, losses = (np.log(np.array(column, dtype=float)) for column in zip(*rows, strict=True))
    # Around the middle of the rungs, so that A and a (B and b) can be moved one without the other.
    centre_n, centre_d = float(parameters.mean()), float(tokens.mean())
    n, d = parameters - centre_n, tokens - centre_d
    # Terms of the sum: exp(base - slope * x) with x = 0 for E.
    axes = [np.zeros_like(n), n, d] if sized else [np.zeros_like(n), d]

    def terms(values: np.ndarray) -> np.ndarray:
        """Logarithms of E, A / N^a and B / D^b at every measurement: (terms, measurements)."""
        return np.stack(
            [values[0] - 0 * n, *(values[2 * i - 1] - values[2 * i] * axes[i] for i in range(1, len(axes)))]
        )

    def residuals(values: np.ndarray) -> np.ndarray:
        return np.logaddexp.reduce(terms(values), axis=0) - losses

    def jacobian(values: np.ndarray) -> np.ndarray:
        logs = terms(values)
        shares = np.exp(logs - np.logaddexp.reduce(logs, axis=0))
        return np.stack(
            [shares[0], *itertools.chain(*((shares[i], -axes[i] * shares[i]) for i in range(1, len(axes))))], 1
        )

    def cost(values: np.ndarray) -> float:
        size = np.abs(residuals(values))
        return float(np.where(size <= DELTA, size**2, DELTA * (2 * size - DELTA)).sum())

    lowest = float(losses.min())
    # E from a hundredth of the lowest loss to just below it, exponents up to 3.
    bounds = (
        [lowest - math.log(100), *([-20.0, 0.0] * (len(axes) - 1))],
        [lowest, *([20.0, 3.0] * (len(axes) - 1))],
    )
    if start is not None:
        begin = [math.log(start.E)]
        if sized:
            begin += [math.log(max(start.A, 1e-300)) - start.a * centre_n, start.a]
        begin += [math.log(max(start.B, 1e-300)) - start.b * centre_d, start.b]
        starts = [np.array(begin)]
    else:
        starts = sorted(_starts(np.exp(losses), axes[1:]), key=cost)[:2]
    exact, most = (1e-10, 500) if start is None else (1e-6, 50)
    found = [
        least_squares(
            residuals,
            np.clip(begin, np.array(bounds[0]) + 1e-9, np.array(bounds[1]) - 1e-9),
            jacobian,
            bounds=bounds,
            loss="huber",
            f_scale=DELTA,
            ftol=exact,
            xtol=exact,
            gtol=1e-12,
            max_nfev=most,
        )
        for begin in starts
    ]
    x = min(found, key=lambda result: float(result.cost)).x
    size = (math.exp(x[1] + x[2] * centre_n), float(x[2])) if sized else (0.0, 0.0)
    return Law(math.exp(x[0]), *size, math.exp(x[-2] + x[-1] * centre_d), float(x[-1]))


def _starts(losses: np.ndarray, axes: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Values to begin a fit with: a grid of E and exponents, each with the A and B that suit it best."""
    starts = []
    for share in (0.2, 0.5, 0.8, 0.95):
        for slopes in itertools.product((0.1, 0.3, 0.6, 1.0), repeat=len(axes)):
            shapes = np.stack([np.exp(-slope * axis) for slope, axis in zip(slopes, axes, strict=True)], 1)
            sizes = np.maximum(nnls(shapes, losses - share * losses.min())[0], 1e-3)
            pairs = zip(np.log(sizes), slopes, strict=True)
            starts.append(np.array([math.log(share * losses.min()), *itertools.chain(*pairs)]))
    return starts


def multiplier(law: Law, point: Point, arm: str, baseline: str) -> float | None:
    """How many times as many tokens the baseline of the same size needs for the arm's loss; None without a loss.

    This is the way of training the same model for longer: it asks the law only along the tokens, mostly between
    rungs that were measured, while the way over the best size for each compute would leave the sizes of the ladder.
    The law is moved so that it goes through the baseline's own loss at the rung: then its misfit there is not taken for
    a gain, and what a seed does to both arms cancels. Infinite where the baseline of this size never gets there.
    """
    gap = point.gap(arm, baseline)
    if gap is None:
        return None
    reached = law.tokens_for(point.parameters, law.loss(point.parameters, point.tokens) - gap)
    return reached / point.tokens


def retention(points: Sequence[Point], arm: str, baseline: str) -> float | None:
    """What is left of the gap when the tokens are ten times as many: gap(10 D) / gap(D), the same for all sizes.

    Slope of log gap over log10 tokens, each size with a level of its own. None where no size has two numbers of tokens,
    or where some gap is not positive: then the arm does not lead, and there is nothing to retain.
    """
    rows = [(p.size, p.tokens, gap) for p in points if (gap := p.gap(arm, baseline)) is not None]
    if any(not gap > 0 for _, _, gap in rows):
        return None
    xs, ys = [], []
    for size in dict.fromkeys(row[0] for row in rows):
        x, y = np.log10(np.array([row[1:] for row in rows if row[0] == size])).T
        xs.append(x - x.mean())
        ys.append(y - y.mean())
    if not xs:
        return None
    x, y = np.concatenate(xs), np.concatenate(ys)
    spread = float(x @ x)
    return 10 ** float(x @ y / spread) if spread > 1e-12 else None


def trend(rows: Sequence[tuple[float, float, float]]) -> dict[str, float | None]:
    """By which factor a multiplier changes, from (parameters, tokens, multiplier) of rungs.

    Least squares of log multiplier over log parameters and log tokens. Over compute alone the two would be mixed: a
    lead that is lost along the tokens looks lasting as soon as larger models are in the picture.

    Returns:
        "tokens": when they are ten times as many at the same size. "parameters": when they are, at the same tokens.
        "compute": when it is ten times as much, and both have the same share of that, or the one of them that varies.
        None for what does not vary, or not apart from the other, and for all where a multiplier is infinite.
    """
    found: dict[str, float | None] = {"tokens": None, "parameters": None, "compute": None}
    if not rows or any(not math.isfinite(worth) or not worth > 0 for _, _, worth in rows):
        return found
    n, d, y = (column - column.mean() for column in np.log10(np.array(rows, dtype=float)).T)
    varying = {name: x for name, x in (("parameters", n), ("tokens", d)) if float(np.abs(x).max()) > 1e-9}
    columns = np.stack(list(varying.values()), 1) if varying else np.zeros((len(y), 0))
    if not varying or np.linalg.matrix_rank(columns) < len(varying):
        return found
    slopes = np.linalg.lstsq(columns, y, rcond=None)[0]
    found |= {name: 10 ** float(slope) for name, slope in zip(varying, slopes, strict=True)}
    found["compute"] = 10 ** float(slopes.mean())
    return found


# What is estimated, under names such as ("law", "none", "E"); a value may be missing (None) or infinite.
Key = tuple[str, ...]
Values = dict[Key, float | None]
Estimates = dict[Key, dict[str, Any]]


def _values(
    points: Sequence[Point], at: Sequence[Point], baseline: str, laws: Mapping[Key, Law] | None, by_size: bool = True
) -> Values:
    """All that a ladder tells, from `points`; multipliers at the rungs `at`. `laws`: to begin the fits with.

    `by_size`: also what is told of each size alone. Keys: ("law", arm, name), ("size law", arm, size, name),
    ("gap", arm, index), ("tokens", arm, index), ("compute", arm, index), ("retention", arm), ("retention", arm, size),
    ("trend", arm, "tokens" | "parameters" | "compute"); index is that of a rung in `at`.
    """
    values: Values = {}
    arms = list(dict.fromkeys(arm for point in at for arm in point.losses))
    sizes = list(dict.fromkeys(point.size for point in at))
    found: dict[Key, Law] = {}
    for arm in arms:
        if can_fit(points, arm):
            key: Key = ("law", arm)
            found[key] = fit_law(points, arm, (laws or {}).get(key))
        for size in sizes if by_size else []:
            own = [point for point in points if point.size == size]
            if can_fit_tokens(own, arm):
                key = ("size law", arm, size)
                found[key] = fit_tokens(own, arm, (laws or {}).get(key))
    for key, law in found.items():
        values |= {(*key, name): getattr(law, name) for name in PARAMETERS}
    for arm in arms:
        if arm == baseline:
            continue
        worths = []
        for index, point in enumerate(at):
            law_ = found.get(("law", baseline)) or found.get(("size law", baseline, point.size))
            gap = point.gap(arm, baseline)
            values["gap", arm, str(index)] = gap
            tokens = multiplier(law_, point, arm, baseline) if law_ else None
            values["tokens", arm, str(index)] = tokens
            worth = None if tokens is None else tokens * point.throughput.get(arm, 1.0)
            values["compute", arm, str(index)] = worth
            if worth is not None:
                worths.append((point.parameters, point.tokens, worth))
        values["retention", arm] = retention(points, arm, baseline)
        for size in sizes if by_size else []:
            own = [point for point in points if point.size == size]
            values["retention", arm, size] = retention(own, arm, baseline)
        values |= {("trend", arm, over): value for over, value in trend(worths).items()}
    return values


def _laws(values: Values) -> dict[Key, Law]:
    keys = dict.fromkeys(key[:-1] for key in values if key[0] in ("law", "size law"))
    return {key: Law(**{name: values[*key, name] for name in PARAMETERS}) for key in keys}  # type: ignore[arg-type]


def estimate(points: Sequence[Point], baseline: str, replicates: int = 100, seed: int = 0) -> Estimates:
    """All that a ladder tells: value and 95 % interval of laws, gaps, multipliers, retention and trend.

    Multipliers are read off the baseline's law of sizes and tokens where there is one, else off its law of tokens at
    the rung's size. Intervals are percentiles of a bootstrap over rungs and, in each of them, over seeds, the same for
    all arms. Rungs are drawn only where enough of them are left for what is asked; one seed has no spread.

    Args:
        replicates: of the bootstrap; Hoffmann et al. take 100.

    Returns:
        Keys as in `_values` -> {"value": number, None or infinity, "ci95": (low, high) or None}.
    """
    values = _values(points, points, baseline, None)
    laws = _laws(values)
    random = np.random.default_rng(seed)
    many_seeds = any(len(losses) > 1 for point in points for losses in point.losses.values())
    drawable = can_fit(points, baseline)
    drawn: list[Values] = []
    for _ in range(replicates if drawable or many_seeds else 0):
        again = [_redrawn(point, random) for point in points]
        chosen = _some(again, baseline, random) if drawable else again
        # Of a drawn ladder one size alone has too few rungs left.
        replicate = _values(chosen, again, baseline, laws, by_size=not drawable)
        if not many_seeds:  # nothing was drawn for them
            replicate = {key: value for key, value in replicate.items() if key[0] != "gap"}
        drawn.append(replicate)
    return {
        key: {"value": value, "ci95": _interval(value, [d.get(key) for d in drawn])} for key, value in values.items()
    }


def _redrawn(point: Point, random: np.random.Generator) -> Point:
    """The rung with its seeds drawn again, with replacement, the same for all arms."""
    seeds = sorted({seed for losses in point.losses.values() for seed in losses})
    picked = [seeds[i] for i in random.integers(len(seeds), size=len(seeds))] if seeds else []
    losses = {
        arm: {i: per_seed[seed] for i, seed in enumerate(picked) if seed in per_seed}
        for arm, per_seed in point.losses.items()
    }
    return replace(point, losses=losses)


def _some(points: Sequence[Point], baseline: str, random: np.random.Generator, tries: int = 50) -> list[Point]:
    """As many rungs drawn with replacement, such that every law that could be fitted still can."""
    arms = [arm for arm in dict.fromkeys(arm for p in points for arm in p.losses) if can_fit(points, arm)]
    for _ in range(tries):
        chosen = [points[i] for i in random.integers(len(points), size=len(points))]
        if all(can_fit(chosen, arm) for arm in arms):
            return chosen
    return list(points)


def _interval(value: float | None, drawn: Sequence[float | None]) -> tuple[float, float] | None:
    """2.5 and 97.5 % of the replicates; None where most have no value."""
    known = [d for d in drawn if d is not None]
    if value is None or len(known) < 20 or len(known) < len(drawn) / 2:
        return None
    low, high = (float(np.quantile(known, q, method="nearest")) for q in (0.025, 0.975))
    return low, high
