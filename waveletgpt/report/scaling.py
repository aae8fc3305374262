"""Scaling laws: a loss as a function of parameters and tokens, and what a lower loss is worth. No files, no torch.

    L(N, D) = E + A / N^a + B / D^b        Hoffmann et al. 2022, arXiv 2203.15556, approach 3

N parameters, D tokens of training, L validation loss in nats per token. E is the loss that is left for any model and
any amount of data. The other terms are the loss due to finite parameters and to finite data.
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

# The residual of log-losses at which the Huber loss turns from square to linear: Hoffmann et al., Appendix D.3.
DELTA = 1e-3
PARAMETERS = ("E", "A", "a", "B", "b")


@dataclass(frozen=True)
class Law:
    """L(N, D) = E + A / N^a + B / D^b. With A = 0 it is a law of tokens alone, for one size of model."""

    E: float
    A: float
    a: float
    B: float
    b: float

    def loss(self, parameters: float, tokens: float) -> float:
        """Loss, in nats per token, of a model with `parameters` after training on `tokens`."""
        return float(self.E + self.A * parameters**-self.a + self.B * tokens**-self.b)

    def tokens_for(self, parameters: float, loss: float) -> float:
        """Tokens after which a model with `parameters` has this loss; infinite if it never has."""
        lacking = loss - self.E - self.A * parameters**-self.a
        if not lacking > 0 or not self.B > 0 or not self.b > 0:
            return math.inf
        log = (math.log(self.B) - math.log(lacking)) / self.b
        return math.exp(log) if log < 700 else math.inf


@dataclass(frozen=True)
class Point:
    """One rung of a ladder: a size of model trained on a number of tokens, with every arm and seed."""

    size: str
    parameters: float
    tokens: float
    compute: float
    """FLOPs of the baseline's training."""
    losses: Mapping[str, Mapping[int, float]]
    """Arm -> seed -> final validation loss."""
    throughput: Mapping[str, float] = field(default_factory=dict)
    """Arm -> its tokens per second / the baseline's; 1 if not known."""

    def loss(self, arm: str) -> float | None:
        """Mean loss over seeds; None without runs."""
        values = list(self.losses.get(arm, {}).values())
        return float(np.mean(values)) if values else None

    def gap(self, arm: str, baseline: str) -> float | None:
        """The baseline's loss minus the arm's, in nats, over the seeds that both have; None if they share none."""
        ours, theirs = self.losses.get(arm, {}), self.losses.get(baseline, {})
        seeds = [seed for seed in ours if seed in theirs]
        return float(np.mean([theirs[seed] - ours[seed] for seed in seeds])) if seeds else None


def can_fit(points: Sequence[Point], arm: str) -> bool:
    """Whether an arm's rungs determine all five parameters.

    A power law with an offset has three parameters along each axis, so this takes three sizes, three numbers of tokens,
    and rungs that connect them: 3 x 3 is enough, 2 x 5 is not.
    """
    having = [point for point in points if point.losses.get(arm)]
    sizes, budgets = sorted({p.parameters for p in having}), sorted({p.tokens for p in having})
    if len(sizes) < 3 or len(budgets) < 3:
        return False
    # The law is a function of the size plus a function of the tokens. This rank is the number of independent values
    # that the rungs give for such a sum.
    places = np.zeros((len(having), len(sizes) + len(budgets)))
    for row, point in zip(places, having, strict=True):
        row[sizes.index(point.parameters)] = row[len(sizes) + budgets.index(point.tokens)] = 1
    return int(np.linalg.matrix_rank(places)) >= len(PARAMETERS)


def can_fit_tokens(points: Sequence[Point], arm: str) -> bool:
    """Whether an arm's rungs, all of one size, determine E + A / N^a, B and b. It takes three numbers of tokens."""
    return len({point.tokens for point in points if point.losses.get(arm)}) >= 3


def fit_law(points: Sequence[Point], arm: str, start: Law | None = None) -> Law:
    """The law fitted to an arm's losses; each seed of each rung is a measurement. See `can_fit` for what it takes.

    Minimises the Huber loss (delta 1e-3) of log L - log L(N, D) over E, log A, a, log B, b, from the best start of a
    grid. With `start`, from that alone and less exactly, for bootstrap replicates.
    """
    return _fit(points, arm, True, start)


def fit_tokens(points: Sequence[Point], arm: str, start: Law | None = None) -> Law:
    """The law of tokens alone, fitted in the same way to an arm's losses at one size. See `can_fit_tokens`."""
    return _fit(points, arm, False, start)


def _fit(points: Sequence[Point], arm: str, sized: bool, start: Law | None) -> Law:
    rows = [(p.parameters, p.tokens, loss) for p in points for loss in p.losses.get(arm, {}).values()]
    parameters, tokens, losses = (np.log(np.array(column, dtype=float)) for column in zip(*rows, strict=True))
    # Centre the axes at the middle of the rungs, so that the fit can change A without a, and B without b.
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
    """Starting values of a fit: a grid of E and exponents, each with the best A and B for it."""
    starts = []
    for share in (0.2, 0.5, 0.8, 0.95):
        for slopes in itertools.product((0.1, 0.3, 0.6, 1.0), repeat=len(axes)):
            shapes = np.stack([np.exp(-slope * axis) for slope, axis in zip(slopes, axes, strict=True)], 1)
            sizes = np.maximum(nnls(shapes, losses - share * losses.min())[0], 1e-3)
            pairs = zip(np.log(sizes), slopes, strict=True)
            starts.append(np.array([math.log(share * losses.min()), *itertools.chain(*pairs)]))
    return starts


def multiplier(law: Law, point: Point, arm: str, baseline: str) -> float | None:
    """Factor by which the baseline of the same size needs more tokens for the arm's loss; None without a loss.

    It compares with training the same model for longer, so that the law is used along the tokens only, mostly between
    measured rungs. With the best size for each compute instead, the law would be used at sizes outside the ladder.
    The law is shifted to go through the baseline's loss at the rung. So its error there does not count as a gain, and
    effects of a seed on both arms cancel. Infinite if the baseline of this size never reaches the loss.
    """
    gap = point.gap(arm, baseline)
    if gap is None:
        return None
    reached = law.tokens_for(point.parameters, law.loss(point.parameters, point.tokens) - gap)
    return reached / point.tokens


def retention(points: Sequence[Point], arm: str, baseline: str) -> float | None:
    """Share of the gap that is left with ten times as many tokens, gap(10 D) / gap(D), the same for all sizes.

    It follows from the slope of log gap over log10 tokens, with a separate level for each size. None if no size has two
    numbers of tokens, or if a gap is not positive: then there is no lead to retain.
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
    """The factor by which a multiplier changes, from (parameters, tokens, multiplier) of rungs.

    Least squares of log multiplier over log parameters and log tokens. A fit over compute alone would not separate the
    two: a lead that shrinks with more tokens could seem to last because larger models are among the rungs.

    Returns:
        The factor for ten times the "tokens" at the same size, for ten times the "parameters" at the same tokens, and
        for ten times the "compute", shared equally between the two or, if only one varies, due to that one. None if
        the quantity does not vary, or only together with the other; all None if a multiplier is infinite.
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
    """All estimates from `points`, with multipliers at the rungs `at`. The fits start from `laws`.

    `by_size` adds the estimates of each size alone. Keys: ("law", arm, name), ("size law", arm, size, name),
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
    """All estimates of a ladder: value and 95 % interval of laws, gaps, multipliers, retention and trend.

    Multipliers come from the baseline's law of sizes and tokens if there is one, else from its law of tokens at the
    rung's size. Intervals are percentiles of a bootstrap over rungs and, within each rung, over seeds; all arms have
    the same draws. Rungs are drawn only if the laws can still be fitted; with one seed there is no spread over seeds.

    Args:
        replicates: number of bootstrap replicates; Hoffmann et al. use 100.

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
        # In a drawn ladder a single size has too few rungs left.
        replicate = _values(chosen, again, baseline, laws, by_size=not drawable)
        if not many_seeds:  # without several seeds nothing was drawn for them
            replicate = {key: value for key, value in replicate.items() if key[0] != "gap"}
        drawn.append(replicate)
    return {
        key: {"value": value, "ci95": _interval(value, [d.get(key) for d in drawn])} for key, value in values.items()
    }


def _redrawn(point: Point, random: np.random.Generator) -> Point:
    """The rung with seeds drawn with replacement, the same ones for all arms."""
    seeds = sorted({seed for losses in point.losses.values() for seed in losses})
    picked = [seeds[i] for i in random.integers(len(seeds), size=len(seeds))] if seeds else []
    losses = {
        arm: {i: per_seed[seed] for i, seed in enumerate(picked) if seed in per_seed}
        for arm, per_seed in point.losses.items()
    }
    return replace(point, losses=losses)


def _some(points: Sequence[Point], baseline: str, random: np.random.Generator, tries: int = 50) -> list[Point]:
    """The same number of rungs, drawn with replacement so that every law that could be fitted still can be."""
    arms = [arm for arm in dict.fromkeys(arm for p in points for arm in p.losses) if can_fit(points, arm)]
    for _ in range(tries):
        chosen = [points[i] for i in random.integers(len(points), size=len(points))]
        if all(can_fit(chosen, arm) for arm in arms):
            return chosen
    return list(points)


def _interval(value: float | None, drawn: Sequence[float | None]) -> tuple[float, float] | None:
    """The 2.5 and 97.5 % percentiles of the replicates; None if most have no value."""
    known = [d for d in drawn if d is not None]
    if value is None or len(known) < 20 or len(known) < len(drawn) / 2:
        return None
    low, high = (float(np.quantile(known, q, method="nearest")) for q in (0.025, 0.975))
    return low, high
