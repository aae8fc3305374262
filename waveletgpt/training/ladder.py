"""A ladder: a comparison at every size of model and number of tokens, each run with its own learning-rate decay.

One comparison tells how far an arm is ahead at one size; a ladder, how the lead changes as models and data grow.
A rung is a comparison in a folder of its own, SIZE-TOKENS. With a sweep every arm gets its settings (a learning rate)
at every size, by validation loss after the shortest training, or at every rung; `report/ladder.py` has the figures.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from waveletgpt.data.mixture import Mixture, parts_of
from waveletgpt.errors import UserError, tell
from waveletgpt.report.ladder import FILES, count_name, parse_rung, rung_name
from waveletgpt.report.ladder_page import write_ladder
from waveletgpt.report.summary import newest_summary, read_sweep, sweep_folder
from waveletgpt.runs.folder import RunFolder
from waveletgpt.settings import check_choice
from waveletgpt.training import processes
from waveletgpt.training.compare import compare, parse_arms
from waveletgpt.training.recipe import Recipe
from waveletgpt.training.resuming import find_start
from waveletgpt.training.sweep import sweep, variants

if TYPE_CHECKING:
    from waveletgpt.data import TokenStore

# Up to four times through the data is about as good as new data: Muennighoff et al. 2023, arXiv 2305.16264.
MOST_EPOCHS = 4
EVAL_WINDOWS = 128
"""Held-out windows that all rungs are measured on, unless the recipe says how many."""

_SHAPE = ("n_layer", "n_embd", "n_head", "n_kv_head", "n_inner")
_COUNT = re.compile(r"(\d+(?:\.\d+)?(?:e\d+)?)([kKMBG]?)$")
_UNITS = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9}


def parse_count(text: str, what: str) -> int:
    """ "1.2M" -> 1200000; `what` names it in the error.

    Raises:
        UserError: not a number such as 60k, 1.2M, 1e6; less than 1.
    """
    found = _COUNT.match(text.strip())
    value = float(found[1]) * _UNITS[found[2]] if found else 0.0
    if not 0.5 < value < math.inf:
        raise UserError(f"{what} {text}: give a number such as 60k, 1.2M or 1e6")
    return round(value)


@dataclass(frozen=True)
class Shape:
    """Depth, width and heads of a model, and the parameters of its blocks."""

    n_layer: int
    n_embd: int
    n_head: int
    parameters: int


def shape_of(size: int, architecture: str) -> Shape:
    """The model of about `size` parameters in its blocks; embeddings, norms and biases are not counted.

    Width and depth grow together, the depth slowly: n_layer near 6 (size / 1.18e6)^0.162, on which lie the presets
    `small` (6 blocks of 128) and `gpt2` (12 of 768). Of the depths within one of that and the widths allowed (multiples
    of 8, from 64 on of 16, from 128 on of 32, from 512 on of 64) it is the pair with the smallest |log(parameters /
    size)| + |log(depth / that)| / 2. Heads are as close as can be to 32 wide, from 512 on to 64, and at least two.

    Raises:
        UserError: too small for two blocks of width 8; more than width 16,384 gives.
    """
    depth = 6 * (size / 1.18e6) ** (math.log(2) / math.log(72))

    def parameters(n_layer: int, n_embd: int) -> int:
        # The feed-forward widths are the defaults of WaveletGPTConfig.
        inner = 2 * 4 * n_embd if architecture == "gpt2" else 3 * (-(-8 * n_embd // 96) * 32)
        return n_layer * n_embd * (4 * n_embd + inner)

    widths = [w for w in range(8, 16385, 8) if w % (8 if w < 64 else 16 if w < 128 else 32 if w < 512 else 64) == 0]
    depths = range(max(2, math.floor(depth)), math.floor(depth) + 2)
    n_layer, n_embd = min(
        ((layers, width) for layers in depths for width in widths),
        key=lambda p: abs(math.log(parameters(*p) / size)) + abs(math.log(p[0] / depth)) / 2,
    )
    if parameters(n_layer, n_embd) > 1.5 * size:
        raise UserError(
            f"sizes {count_name(size)}: the smallest model has {parameters(2, 8):,} parameters in its blocks"
        )
    if parameters(n_layer, n_embd) < size / 1.5:
        largest = count_name(parameters(n_layer, n_embd))
        raise UserError(f"sizes {count_name(size)}: the largest model has {largest} parameters in its blocks")
    wanted = max(2, n_embd / (32 if n_embd < 512 else 64))
    # Rotary positions need an even head width.
    heads = [h for h in range(1, n_embd // 2 + 1) if n_embd % h == 0 and n_embd // h % 2 == 0]
    n_head = min(heads, key=lambda h: abs(math.log(h / wanted)))
    return Shape(n_layer, n_embd, n_head, parameters(n_layer, n_embd))


@dataclass(frozen=True)
class Rung:
    """One size and number of tokens: the recipe of its runs, and the folder of its comparison."""

    size: int
    tokens: int
    shape: Shape
    recipe: Recipe

    @property
    def name(self) -> str:
        return rung_name(self.size, self.tokens)


def tokens_per_step(recipe: Recipe) -> int:
    """Tokens of one optimiser step, over all processes."""
    sequences = recipe.batch_size * recipe.training.accumulation * processes.count()
    return sequences * int(recipe.model_settings()["n_positions"])


def make_rung(recipe: Recipe, size: int, tokens: int) -> Rung:
    """The rung of `size` parameters and the whole number of steps closest to `tokens`, whatever the recipe has.

    Raises:
        UserError: fewer tokens than a batch has; see `shape_of`.
    """
    shape, step = shape_of(size, recipe.architecture), tokens_per_step(recipe)
    if tokens < step:
        raise UserError(f"tokens {count_name(tokens)}: one batch has {step:,} already; give more, or a smaller batch")
    sizes = {"n_layer": shape.n_layer, "n_embd": shape.n_embd, "n_head": shape.n_head}
    # The same windows for all rungs, those that are added later too, or their losses could not be put in one law.
    windows = recipe.training.eval_windows or EVAL_WINDOWS
    settings = {**dict.fromkeys(_SHAPE), **sizes, "max_steps": round(tokens / step), "eval_windows": windows}
    return Rung(size, tokens, shape, recipe.override(settings, "ladder"))


def plan(
    recipe: Recipe,
    out: str | Path,
    *,
    arms: Sequence[str],
    sizes: Sequence[str],
    tokens: Sequence[str],
    seeds: int = 1,
    grid: dict[str, list[str]] | None = None,
    resume: bool = False,
) -> list[Rung]:
    """The rungs, by size and tokens: all that can be checked before data is prepared.

    Raises:
        UserError: a size or a number of tokens that is not a number, or given twice; one rung only; fewer tokens than a
            batch; arms or a sweep that set what the rungs do; an `out` that holds something else, or a ladder and no
            `resume`.
    """
    if recipe.base_model is not None:
        raise UserError("a ladder sets the sizes of its models, a base_model has its own: use `waveletgpt compare`")
    counts: dict[str, list[int]] = {}
    for what, texts in (("sizes", sizes), ("tokens", tokens)):
        counts[what] = sorted(parse_count(text, what) for text in texts)
        if not texts:
            raise UserError(f"{what}: give one or more, such as 0.3M 1.2M")
        if len(set(counts[what])) < len(texts):
            raise UserError(f"{what} {' '.join(texts)}: one is given twice")
    if len(sizes) * len(tokens) < 2:
        raise UserError(
            "one size and one number of tokens make one rung; give more of either, or use `waveletgpt compare`"
        )
    if seeds < 1:
        raise UserError(f"`seeds` must be at least 1, got {seeds}")
    specs = [v for arm in arms for v in variants(arm, grid).values()] if grid else list(arms)
    bare = recipe.override(dict.fromkeys(_SHAPE), "ladder")
    parse_arms(list(arms), bare)
    for arm in parse_arms(specs, bare):
        given = [name for name in _SHAPE if getattr(arm.recipe.model, name) is not None]
        given += ["base_model"] if arm.recipe.base_model is not None else []
        given += ["max_steps"] if arm.recipe.max_steps != recipe.max_steps else []
        if given:
            raise UserError(
                f"arm {arm.name} sets {', '.join(given)}, which a ladder takes from its rungs; leave it out"
            )
        if tokens_per_step(arm.recipe) != tokens_per_step(recipe):
            raise UserError(
                f"arm {arm.name}: all arms take steps of the same tokens; set the batch for the whole ladder"
            )
    rungs = [make_rung(recipe, size, count) for size in counts["sizes"] for count in counts["tokens"]]
    for a, b in itertools.pairwise(rungs):
        if a.size == b.size and a.recipe.max_steps == b.recipe.max_steps:
            raise UserError(f"tokens {count_name(a.tokens)} and {count_name(b.tokens)} are the same number of steps")
        if a.size != b.size and a.shape == b.shape:
            raise UserError(f"sizes {count_name(a.size)} and {count_name(b.size)} give the same model, {a.shape}")
    _check_folder(Path(out), resume)
    return rungs


def _check_folder(out: Path, resume: bool) -> None:
    if out.is_file():
        raise UserError(f"`out={out}` is a file; name a folder")
    there = sorted(child.name for child in out.iterdir()) if out.is_dir() else []
    foreign = [name for name in there if name not in FILES and parse_rung(name.removesuffix("-sweep")) is None]
    if foreign:
        raise UserError(f"`out={out}` holds {foreign[0]}, which is no part of a ladder; name another folder")
    if there and not resume:
        raise UserError(
            f"`out={out}` already holds a ladder; add `resume=True` to go on with it, or name another folder"
        )


def check_data(store: TokenStore | Mixture, rungs: Sequence[Rung]) -> None:
    """Raises UserError where a rung would read the training data more than four times."""
    most = max(rung.tokens for rung in rungs)
    for part in parts_of(store):
        have, of = len(part.store.split("train")), f" of {part.name}" if isinstance(store, Mixture) else ""
        enough = int(MOST_EPOCHS * have / part.weight)
        if most > enough:
            raise UserError(
                f"tokens {count_name(most)}: the training data{of} has {have:,}, and more than {MOST_EPOCHS} times "
                f"through it is not like more data; give more data, or {count_name(enough)} tokens at most"
            )


def train_ladder(
    recipe: Recipe,
    store: TokenStore | Mixture,
    out: str | Path,
    *,
    data: str | Sequence[str],
    arms: Sequence[str],
    sizes: Sequence[str],
    tokens: Sequence[str],
    seeds: int = 1,
    grid: dict[str, list[str]] | None = None,
    sweep_every: str = "size",
    resume: bool = False,
    workers: str | int = 1,
    engine: str = "local",
) -> dict[str, Any]:
    """Train every arm at every rung, and write ladder.json, ladder.csv and report.html in `out` after each of them.

    Finished runs are kept and unfinished ones go on with `resume=True`; the same call with more sizes, tokens, arms or
    seeds makes a ladder larger. Sizes are independent of each other, so several processes may each train some of them
    in one `out`.

    Args:
        sizes, tokens: such as "1.2M"; see `shape_of` for what a size is.
        grid: settings to try with every arm, as of `sweep.parse_grid`.
        sweep_every: "size", on its fewest tokens, for all its rungs; or "rung". A rung that was swept keeps its own.
        workers, engine: runs of a rung, or trials of a sweep, at a time, and where; see `compare`.

    Returns:
        The content of ladder.json.

    Raises:
        UserError: see `plan`, `check_data`, `sweep.sweep` and `compare`.
        Interrupted: Ctrl-C; what was trained is saved.
        Diverged: every run did.
    """
    from waveletgpt.training.trainer import Diverged

    check_choice("`sweep_every`", sweep_every, ("size", "rung"))
    out = Path(out)
    at_once: dict[str, Any] = {"workers": workers, "engine": engine}
    planned: dict[str, Any] = {"arms": arms, "sizes": sizes, "tokens": tokens, "seeds": seeds, "grid": grid}
    rungs = processes.from_first(lambda: plan(recipe, out, **planned, resume=resume))
    check_data(store, rungs)
    ladder: dict[str, Any] = {}
    for size in dict.fromkeys(rung.size for rung in rungs):
        own = [rung for rung in rungs if rung.size == size]
        for rung in own:
            chosen = _tuned(rung, store, out, data, list(arms), grid, sweep_every, at_once) if grid else list(arms)
            folder = out / rung.name
            if not processes.from_first(lambda f=folder, r=rung, c=chosen: _finished(r, store, f, c, seeds)):  # type: ignore[misc]
                try:
                    compare(rung.recipe, store, folder, data=data, arms=chosen, seeds=seeds, resume=True, **at_once)
                except Diverged as error:
                    if processes.first():
                        tell(f"waveletgpt: {rung.name}: {error}")
                    continue
            ladder = processes.from_first(lambda: write_ladder(out))
    if not ladder:
        raise Diverged("no run of any rung came to its end: see above")
    return ladder


def _finished(rung: Rung, store: TokenStore | Mixture, folder: Path, arms: Sequence[str], seeds: int) -> bool:
    """Whether all runs of a rung are done, and reported, with these settings and this data.

    Raises UserError for others.
    """
    if not (folder / "report.html").is_file():  # a sweep has put runs there
        return False
    reported = {arm: entry.get("seeds") or [] for arm, entry in newest_summary(folder)["arms"].items()}
    for seed in range(rung.recipe.seed, rung.recipe.seed + seeds):
        for arm in parse_arms(list(arms), rung.recipe):
            run = RunFolder(folder / arm.folder(seed))
            if not run.finished or seed not in reported.get(arm.name, ()):
                return False
            then = arm.recipe.override({"seed": seed}, "`seeds`").with_evaluations(run.info["recipe"])
            find_start(run, then, store.fingerprint, True)
    return True


def _tuned(
    rung: Rung,
    store: TokenStore | Mixture,
    out: Path,
    data: str | Sequence[str],
    arms: list[str],
    grid: dict[str, list[str]],
    every: str,
    at_once: dict[str, Any],
) -> list[str]:
    """The arms with the best of `grid` for a rung: by a sweep of its own, or by one for each size, made once.

    A ladder that is resumed has its sweep already, perhaps at another number of tokens than the smallest one now.
    """

    def found_at(place: Rung) -> list[str] | None:
        record = read_sweep(sweep_folder(out / place.name))
        if record is None or record["grid"] != grid or record["fingerprint"] != store.fingerprint:
            return None
        known = [
            [arm for arm in variants(name, grid).values() if parse_arms([arm], rung.recipe)[0].name in record["arms"]]
            for name in arms
        ]
        return [found[0] for found in known] if all(known) else None

    def look() -> tuple[Rung, list[str] | None]:
        """The rung to sweep, and what its sweep has found if there was one."""
        own = found_at(rung)
        if own is not None or every == "rung":
            return rung, own
        swept = [parse_rung(folder.name.removesuffix("-sweep")) for folder in out.glob("*-sweep")]
        tokens = [place[1] for place in swept if place is not None and place[0] == rung.size]
        place = make_rung(rung.recipe, rung.size, min(tokens)) if tokens else rung
        return place, found_at(place)

    place, found = processes.from_first(look)
    if found is not None:
        return found
    return sweep(place.recipe, store, out / place.name, data=data, arms=arms, grid=grid, resume=True, **at_once)
