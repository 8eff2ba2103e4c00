"""Record where words act while the model predicts velocities. No bit of a velocity changes.

Letters of shapes: B batch (of one), L video tokens, D width, H heads, N rows of a prompt, K head width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from wancli.injection.attention_maps import word_probabilities
from wancli.injection.contexts import Forward
from wancli.models.dit import WanModel
from wancli.models.dit_layers import CrossAttention


@contextmanager
def record_attention(model: WanModel, forwards: Sequence[Forward]) -> Iterator[None]:
    """Add to the attention maps of the forwards that have some, while the model runs them in this order.

    The queries are those that the blocks compute. The keys are those of the shot's own prompt, with its
    emphasis, whatever else a block reads.
    """
    recorded = [f.attention.spec.blocks_at(f.contexts.step) for f in forwards if f.attention]
    with ExitStack() as hooks:
        for block in sorted(frozenset().union(*recorded)):
            _BlockRecorder(block, forwards).attach(model.get_submodule(f"blocks.{block}"), hooks)
        yield


class _BlockRecorder:
    """Records one block, which runs the forwards in order, each perhaps in several pieces."""

    def __init__(self, block: int, forwards: Sequence[Forward]) -> None:
        self._block = block
        self._forwards = forwards
        self._turn = -1  # the number of the forward
        self._next_token = 0
        self._waits_for_queries = False

    def attach(self, layer: nn.Module, hooks: ExitStack) -> None:
        cross_attn = layer.get_submodule("cross_attn")
        assert isinstance(cross_attn, CrossAttention)
        for handle in (
            layer.register_forward_pre_hook(self._begin_forward),
            cross_attn.register_forward_pre_hook(self._begin_piece),
            cross_attn.norm_q.register_forward_hook(
                lambda _module, _args, q_BLD: self._record(cross_attn, q_BLD)
            ),
        ):
            hooks.callback(handle.remove)

    def _begin_forward(self, *_: Any) -> None:
        self._turn += 1
        self._next_token = 0

    def _begin_piece(self, *_: Any) -> None:
        # What measures effects calls the layer's `forward` for more outputs, and no hook of the layer runs.
        self._waits_for_queries = self._turn < len(self._forwards)

    def _record(self, cross_attn: CrossAttention, q_BLD: Tensor) -> None:
        if not self._waits_for_queries:
            return
        self._waits_for_queries = False
        forward = self._forwards[self._turn]
        maps, step = forward.attention, forward.contexts.step
        if maps is None or self._block not in maps.spec.blocks_at(step):
            return
        context = forward.contexts.own_prompt(self._block)
        bias_N = context.bias_N if context.emphasis_N is None else context.bias_N + context.emphasis_N
        q_1HLK, (k_1HNK, _) = cross_attn.split_heads(q_BLD), cross_attn.keys_values(context)
        probabilities_WL = word_probabilities(q_1HLK[0], k_1HNK[0], bias_N, maps.spec.rows)
        maps.add(step, self._block, self._next_token, probabilities_WL)
        self._next_token += q_BLD.shape[1]
