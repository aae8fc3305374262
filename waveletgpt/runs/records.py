"""What run.json holds, entry by entry: the types that `RunFolder.info` and its readers share.

A run that has not finished has no `result`, and runs of earlier versions lack what was added later: every entry may be
missing (`total=False`).
"""

from __future__ import annotations

from typing import Any, TypedDict


class SplitRecord(TypedDict, total=False):
    """The size of a split: tokens of language models, examples of classifiers."""

    documents: int
    tokens: int
    bytes: int | None
    examples: int


class DataRecord(TypedDict, total=False):
    """What was trained on. `fingerprint` tells one content and preparation from another."""

    name: str
    modality: str
    fingerprint: str
    store: str
    """Where the prepared data lay; a mixture has several, in `mixture`."""
    splits: dict[str, SplitRecord]
    source: Any
    """What the modality says of the files it read."""
    # Language modeling
    vocab_size: int
    bytes_per_token: dict[str, float | None]
    mixture: dict[str, dict[str, Any]]
    """The sources of a mixture by name: weight, fingerprint, store, tokens."""
    # Classification
    classes: int
    multi_label: bool
    max_length: int


class StateBytes(TypedDict):
    """Bytes per sequence that cached decoding holds at the full context."""

    keys_values: int
    mixing: int


class ModelRecord(TypedDict, total=False):
    """The size and the cost of a model."""

    parameters: int
    extra_parameters: int
    """Those of the mixers."""
    flops_per_token: int
    """Of a training step, forward and backward, with mixing."""
    mixing_flops_per_token: int
    windows: list[int]
    mix_width: int
    """Channels at the first site of the mixing."""
    n_embd: int
    n_layer: int
    n_head: int
    n_positions: int
    state_bytes: StateBytes
    # A model of transformers (`base_model`)
    model_type: str
    identity: str


class EnvironmentRecord(TypedDict, total=False):
    """Versions and hardware."""

    waveletgpt: str
    python: str
    torch: str
    transformers: str
    accelerate: str
    numpy: str
    tokenizers: str
    platform: str
    cpu: str
    cores: int | None
    threads: int
    gpu: str | None
    processes: int
    git_revision: str | None
    date: str
    at_once: int
    """The most runs that shared the machine."""


class LossPart(TypedDict):
    """The loss of some of the held-out tokens: `nll`, in nats per token, is None where there are none."""

    nll: Any
    tokens: int


class LossAtPositions(LossPart):
    """Of predictions that have seen `first` to `last` tokens."""

    first: int
    last: int


class NearAttention(TypedDict):
    """The share of attention within two tokens, over all blocks and in each."""

    share: Any
    by_block: list[Any]
    windows: int


class SourceLoss(TypedDict):
    """The loss on a source of a mixture, in nats per token, over so many windows."""

    nll: Any
    windows: int


class Breakdown(TypedDict, total=False):
    """Where the held-out loss comes from; see `runs.breakdown.break_down`."""

    pairs: dict[str, LossPart]
    positions: list[LossAtPositions]
    near_attention: NearAttention | None
    sources: dict[str, SourceLoss]
    """Of a mixture."""


class SplitScores(TypedDict, total=False):
    """A classifier's scores on a split, as shares."""

    accuracy: float
    map: float
    top5: float
    recordings: int
    majority_class: float
    """The accuracy of always naming the most common class."""


class ResultRecord(TypedDict, total=False):
    """What came of a finished run."""

    final_nll: float
    seconds: float
    """Of training: evaluation, saving and sampling are excluded."""
    tokens_per_second: float
    flops_per_second: float
    mfu: float | None
    steps: int
    tokens: int
    waiting_for_data: float
    """Share of the seconds."""
    # Language modeling
    bits_per_byte: float | None
    breakdown: Breakdown
    # Classification
    validation: SplitScores
    test: SplitScores


class RunRecord(TypedDict, total=False):
    """run.json."""

    schema: int
    status: str
    """running, interrupted, failed or finished."""
    error: str
    """Why it failed."""
    task: str
    arm: str
    seed: int
    command: str
    recipe: dict[str, Any]
    """Every setting, as `Recipe.as_dict` has it, and `data`: the names or paths that were given."""
    data: DataRecord
    model: ModelRecord
    environment: EnvironmentRecord
    probe: list[int]
    """Held-out token ids to picture embeddings with; empty where inputs are not tokens."""
    result: ResultRecord
