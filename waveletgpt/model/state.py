"""`State`, what one filter remembers of the tokens before: for decoding, and for chunks.

Needs torch alone, and travels in checkpoints.

Shapes: B batch, T new tokens, C mixed channels, S inputs that the filter looks back, D what is kept of each.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    from waveletgpt.errors import UserError
except ImportError:  # in a checkpoint
    UserError = ValueError  # type: ignore[assignment, misc]


class State:
    """The last inputs of one filter, oldest first.

    Args:
        needed: S.
        counting: keep a 1 beside each input, to tell inputs from the zeros before the first one (for `edge="partial"`).
        recording: keep all from now on, so that tokens can be taken back.
        static: keep S inputs at a fixed address, as compiled graphs need it.
    """

    def __init__(self, needed: int, counting: bool = False, recording: bool = False, static: bool = False):
        self.needed, self.counting, self.recording, self.static = needed, counting, recording, static
        self._buffer: Tensor | None = None  # with spare room, so that appending a token does not copy all of them
        self._end = 0
        self._whole = True  # no input was discarded yet

    @property
    def inputs(self) -> Tensor | None:
        """(B, any, D) all that is kept; None before the first token."""
        return None if self._buffer is None else self._buffer[:, : self._end]

    def last(self) -> Tensor | None:
        """(B, at most S, D) the inputs that the next token may need. Those of another document are 0."""
        if self._buffer is None:
            return None
        length = min(self.needed, self._end)
        return self._buffer.narrow(1, self._end - length, length)  # faster than slicing, and every token does it

    def recall(self, x: Tensor, reach: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """What a filter needs for the next tokens x (B, T, C): the inputs before, and `reach` (B or 1, T) in all of it.

        Raises:
            ValueError: the state is of another batch size, width or dtype.
        """
        last, tokens = self.last(), x.shape[1]
        if last is None:
            return None, reach
        self._check(last, x)
        if self.static:
            last = last.clone()  # `append` writes over it
        if not self.counting:
            return last, reach
        last, there = last.split([last.shape[2] - 1, 1], dim=2)
        seen = there.detach().sum(1, dtype=torch.int64) + torch.arange(tokens, device=last.device)
        return last, seen if reach is None else torch.minimum(reach, seen)

    def append(self, x: Tensor, reach: Tensor | None = None) -> None:
        """Append x (B, T, C). Inputs that the last token may not look at, by `reach` (B or 1, T), become 0."""
        if self.counting:
            x = F.pad(x, (0, 1), value=1.0)
        tokens = x.shape[1]
        if reach is None and not self.static and self._has_room(tokens):
            self._buffer.narrow(1, self._end, tokens).copy_(x)  # type: ignore[union-attr]
            self._end += tokens
            return
        old = self.inputs
        if old is None and self.static:
            old = x.new_zeros(x.shape[0], self.needed, x.shape[2])
        whole = x if old is None else torch.cat([old, x], dim=1)
        if reach is not None:
            ago = torch.arange(whole.shape[1] - 1, -1, -1, device=x.device)
            whole = torch.where((ago <= reach[:, -1:]).unsqueeze(2), whole, 0)
        if self.static:
            self._overwrite(whole[:, whole.shape[1] - self.needed :])
            return
        if not self.recording and whole.shape[1] > self.needed:
            whole, self._whole = whole[:, whole.shape[1] - self.needed :], False
        self._hold(whole, room=max(16, self.needed // 4) * (not torch.is_grad_enabled()))

    def check_crop(self, tokens: int) -> None:
        """Refuse to take back so many tokens, if inputs that would be needed then were not kept.

        Raises:
            ValueError: with what was recorded.
        """
        most = max(0, self._end - (0 if self._whole else self.needed)) if self.recording else 0
        if tokens > most and self._buffer is not None:
            raise UserError(
                f"mixing can't take back {tokens} tokens: call cache.activate_past_recording() before the forward pass "
                f"that is to be undone (of those since then {most} are left)"
            )

    def crop(self, tokens: int) -> None:
        """Take back the last tokens; raises as `check_crop`."""
        self.check_crop(tokens)
        if self._buffer is not None:
            self._end -= tokens

    def each_row(self, change: Callable[[Tensor], Tensor]) -> None:
        """Change the rows of the batch: repeat, select or reorder them."""
        if self._buffer is not None and self.static:
            self._overwrite(change(self._buffer))
        elif self._buffer is not None:
            self._hold(change(self._buffer[:, : self._end]))

    def reset(self) -> None:
        """Forget everything: the state before the first token."""
        if self.static and self._buffer is not None:
            self._buffer.zero_()
        else:
            self._buffer, self._end, self._whole = None, 0, True

    def _has_room(self, tokens: int) -> bool:
        """Whether so many more can be written in place, which gradients and tensors of inference mode forbid."""
        buffer = self._buffer
        return (
            buffer is not None
            and self._end + tokens <= buffer.shape[1]
            and not torch.is_grad_enabled()
            and buffer.is_inference() == torch.is_inference_mode_enabled()
        )

    def _hold(self, inputs: Tensor, room: int = 0) -> None:
        if room or inputs._is_view():  # a view would keep all that it is a view of
            held = inputs.new_empty(inputs.shape[0], inputs.shape[1] + room, inputs.shape[2])
            held[:, : inputs.shape[1]] = inputs
        else:
            held = inputs
        self._buffer, self._end = held, inputs.shape[1]

    def _overwrite(self, inputs: Tensor) -> None:
        if self._buffer is not None and self._buffer.shape == inputs.shape:
            self._buffer.copy_(inputs)
            return
        self._buffer, self._end = inputs.detach().clone(), self.needed
        if not torch.compiler.is_compiling():
            torch._dynamo.mark_static_address(self._buffer)

    def _check(self, old: Tensor, x: Tensor) -> None:
        rows, channels = old.shape[0], old.shape[2] - self.counting
        if (rows, channels) != (x.shape[0], x.shape[2]):
            raise UserError(
                f"this cache holds mixing states of {rows} rows of {channels} channels, this batch and model need "
                f"{x.shape[0]} of {x.shape[2]}: it was filled for another batch or by another model; start with a new "
                "one"
            )
        if old.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
            raise UserError(
                f"this cache holds mixing states in {old.dtype}, the model computes in {x.dtype}: it was filled by "
                "another model; start with a new one"
            )
