"""The transformer as a classifier of whole texts, pairs of texts, or waveforms.

Shapes: B batch, T tokens, E embedding, N samples of a waveform.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification
from transformers import initialization as init
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils.generic import can_return_tuple

from .configuration import WaveletGPTConfig
from .frames import split_frames
from .modeling import WaveletGPTModel, WaveletGPTPreTrainedModel


class ClassificationHead(nn.Module):
    """Pool over time, then classify with the Long Range Arena's perceptrons (arXiv 2011.04006, its `classifier_head`).

    One document: E -> n_inner -> labels. Two, pooled to u and v: [u, v, u - v, u v] -> n_inner -> n_inner/2 -> labels.
    """

    def __init__(self, config: WaveletGPTConfig):
        super().__init__()
        self.pooling = config.pooling
        self.n_inputs = config.n_inputs
        # Zero: it starts as the mean.
        self.query = nn.Parameter(torch.zeros(config.n_embd)) if config.pooling == "attention" else None
        labels: Any = config.num_labels  # declared as if it could be None
        widths = [config.n_embd, config.n_inner, labels]
        if config.n_inputs == 2:
            widths = [4 * config.n_embd, config.n_inner, -(-config.n_inner // 2), labels]
        self.layers = nn.ModuleList(nn.Linear(before, after) for before, after in pairwise(widths))

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """hidden (B * n_inputs, T, E), mask (B * n_inputs, T) or None -> logits (B, labels)."""
        x = self.pool(hidden, mask)
        if self.n_inputs == 2:
            u, v = x.unflatten(0, (-1, 2)).unbind(1)
            x = torch.cat([u, v, u - v, u * v], dim=-1)
        for layer in self.layers[:-1]:
            x = nn.functional.relu(layer(x))
        result: torch.Tensor = self.layers[-1](x)
        return result

    def pool(self, hidden: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """hidden (B, T, E) -> (B, E) over the tokens that are real by mask (B, T)."""
        B, T, _ = hidden.shape
        real = torch.ones(B, T, dtype=torch.bool, device=hidden.device) if mask is None else mask.bool()
        if self.pooling == "last":
            last = (torch.arange(T, device=hidden.device) * real).argmax(1)
            return hidden[torch.arange(B, device=hidden.device), last]
        scores = hidden.new_zeros(B, T) if self.query is None else hidden @ self.query
        # Not infinity: a document may be empty.
        weights = scores.masked_fill(~real, torch.finfo(scores.dtype).min).softmax(1)
        return (weights.to(hidden.dtype)[:, None] @ hidden)[:, 0]


def _only_padded_after(mask: torch.Tensor) -> bool:
    """Whether by mask (B, T) all padding follows the real tokens: if causal, these never see it and need no mask.

    Costs a synchronisation, as the library's own look at a mask does, and like that is left out while compiling.
    """
    return not torch.compiler.is_compiling() and bool((mask[:, 1:] <= mask[:, :-1]).all())


class WaveletGPTForSequenceClassification(WaveletGPTPreTrainedModel):
    """The transformer with a head that classifies whole texts, pairs of texts, or waveforms."""

    def __init__(self, config: WaveletGPTConfig):
        super().__init__(config)
        self.model = WaveletGPTModel(config)
        self.score = ClassificationHead(config)
        if config.frame_size is not None:
            self.main_input_name = "input_values"
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ClassificationHead) and module.query is not None:
            init.zeros_(module.query)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        input_values: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """Logits (B, num_labels) in the model's dtype, and the loss if asked for.

        Args:
            input_ids: (B, T); with `n_inputs=2` (B, 2, T), and so for the others.
            attention_mask: of the same shape, 0 at padding, which may be on either side; None: everything is real.
            labels: (B,) class of each; or (B, num_labels), floats: 0 and 1 for
                `problem_type="multi_label_classification"`, else shares of the classes.
            input_values: (B, N) waveforms in [-1, 1], in place of `input_ids`, if the model has a `frame_size`.
            inputs_embeds: (B, T, E), in place of `input_ids`.

        Raises:
            ValueError: none or several of the inputs, or one that does not fit the configuration; and as the model.
        """
        num_items_in_batch = kwargs.pop("num_items_in_batch", None)
        kwargs["use_cache"] = False
        if (input_values is not None) + (input_ids is not None) + (inputs_embeds is not None) != 1:
            raise ValueError("give one of input_ids, input_values and inputs_embeds")
        if inputs_embeds is None and (input_values is None) != (self.config.frame_size is None):
            wanted = (
                "input_ids, no waveforms: it has no frame_size" if self.config.frame_size is None else "input_values"
            )
            raise ValueError(f"this model reads {wanted}")
        ids, samples, embeddings, mask = (
            self._one_document_per_row(x) for x in (input_ids, input_values, inputs_embeds, attention_mask)
        )
        if samples is not None and self.config.frame_size is not None:
            frames, mask = split_frames(samples, mask, self.config.frame_size)
            embeddings = self.model.embed_tokens(frames.to(self.dtype))
        bare = mask is None or (
            self.config.causal and mask.shape[1] <= self.config.n_positions and _only_padded_after(mask)
        )
        outputs = self.model(input_ids=ids, attention_mask=None if bare else mask, inputs_embeds=embeddings, **kwargs)
        logits = self.score(outputs.last_hidden_state, mask)
        loss = None
        if labels is not None:
            multiple = self.config.problem_type == "multi_label_classification"
            if labels.is_floating_point() and not multiple:
                # Shares of the classes, as mix-up makes them: the library's loss takes numbers of classes only.
                loss = nn.functional.cross_entropy(logits.float(), labels.float())
            else:
                loss = self.loss_function(
                    labels=labels.float() if multiple else labels,
                    pooled_logits=logits.float(),
                    config=self.config,
                    num_items_in_batch=None if multiple else num_items_in_batch,
                )
            if labels.ndim == 2 and num_items_in_batch is not None:
                # These losses are means over this batch; accumulation wants the share of all items in the step.
                loss = loss * labels.numel() / num_items_in_batch
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )

    def _one_document_per_row(self, x: torch.Tensor | None) -> torch.Tensor | None:
        """(B, 2, ...) -> (2 B, ...), if examples have two documents."""
        if self.config.n_inputs == 1 or x is None:
            return x
        if x.ndim < 3 or x.shape[1] != 2:
            raise ValueError(f"an input has shape {tuple(x.shape)}: n_inputs=2 needs (B, 2, ...)")
        return x.flatten(0, 1)


AutoModelForSequenceClassification.register(WaveletGPTConfig, WaveletGPTForSequenceClassification, exist_ok=True)

__all__ = ["WaveletGPTForSequenceClassification"]
