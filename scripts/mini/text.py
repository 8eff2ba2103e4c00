"""The text encoder: a SentencePiece model that knows every word of the grammar, and a small UMT5.

The stage `text` warms the encoder up by naming colour, shape, direction and background from the mean
of a caption's rows. The transformer's stages then train it on.

Letters: P prompts, N token places, E text width.
"""

from __future__ import annotations

import io
import random
import string
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scripts.mini.captions import STYLES, Style, caption, vocabulary
from scripts.mini.recipe import Recipe
from scripts.mini.training import State, adamw, rate, rng_of, set_rate
from scripts.mini.world import ATTRIBUTES, random_scene
from wancli.models import t5
from wancli.models.config import T5Config
from wancli.storage import atomic
from wancli.text.tokenizer import Tokenizer
from wancli.weights.formats.key_mapping import UMT5_BLOCK_TO_TRANSFORMERS, umt5_to_transformers

if TYPE_CHECKING:
    from transformers import UMT5EncoderModel

SPELLING = string.ascii_lowercase + string.digits + ".,:;!?'-"
LEARNING_RATE = 2e-3


def write_tokenizer(path: Path) -> None:
    """Writes a SentencePiece model: UMT5's ids for the specials, a piece per word, and letters for the rest.

    Case is folded, so that "Red" and "red" are one word.
    """
    from sentencepiece import SentencePieceTrainer

    rng = random.Random(0)
    texts = [caption(random_scene(rng), rng, STYLES[i % len(STYLES)]) for i in range(500)]
    words = [f"▁{word}" for word in vocabulary()]
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter([*texts, *SPELLING]),
        model_writer=model,
        model_type="unigram",
        vocab_size=len(words) + 2 * len(SPELLING),
        hard_vocab_limit=False,
        user_defined_symbols=words,
        required_chars=SPELLING,
        character_coverage=1.0,
        normalization_rule_name="nmt_nfkc_cf",
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        num_threads=1,
        minloglevel=2,
    )
    atomic.replace(path, model.getvalue())


def vocabulary_size(spiece: Path) -> int:
    from sentencepiece import SentencePieceProcessor

    return int(SentencePieceProcessor(model_file=str(spiece)).vocab_size())


def build(config: T5Config, seed: int, device: torch.device) -> UMT5EncoderModel:
    """wancli's network with random weights, T5's own way, ready to train."""
    model = t5.build_encoder(config)
    model.to_empty(device="cpu")
    inner = config.num_heads * config.d_kv
    spread = {"shared": 1.0, ".q.": (config.d_model * config.d_kv) ** -0.5, ".o.": inner**-0.5}
    spread |= {".wo.": config.d_ff**-0.5}
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "layer_norm" in name:
            nn.init.ones_(parameter)
        else:
            std = next((value for part, value in spread.items() if part in name), config.d_model**-0.5)
            nn.init.normal_(parameter, std=std, generator=generator)
    nn.Module.to(model, device)
    t5.tie_embedding(model)
    nn.Module.requires_grad_(model, True)
    return model


def encode(model: UMT5EncoderModel, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Rows of several prompts [P, N, E], zero past each prompt's end, and how many each has [P]."""
    device = model.shared.weight.device
    count_P = torch.tensor([len(ids) for ids in prompts])
    ids_PN = nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids in prompts], batch_first=True).to(device)
    mask_PN = (torch.arange(ids_PN.shape[1]) < count_P[:, None]).to(device)
    rows_PNE: Tensor = model(input_ids=ids_PN, attention_mask=mask_PN.long()).last_hidden_state
    return rows_PNE * mask_PN[..., None], count_P.to(device)


def official(model: UMT5EncoderModel) -> dict[str, Tensor]:
    """The tensors under their official names."""
    layers = model.config.num_layers
    names = ["token_embedding.weight", "norm.weight"]
    names += [f"blocks.{i}.{part}.weight" for i in range(layers) for part in UMT5_BLOCK_TO_TRANSFORMERS]
    tensors = dict(model.named_parameters())
    return {name: tensors[umt5_to_transformers(name)].detach() for name in names}


def random_style(rng: random.Random) -> Style:
    """One for a whole batch, so that short prompts are not padded to the length of paragraphs."""
    return rng.choices(STYLES, (4, 4, 3))[0]


class TextTrainer:
    """The warm-up: four classifiers on the mean row."""

    def __init__(self, recipe: Recipe, spiece: Path, device: torch.device) -> None:
        self.samples, self._steps, self._seed = recipe.text_batch, recipe.text_steps, recipe.seed
        self._tokenizer = Tokenizer(spiece)
        self._vocabulary = vocabulary_size(spiece)
        self.model = build(recipe.t5(self._vocabulary), recipe.seed, device)
        torch.manual_seed(recipe.seed)
        outputs = sum(len(values) for values in ATTRIBUTES.values())
        self._classify = nn.Linear(recipe.text_dim, outputs).to(device)
        self._optimizer = adamw([*self.model.parameters(), *self._classify.parameters()])

    def step(self, i: int) -> Tensor:
        rng = rng_of(self._seed, "text", i)
        style = random_style(rng)
        scenes = [random_scene(rng) for _ in range(self.samples)]
        prompts = [self._tokenizer.to_ids(caption(scene, rng, style)) for scene in scenes]
        rows_PNE, count_P = encode(self.model, prompts)
        scores_P = self._classify(rows_PNE.sum(1) / count_P[:, None])
        parts = scores_P.split([len(values) for values in ATTRIBUTES.values()], dim=1)
        loss = torch.zeros((), device=scores_P.device)
        for part, (name, values) in zip(parts, ATTRIBUTES.items(), strict=True):
            wanted_P = torch.tensor(
                [values.index(getattr(scene, name)) for scene in scenes], device=part.device
            )
            loss = loss + F.cross_entropy(part, wanted_P) / len(ATTRIBUTES)
        self._optimizer.zero_grad()
        torch.autograd.backward(loss)
        set_rate(self._optimizer, LEARNING_RATE * rate(i, self._steps))
        self._optimizer.step()
        return loss

    def state(self) -> State:
        return {
            "vocabulary": self._vocabulary,
            "text": dict(self.model.named_parameters()),
            "classify": self._classify.state_dict(),
            "optimizer": self._optimizer.state_dict(),
        }

    def load(self, state: State) -> None:
        load_text(self.model, state["text"])
        self._classify.load_state_dict(state["classify"])
        self._optimizer.load_state_dict(state["optimizer"])


def load_text(model: UMT5EncoderModel, tensors: dict[str, Tensor]) -> None:
    """Copies saved parameters into the network; strict."""
    live = dict(model.named_parameters())
    if live.keys() != tensors.keys():
        raise KeyError(f"not the text encoder's tensors: {sorted(live.keys() ^ tensors.keys())}")
    with torch.no_grad():
        for name, parameter in live.items():
            parameter.copy_(tensors[name])
