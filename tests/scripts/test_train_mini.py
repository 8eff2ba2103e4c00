"""The training program of wan-mini, on networks so small that a step takes milliseconds."""

from __future__ import annotations

import dataclasses
import random
import re
from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from scripts.mini import captions, check, cli, dit, latents, muon, pack, stages, text, vae, world
from scripts.mini.batched import project, velocity
from scripts.mini.recipe import Recipe, recipe
from scripts.mini.recognise import recognise
from scripts.mini.training import Pace, load, rate
from wancli.errors import JobError
from wancli.models import t5
from wancli.models.dit import WanModel
from wancli.models.dit_layers import Mix
from wancli.text.tokenizer import Tokenizer

TINY = Recipe(
    dim=24,
    heads=2,
    blocks=2,
    copies=2,
    text_dim=16,
    vae_dim=2,
    latents_clips=48,
    text_steps=4,
    text_batch=4,
    vae_steps=3,
    vae_batch=1,
    dit_steps=4,
    dit_batch=4,
    finetune_steps=4,
    finetune_batch=4,
    swaps=0.5,
)
CPU = torch.device("cpu")
SIZE = (9, 48, 48)
ONE_STEP = Pace(deadline=0.0, say_every=1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> stages.Workshop:
    """Every stage run in one go."""
    shop = _workshop(tmp_path_factory.mktemp("mini"), Pace())
    for stage in ("text", "latents", "vae", "dit", "grow", "finetune"):
        assert stages.STAGES[stage](shop)
    return shop


def _workshop(folder: Path, pace: Pace) -> stages.Workshop:
    return stages.Workshop(folder, TINY, CPU, pace, folder / "wan-mini")


def _random(network: nn.Module) -> None:
    """Weights of every kind set to something, so that nothing is hidden by a zero."""
    generator = torch.Generator().manual_seed(1)
    for parameter in network.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)


def _scenes(count: int) -> list[world.Scene]:
    rng = random.Random(7)
    return [world.random_scene(rng, world.COMBINATIONS) for _ in range(count)]


def _equal(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(_equal(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(_equal, a, b))
    return a == b


# The world


def test_a_tenth_of_the_combinations_is_held_out_and_every_pair_of_values_is_trained():
    assert 0.08 < len(world.HELD_OUT) / len(world.COMBINATIONS) < 0.12
    for i, values in enumerate(world.ATTRIBUTES.values()):
        assert {names[i] for names in world.HELD_OUT} == set(values)
    for i, j in combinations(range(4), 2):
        pairs = {(names[i], names[j]) for names in world.TRAINED}
        assert pairs == {(names[i], names[j]) for names in world.COMBINATIONS}


def test_a_shape_covers_the_area_that_geometry_says_at_any_size():
    scene = world.Scene("red", "circle", "left", "white", size=0.2, across=0.3, start=0.5, speed=0.8)
    for grid in ((9, 48, 48), (5, 64, 112), (1, 128, 128)):
        side = min(grid[1:])
        for shape, area in (("circle", 3.14159), ("square", (2 * 0.86) ** 2), ("triangle", 2.3676)):
            cover = world.cover_all([dataclasses.replace(scene, shape=shape)], grid)
            expected = area * (0.2 * side) ** 2
            torch.testing.assert_close(
                cover.sum((2, 3))[0], torch.full((grid[0],), expected), rtol=0.01, atol=1
            )


def test_the_shape_never_leaves_the_frame():
    for cover in world.cover_all(_scenes(100), (9, 48, 48)):
        area = cover.sum((1, 2))
        torch.testing.assert_close(area, area.mean().expand(9), rtol=0.02, atol=0)


def test_a_clip_is_in_the_range_of_the_vae_and_the_same_for_one_scene_or_several():
    scenes = _scenes(5)
    together = world.draw_all(scenes, SIZE)
    assert together.shape == (5, 3, 9, 48, 48)
    assert together.abs().max() <= 1
    for scene, clip in zip(scenes, together, strict=True):
        torch.testing.assert_close(world.draw(scene, *SIZE), clip)


@pytest.mark.parametrize("spoil", ["clean", "blurred", "noisy"])
@pytest.mark.parametrize("grid", [(9, 48, 48), (17, 64, 96)])
def test_the_recogniser_sees_what_was_drawn(spoil: str, grid: world.Grid):
    scenes = _scenes(48)
    clips = world.draw_all(scenes, grid)
    if spoil == "blurred":
        clips = F.avg_pool3d(F.pad(clips, (1, 1, 1, 1, 0, 0), mode="replicate"), (1, 3, 3), 1)
    elif spoil == "noisy":
        clips = clips + 0.15 * torch.randn(clips.shape, generator=torch.Generator().manual_seed(0))
    wrong = [
        (scene, seen)
        for scene, seen in zip(scenes, map(recognise, clips), strict=True)
        if not all(seen.agrees(scene).values())
    ]
    assert not wrong


def test_the_recogniser_sees_no_shape_in_an_empty_clip_and_no_way_in_a_still_one():
    empty = world.background("striped", 48).expand(3, *SIZE)
    assert recognise(empty).background == "striped"
    assert recognise(empty).colour is recognise(empty).shape is recognise(empty).direction is None
    still = world.draw(_scenes(1)[0], *SIZE)[:, 4:5].expand(3, *SIZE)
    assert recognise(still).shape == _scenes(1)[0].shape
    assert recognise(still).direction is None


# The captions

SAYS = {
    **dict.fromkeys(("red", "crimson", "scarlet"), "red"),
    **dict.fromkeys(("green", "emerald"), "green"),
    **dict.fromkeys(("blue", "azure", "cobalt"), "blue"),
    **dict.fromkeys(("yellow", "golden", "lemon"), "yellow"),
    **dict.fromkeys(("circle", "disc", "ball", "dot"), "circle"),
    **dict.fromkeys(("square", "box", "block"), "square"),
    **dict.fromkeys(("triangle", "sided"), "triangle"),
    **dict.fromkeys(("left", "leftward", "leftwards"), "left"),
    **dict.fromkeys(("right", "rightward", "rightwards"), "right"),
    **dict.fromkeys(("up", "upward", "upwards", "top", "rises", "rising", "climbs", "climbing"), "up"),
    **dict.fromkeys(
        ("down", "downward", "downwards", "bottom", "falls", "falling", "sinks", "sinking"), "down"
    ),
    **dict.fromkeys(("white",), "white"),
    **dict.fromkeys(("black",), "black"),
    **dict.fromkeys(("grey", "gray"), "grey"),
    **dict.fromkeys(("striped", "stripes"), "striped"),
}


def test_every_caption_names_its_scene_and_nothing_else():
    rng = random.Random(3)
    for i in range(1500):
        scene = world.random_scene(rng, world.COMBINATIONS)
        said = captions.caption(scene, rng, captions.STYLES[i % 3])
        where_to = re.sub(r"from \w+ to", "to", said.lower())
        named = {SAYS[word] for word in re.findall(r"\w+", where_to) if word in SAYS}
        assert named == set(scene.combination), said


def test_no_two_values_of_an_attribute_share_a_phrase():
    for words in (captions.COLOUR, captions.SHAPE, captions.WAY, captions.PLACE):
        owners = Counter(phrase for phrases in words.values() for phrase in set(phrases))
        assert set(owners.values()) == {1}


def test_every_word_of_the_grammar_is_one_piece_and_the_specials_have_umt5s_ids(trained: stages.Workshop):
    tokenizer = Tokenizer(trained.file("spiece.model"))
    for word in captions.vocabulary():
        assert tokenizer.to_pieces(tokenizer.to_ids(word)) == [f"▁{word}", "</s>"]
    assert tokenizer.to_pieces([0, 1, 2, 3]) == ["<pad>", "</s>", "<s>", "<unk>"]
    rng = random.Random(4)
    for style in captions.STYLES:
        said = captions.caption(_scenes(1)[0], rng, style)
        words = re.findall(r"\w+|[.,]", said.lower())
        assert [piece.strip("▁") for piece in tokenizer.to_pieces(tokenizer.to_ids(said))] == [*words, "</s>"]
    assert "▁stripes" in tokenizer.to_pieces(tokenizer.to_ids(pack.PROMPT))
    assert tokenizer.to_ids("A RED Circle") == tokenizer.to_ids("a red circle")
    assert 3 not in tokenizer.to_ids("an unknown wizard, 3 of them!")


# The networks


def test_prompts_encoded_together_are_the_prompts_encoded_alone():
    model = text.build(TINY.t5(40), 0, CPU)
    prompts = [[5, 6, 7, 8, 1], [9, 1], [1]]
    rows, count = text.encode(model, prompts)
    assert count.tolist() == [5, 2, 1]
    for row, ids in zip(rows, prompts, strict=True):
        torch.testing.assert_close(row[: len(ids)], t5.encode(model, ids), rtol=1e-4, atol=1e-5)
        assert not row[len(ids) :].any()


def test_a_batch_of_unlike_prompts_is_each_of_them_through_the_model():
    model = dit.build(TINY, 3)
    _random(model)
    generator = torch.Generator().manual_seed(2)
    prompts = [torch.randn(n, TINY.text_dim, generator=generator) for n in (4, 9, 1)]
    count = torch.tensor([4, 9, 1])
    padded = nn.utils.rnn.pad_sequence(prompts, batch_first=True)
    x = torch.randn(2, 16, 3, 6, 4, generator=generator)
    t = torch.tensor([300.0, 875.5])
    read = torch.tensor([[0, 1], [2, 1], [0, 2]])
    together = velocity(model, x, t, project(model, padded, count), read)
    for sample in (0, 1):
        contexts: list[Mix] = [((model.project(prompts[int(p)]), 1.0),) for p in read[:, sample]]
        alone = model(x[sample : sample + 1], float(t[sample]), contexts)
        torch.testing.assert_close(together[sample : sample + 1], alone, rtol=1e-4, atol=1e-5)


def test_both_give_the_same_gradients():
    model = dit.build(TINY, 2)
    _random(model)
    generator = torch.Generator().manual_seed(2)
    prompt = torch.randn(5, TINY.text_dim, generator=generator)
    x = torch.randn(1, 16, 2, 4, 4, generator=generator)
    contexts: list[Mix] = [((model.project(prompt), 1.0),)] * 2
    model(x, 500.0, contexts).square().mean().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    texts = project(model, prompt[None], torch.tensor([5]))
    velocity(
        model, x, torch.tensor([500.0]), texts, torch.zeros(2, 1, dtype=torch.long)
    ).square().mean().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-6)


def test_growing_keeps_the_loss(trained: stages.Workshop):
    start = load(trained.file("text.pt"))
    shared = latents.Latents.of(load(trained.file("latents.pt")))
    shallow = dit.DiTTrainer("dit", TINY, start, shared, trained.file("spiece.model"), CPU)
    _random_head(shallow.model)
    before = float(shallow.loss(5000).detach())
    grown = WanModel(TINY.wan(TINY.grown))
    grown.load_state_dict(dit.grow(shallow.model.state_dict(), TINY.copies))
    shallow.model = grown
    assert before > 2.05  # the head says something
    assert float(shallow.loss(5000).detach()) == pytest.approx(before, rel=0.01)


def _random_head(model: WanModel) -> None:
    nn.init.normal_(model.head.head.weight, std=0.1, generator=torch.Generator().manual_seed(0))


def test_clips_decoded_and_encoded_together_are_those_of_the_vae():
    network = vae.build(TINY)
    _random(network)
    z = torch.randn(2, 16, 3, 2, 4, generator=torch.Generator().manual_seed(0))
    together = vae.decode(network, z).detach()
    for clip, z_CTYX in zip(together, z, strict=True):
        alone = torch.cat(list(network.decode(z_CTYX)), dim=1)
        torch.testing.assert_close(clip.clamp(-1, 1), alone, rtol=1e-3, atol=1e-4)
    videos = together.clamp(-1, 1)
    for z_CTYX, clip in zip(vae.encode(network, videos).detach(), videos, strict=True):
        torch.testing.assert_close(z_CTYX, network.encode(clip), rtol=1e-3, atol=1e-3)


def test_an_untrained_vae_keeps_the_scale_of_its_latents():
    network = vae.build(TINY)
    z = torch.randn(16, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    seen = []
    handle = network.decoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    list(network.decode(z))
    handle.remove()
    torch.testing.assert_close(torch.cat(seen).permute(3, 0, 1, 2), z, rtol=1e-4, atol=1e-4)


# The latent space


def test_the_linear_latent_is_normalised_and_keeps_the_picture(trained: stages.Workshop):
    space = latents.Latents.of(load(trained.file("latents.pt")))
    clips = world.draw_all(_scenes(48), (9, 64, 64))
    z = space.encode(clips)
    assert z.shape == (48, 16, 3, 8, 8)
    for part in (z[:, :, :1], z[:, :, 1:]):
        assert part.mean((0, 2, 3, 4)).abs().max() < 0.5
        assert (part.std((0, 2, 3, 4)) - 1).abs().max() < 0.3
    assert vae.psnr(space.decode(z), clips) > 24
    # A standing picture looks alike in both parts.
    still = clips[:, :, :1].expand(-1, -1, 5, -1, -1)
    first, rest = space.encode(still).unbind(2)
    assert F.cosine_similarity(first.flatten(), rest.flatten(), dim=0) > 0.7


def test_patches_can_be_put_together_again():
    video = torch.randn(2, 3, 8, 16, 24)
    assert torch.equal(latents.pixels(latents.patches(video)), video)


# Training


def test_muon_steps_as_torchs_does():
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(shape)) for shape in ((12, 12), (24, 12), (12, 24), (12, 12))]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    reference = torch.optim.Muon(
        theirs, lr=0.1, weight_decay=muon.DECAY, momentum=muon.MOMENTUM, adjust_lr_fn="match_rms_adamw"
    )
    optimizer = muon.Muon(ours)
    for _ in range(3):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape)
            b.grad = a.grad.clone()
        optimizer.step(0.1)
        reference.step()
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).norm() / b.norm() < 0.02  # torch iterates in bf16


def test_no_held_out_combination_is_trained_on_not_even_by_a_swap(
    trained: stages.Workshop, monkeypatch: pytest.MonkeyPatch
):
    told: list[world.Scene] = []

    def overheard(scene: world.Scene, rng: random.Random, style: captions.Style) -> str:
        told.append(scene)
        return captions.caption(scene, rng, style)

    monkeypatch.setattr(dit, "caption", overheard)
    shared = latents.Latents.of(load(trained.file("latents.pt")))
    start = load(trained.file("grow.pt"))
    trainer = dit.DiTTrainer("finetune", TINY, start, shared, trained.file("spiece.model"), CPU)
    targets = [scene for i in range(300) for scene in trainer._batch(random.Random(i), 0.5)[0]]
    assert not any(map(world.held_out, targets + told))
    assert {scene.combination for scene in targets} == set(world.TRAINED)


def test_a_prompt_read_by_all_blocks_decides_and_the_thirds_share_what_it_decides():
    rng = random.Random(0)
    main, injected = (world.random_scene(rng) for _ in range(2))
    assert dit.blended(main, injected, 0, 1, rng).combination == injected.combination
    for name in world.ATTRIBUTES:
        thirds = [dit.share(name, i / 3, (i + 1) / 3) for i in range(3)]
        assert sum(thirds) == pytest.approx(1)
        assert dit.share(name, 0.4, 0.4) == 0
    assert dit.share("background", 0, 1 / 3) > 0.8
    assert dit.share("colour", 2 / 3, 1) > 0.8


@pytest.mark.parametrize("stage", ["text", "vae", "dit", "finetune"])
def test_a_stage_stopped_after_every_step_ends_with_the_same_numbers(
    stage: str, trained: stages.Workshop, tmp_path: Path
):
    for path in trained.folder.iterdir():
        if path.is_file() and path.stem != stage:
            (tmp_path / path.name).write_bytes(path.read_bytes())
    stopped = _workshop(tmp_path, ONE_STEP)
    while not stages.STAGES[stage](stopped):
        assert load(stopped.file(f"{stage}.pt"))["step"] < 4
    assert _equal(load(stopped.file(f"{stage}.pt")), load(trained.file(f"{stage}.pt")))


def test_training_lowers_the_loss(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    text.write_tokenizer(tmp_path / "spiece.model")
    longer = dataclasses.replace(TINY, text_steps=120, text_batch=16, text_dim=32)
    shop = stages.Workshop(tmp_path, longer, CPU, Pace(say_every=40), tmp_path)
    assert stages.run_text(shop)
    losses = [float(number) for number in re.findall(r"loss (\d+\.\d+)", capsys.readouterr().out)]
    assert len(losses) == 3
    assert losses[2] < 0.9 * losses[0]


def test_the_rate_rises_stays_and_falls():
    rates = [rate(i, 1000) for i in range(1000)]
    assert rates[0] == pytest.approx(0.01)
    assert rates[100] == rates[499] == 1.0
    assert 0.03 < rates[-1] < 0.04
    assert rates[500:] == sorted(rates[500:], reverse=True)


# The program


def test_the_packed_model_is_read_and_renders(trained: stages.Workshop, capsys: pytest.CaptureFixture[str]):
    assert stages.run_pack(trained)
    assert "renders" in capsys.readouterr().out
    assert sorted(str(p.relative_to(trained.into)) for p in trained.into.rglob("*") if p.is_file()) == [
        "Wan2.1_VAE.safetensors",
        "config.json",
        "diffusion_pytorch_model.safetensors",
        "google/umt5-xxl/spiece.model",
        "models_t5_umt5-xxl-enc-bf16.safetensors",
    ]


def test_a_check_samples_held_out_prompts(trained: stages.Workshop):
    table = check.check(trained.folder, TINY, 3, CPU)
    assert set(table) == {*world.ATTRIBUTES, "PSNR of decoder", "PSNR of encoder and decoder"}


def test_a_changed_number_is_kept_and_an_unknown_one_refused(tmp_path: Path):
    assert recipe(tmp_path, ["dim=48", "swaps=0.5"]).dim == 48
    assert recipe(tmp_path, []) == dataclasses.replace(Recipe(), dim=48, swaps=0.5)
    with pytest.raises(JobError, match="depth"):
        recipe(tmp_path, ["depth=4"])
    with pytest.raises(JobError, match="wide"):
        recipe(tmp_path, ["dim=wide"])


def test_a_stage_whose_forerunner_is_missing_says_which(tmp_path: Path):
    with pytest.raises(SystemExit, match="Run the stage `latents` first"):
        cli.main(["vae", "--out", str(tmp_path)])


def test_all_stops_when_the_minutes_are_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    small = [f"--set={name}={value}" for name, value in dataclasses.asdict(TINY).items()]
    cli.main(["all", "--out", str(tmp_path), "--minutes", "0", *small])
    assert "text: stopped at step 1 of 4" in capsys.readouterr().out
    assert not (tmp_path / "latents.pt").exists()
