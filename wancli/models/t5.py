"""The text encoder: UMT5 as transformers implements it, with the sizes of a checkpoint.

Letters: N tokens of one prompt (its `</s>` included), E text width, V vocabulary.

The network runs on the N real tokens only. Official Wan pads to 512 and masks the padding, which gives the
same N rows: UMT5 encodes positions only by their distance, and a masked key has no weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from wancli.errors import CheckpointError
from wancli.models.config import EOS, T5Config

if TYPE_CHECKING:
    from transformers import UMT5EncoderModel

BLOCKS = "encoder.block"
EMBEDDING = "shared.weight"
OVERFLOWS = ".wo."  # in fp16, so these stay fp32 as in transformers' _keep_in_fp32_modules


def build_encoder(config: T5Config) -> UMT5EncoderModel:
    """Build the network on the meta device, in eval mode, without the second name of its embedding.

    Load the weights, then call `tie_embedding`. The second name is dropped in between because the loader is
    strict and most checkpoints hold `shared.weight` only.
    """
    from transformers import UMT5Config, UMT5EncoderModel

    with torch.device("meta"):
        model = UMT5EncoderModel(
            UMT5Config(
                vocab_size=config.vocab_size,
                d_model=config.d_model,
                d_kv=config.d_kv,
                d_ff=config.d_ff,
                num_layers=config.num_layers,
                num_heads=config.num_heads,
                relative_attention_num_buckets=config.num_buckets,
            )
        )
    del model.encoder.embed_tokens
    nn.Module.eval(model)
    nn.Module.requires_grad_(model, False)
    return model


def tie_embedding(model: UMT5EncoderModel, where: str = "") -> None:
    """Make the encoder look tokens up in the loaded embedding.

    transformers from 5.0 on may leave the encoder's own table zero or unset, which silently encodes every
    prompt to noise (transformers issue 43992). So the table is tied by hand and checked.
    """
    model.encoder.embed_tokens = model.shared
    assert model.encoder.embed_tokens is model.shared
    with torch.no_grad():
        row_1E = model.shared(torch.tensor([EOS], device=_device(model)))
    if not row_1E.any():
        raise CheckpointError("the token embedding is zero", where=where)


def encode(model: UMT5EncoderModel, ids: Sequence[int]) -> Tensor:
    """Encode one prompt: token ids to rows [N, E], in the dtype of the weights, on the model's device."""
    return encode_batch(model, [ids])[0]


@torch.no_grad()
def encode_batch(model: UMT5EncoderModel, prompts: Sequence[Sequence[int]]) -> list[Tensor]:
    """Encode prompts in one pass over the layers. Each prompt gets the rows that it would get alone, bit for
    bit.
    """
    encoder = model.encoder
    hidden_states = [encoder.embed_tokens(torch.tensor([ids], device=_device(model))) for ids in prompts]
    for layer in encoder.block:
        hidden_states = [_hidden_states(layer(x_1NE)) for x_1NE in hidden_states]
    return [encoder.final_layer_norm(x_1NE)[0] for x_1NE in hidden_states]


def _hidden_states(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Return the rows of a layer's output, which older releases of transformers put into a tuple."""
    return output[0] if isinstance(output, tuple) else output


def _device(model: UMT5EncoderModel) -> torch.device:
    return model.encoder.final_layer_norm.weight.device
