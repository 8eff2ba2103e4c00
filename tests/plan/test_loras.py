"""LoRAs of a job: planned from headers, rendered like a checkpoint that has them merged, and undone."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import (
    CAT,
    KEPT,
    TRANSFORMER,
    CommandResult,
    change_tensors,
    checkpoint,
    forbid_calls,
    latents_of,
    manifest_of,
    run_wancli,
    tiny_job,
    write_job,
)
from safetensors.torch import load_file, save_file

from wancli.errors import CheckpointError, JobError
from wancli.job.loader import load
from wancli.plan import planner as planning
from wancli.plan.loras import lora_warnings
from wancli.plan.shot import Shot
from wancli.report.shot_text import format_lora
from wancli.sampling.denoise import draw_noise
from wancli.sampling.solvers import build_sigma_schedule
from wancli.text.embedding import load_embedding
from wancli.weights.checkpoint import identify
from wancli.weights.loader import load_transformer

MODULES = ("self_attn.q", "cross_attn.k", "cross_attn.v", "ffn.2")
ONE_STEP = {"solver": "euler", "steps": 2, "guidance": 1}
Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]  # module -> down, up


@pytest.fixture
def factors(quick: Path) -> Factors:
    """A LoRA for all 4 blocks and the text embedding, strong enough to be seen."""
    generator = torch.Generator().manual_seed(7)
    weights = load_file(quick / TRANSFORMER)
    names = [f"blocks.{block}.{module}" for block in range(4) for module in MODULES] + ["text_embedding.2"]
    return {
        name: (
            0.3 * torch.randn(2, weights[f"{name}.weight"].shape[1], generator=generator),
            0.3 * torch.randn(weights[f"{name}.weight"].shape[0], 2, generator=generator),
        )
        for name in names
    }


@pytest.fixture
def lora(tmp_path: Path, factors: Factors) -> Path:
    return saved(tmp_path / "style.safetensors", factors)


def saved(path: Path, factors: Factors) -> Path:
    pairs = ((f"diffusion_model.{name}", pair) for name, pair in factors.items())
    save_file({f"{n}.lora_{ab}.weight": f for n, pair in pairs for ab, f in zip("AB", pair)}, path)
    return path


def with_merged(folder: Path, source: Path, factors: Factors, strength: float) -> Path:
    """A copy of a checkpoint with W + strength * up @ down in its file."""
    model = checkpoint(folder, source)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name, (down, up) in factors.items():
            tensors[f"{name}.weight"] += strength * up @ down

    change_tensors(model / TRANSFORMER, change)
    return model


def in_blocks(factors: Factors, blocks: Iterable[int]) -> Factors:
    return {
        name: pair for name, pair in factors.items() if name.startswith(tuple(f"blocks.{b}." for b in blocks))
    }


# ---- what is rendered ----


@pytest.mark.parametrize("blocks", ["all", "1-2", "late"])
def test_a_lora_renders_what_a_checkpoint_with_it_merged_renders(
    render: Callable[..., CommandResult],
    tmp_path: Path,
    quick: Path,
    lora: Path,
    factors: Factors,
    blocks: str,
) -> None:
    merged = {"all": factors, "1-2": in_blocks(factors, (1, 2)), "late": in_blocks(factors, (3,))}[blocks]
    model = with_merged(tmp_path / "merged", quick, merged, 0.8)
    entry = {"path": "style.safetensors", "strength": 0.8, "blocks": blocks}
    assert render(loras=[entry], video=KEPT).code == 0
    for name, changes in (("plain", {}), ("expected", {"model": model})):
        assert render(folder=tmp_path / name, video=KEPT, **changes).code == 0
    found, plain, expected = (latents_of(tmp_path / name) for name in (".", "plain", "expected"))
    assert torch.linalg.vector_norm(expected - plain) > 0.01 * torch.linalg.vector_norm(plain)
    assert torch.allclose(found, expected, atol=1e-4)


def test_a_lora_at_strength_0_gives_the_plain_model(
    render: Callable[..., CommandResult], tmp_path: Path, lora: Path
) -> None:
    assert render(video=KEPT, loras=[{"path": "style.safetensors", "strength": 0}]).code == 0
    assert render(folder=tmp_path / "plain", video=KEPT).code == 0
    assert torch.equal(latents_of(tmp_path), latents_of(tmp_path / "plain"))


@pytest.mark.parametrize("steps", ["0", "1"])
def test_a_lora_for_one_step_applies_in_that_step_only(
    render: Callable[..., CommandResult],
    tmp_path: Path,
    quick: Path,
    lora: Path,
    factors: Factors,
    capsys: pytest.CaptureFixture[str],
    steps: str,
) -> None:
    entry = {"path": "style.safetensors", "steps": steps}
    assert render(loras=[entry], video=KEPT, sampler=ONE_STEP, seed=3).code == 0
    out = tmp_path / "cat.safetensors"
    assert run_wancli(capsys, "encode", "-q", "--model", quick, "--out", out, CAT).code == 0
    rows_NE = load_embedding(out, 0).rows_NE
    changed = with_merged(tmp_path / "merged", quick, factors, 1.0)
    plain, with_lora = (load_transformer(identify(root)) for root in (quick, changed))
    euler = build_sigma_schedule("euler", 2, 5.0)
    x = draw_noise((16, 1, 8, 8), 3)[None]
    with torch.inference_mode():
        for step, sigma in enumerate(euler.sigmas[:-1]):
            model = with_lora if str(step) == steps else plain
            velocity = model(x, euler.timesteps[step], [((model.project(rows_NE), 1.0),)] * 4)
            x = x + (euler.sigmas[step + 1] - sigma) * velocity
    assert torch.allclose(latents_of(tmp_path), x[0], atol=1e-4)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_shots_with_different_loras_do_not_affect_each_other(
    render: Callable[..., CommandResult],
    tmp_path: Path,
    quick: Path,
    lora: Path,
    factors: Factors,
    dtype: str,
) -> None:
    other = saved(
        tmp_path / "other.safetensors",
        {n: (up.mT.contiguous(), down.mT.contiguous()) for n, (down, up) in factors.items() if "attn.k" in n},
    )
    before = hashlib.sha256((quick / TRANSFORMER).read_bytes()).digest()
    sets: dict[str, list[dict[str, Any]]] = {
        "a": [{"path": str(lora)}],
        "b": [{"path": str(lora), "steps": "1", "blocks": [0, 3]}, {"path": str(other), "strength": -0.5}],
        "c": [],
    }
    items = [{"id": name, "loras": loras} for name, loras in sets.items()]
    changes = {"video": KEPT, "memory": {"dtype": dtype}}
    assert render(output="out/{id}.mp4", items=items, **changes).code == 0
    for name, loras in sets.items():
        assert render(folder=tmp_path / name, loras=loras, **changes).code == 0
        assert torch.equal(latents_of(tmp_path, name), latents_of(tmp_path / name)), name
    assert len({latents_of(tmp_path, name).sum().item() for name in "abc"}) == 3
    assert hashlib.sha256((quick / TRANSFORMER).read_bytes()).digest() == before


@pytest.mark.parametrize(
    "housed", [{"residency": "packed"}, {"residency": "streamed"}, {"residency": "streamed", "dtype": "bf16"}]
)
def test_loras_give_the_same_on_streamed_and_resident_weights(
    render: Callable[..., CommandResult], tmp_path: Path, lora: Path, housed: dict[str, Any]
) -> None:
    items: list[dict[str, Any]] = [
        {"id": "a", "loras": [{"path": str(lora)}]},
        {"id": "b", "loras": [{"path": str(lora), "steps": "1", "blocks": [0, 3], "strength": -0.5}]},
        {"id": "c"},
    ]
    changes = {"output": "out/{id}.mp4", "items": items, "video": KEPT}
    assert render(folder=tmp_path / "fetched", memory=housed, **changes).code == 0
    assert (
        render(folder=tmp_path / "resident", memory=housed | {"residency": "resident"}, **changes).code == 0
    )
    for name in "abc":
        assert torch.equal(latents_of(tmp_path / "fetched", name), latents_of(tmp_path / "resident", name))
    assert len({latents_of(tmp_path / "fetched", name).sum().item() for name in "abc"}) == 3


def test_the_manifest_records_each_lora_and_its_coverage(
    render: Callable[..., CommandResult], tmp_path: Path, lora: Path
) -> None:
    entry = {"path": "style.safetensors", "strength": 0.5, "steps": "1", "blocks": "0-2"}
    assert render(loras=[entry]).code == 0
    (found,) = manifest_of(tmp_path)["loras"]
    assert found["path"] == str(lora)
    assert found["sha256"] == hashlib.sha256(lora.read_bytes()).hexdigest()
    assert (found["strength"], found["blocks"], found["steps"]) == (0.5, [0, 1, 2], [1])
    assert (found["scales"], found["coverage"]["ranks"], found["coverage"]["targets"]) == ([1.0], [2], 17)
    assert (found["coverage"]["blocks"], found["coverage"]["outside"]) == ([0, 1, 2, 3], 1)


def test_a_lora_with_nan_fails_its_shot_and_names_the_key(
    render: Callable[..., CommandResult], tmp_path: Path, lora: Path
) -> None:
    key = "diffusion_model.blocks.2.ffn.2.lora_B.weight"
    change_tensors(lora, lambda tensors: tensors[key].view(-1)[:1].fill_(float("nan")))
    result = render(loras=[{"path": "style.safetensors"}])
    assert result.code == 4
    assert result.err.splitlines()[0] == f"wancli: shot 0000: {lora}: {key} holds NaN or Inf"
    assert not (tmp_path / "out" / "clip.mp4").exists()


def test_a_lora_of_another_model_ends_with_4_before_anything_is_loaded(
    render: Callable[..., CommandResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid_calls(monkeypatch)
    pair = (torch.zeros(2, 5120), torch.zeros(5120, 2))
    path = saved(tmp_path / "big.safetensors", {"blocks.0.self_attn.q": pair})
    result = render(loras=[{"path": "big.safetensors"}])
    assert (result.code, result.out) == (4, "")
    assert result.err.splitlines() == [
        f"wancli: {path}: diffusion_model.blocks.0.self_attn.q.lora_B.weight makes a change of [5120, 5120] "
        "to blocks.0.self_attn.q.weight, which is [48, 48] in this model",
        "  This LoRA was made for Wan 14B, and this is a model of width 48.",
    ]


# ---- what is planned ----


@pytest.fixture
def decide(tmp_path: Path, quick: Path, warm: Path) -> Callable[..., Shot]:
    def decided(*loras: dict[str, Any], **changes: Any) -> Shot:
        job = tiny_job(**{"model": quick, "loras": list(loras)} | changes)
        (shot,) = planning.build_plan(load(write_job(tmp_path, job)), warm / "memo.json").shots
        return shot

    return decided


def test_a_lora_applies_everywhere_by_default(decide: Callable[..., Shot], lora: Path) -> None:
    (use,) = decide({"path": "style.safetensors"}).loras
    assert (use.path, use.strength, use.blocks, use.steps, use.expert) == (lora, 1.0, None, None, None)
    (use,) = decide({"path": "style.safetensors", "blocks": ["2-3", 0], "steps": {"sigma": [0, 0.9]}}).loras
    assert (use.blocks, use.steps) == ((0, 2, 3), (1,))
    (use,) = decide({"path": "style.safetensors", "steps": "0-100%", "blocks": "0-3"}).loras
    assert (use.blocks, use.steps) == ((0, 1, 2, 3), None)


def test_the_key_changes_with_every_option_of_a_lora(
    decide: Callable[..., Shot], lora: Path, tmp_path: Path
) -> None:
    entry = {"path": "style.safetensors"}
    shots = [
        decide(),
        decide(entry),
        decide(entry, dict(entry)),
        decide(entry | {"strength": 0.5}),
        decide(entry | {"blocks": "0-3"}),
        decide(entry | {"blocks": "0-2"}),
        decide(entry | {"steps": 1}),
    ]
    change_tensors(lora, lambda tensors: next(iter(tensors.values())).add_(1e-3))
    shots.append(decide(entry))
    assert len({shot.key for shot in shots}) == len({shot.latents_key for shot in shots}) == len(shots)
    moved = saved(tmp_path / "elsewhere.safetensors", {})
    moved.write_bytes(lora.read_bytes())
    assert decide({"path": "elsewhere.safetensors"}).key == shots[-1].key
    assert decide(loras=[]).key == shots[0].key


def test_the_key_changes_with_the_config_that_sets_the_scale(
    decide: Callable[..., Shot], tmp_path: Path, factors: Factors
) -> None:
    found = {
        f"base_model.model.{n}.lora_{ab}.weight": f
        for n, pair in factors.items()
        for ab, f in zip("AB", pair)
    }
    save_file(found, tmp_path / "adapter_model.safetensors")
    keys = [decide({"path": "adapter_model.safetensors"}).key]
    for alpha in (2, 4):
        (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": alpha}))
        keys.append(decide({"path": "adapter_model.safetensors"}).key)
    assert len(set(keys)) == 3


@pytest.mark.parametrize(
    ("entry", "line"),
    [
        ({"path": "no.safetensors"}, ":10: loras.0.path: 'no.safetensors' not found"),
        ({"path": "job.yaml"}, ":10: loras.0.path: 'job.yaml' is not a .safetensors file"),
        ({"path": "."}, ":10: loras.0.path: '.' is a folder"),
        ({"blocks": "2-4"}, ":11: loras.0.blocks: 4 is past the last block (3)"),
        ({"blocks": 3}, ":11: loras.0.blocks: style.safetensors changes none of these blocks"),
        ({"steps": 2}, ":11: loras.0.steps: 2 is past the last step (1)"),
        ({"steps": {"sigma": [0.1, 0.2]}}, ":11: loras.0.steps: no step is in this range"),
        ({"expert": "high"}, ":11: loras.0.expert: the model has one network for all steps, not two experts"),
        ({"strength": 11}, ":11: loras.0.strength: should be less than or equal to 10, got 11"),
        ({"strenght": 1}, ":11: loras.0.strenght: unknown key; did you mean 'strength'?"),
    ],
    ids=lambda value: "".join(value) if isinstance(value, dict) else "",
)
def test_an_invalid_option_of_a_lora_is_an_error_with_its_line(
    decide: Callable[..., Shot], tmp_path: Path, factors: Factors, entry: dict[str, Any], line: str
) -> None:
    saved(tmp_path / "style.safetensors", in_blocks(factors, (0, 1)))
    with pytest.raises(JobError) as caught:
        decide({"path": "style.safetensors"} | entry)
    assert str(caught.value) == f"{tmp_path / 'job.yaml'}{line}"


def test_a_file_that_is_not_a_lora_of_this_model_is_an_integrity_error(
    decide: Callable[..., Shot], tmp_path: Path
) -> None:
    save_file({"lora_unet_down_blocks_0_conv.alpha": torch.ones(())}, tmp_path / "sd.safetensors")
    with pytest.raises(CheckpointError, match=r"sd.safetensors: changes nothing in this model"):
        decide({"path": "sd.safetensors"})


def test_the_plan_shows_every_lora_once_and_warns(
    tmp_path: Path, quick: Path, lora: Path, factors: Factors, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = {"base_model.model.head.lora_C": torch.ones(1)}
    found = {
        f"base_model.model.{n}.lora_{ab}.weight": f
        for n, pair in factors.items()
        for ab, f in zip("AB", pair)
    }
    save_file(found | odd, tmp_path / "peft.safetensors")
    late = {"path": "style.safetensors", "strength": 0.25, "blocks": "late", "steps": "1"}
    job = tiny_job(
        model=quick,
        output="out/{id}.mp4",
        items=[
            {"id": "a", "loras": [late]},
            {"id": "b", "loras": [dict(late), {"path": "peft.safetensors", "strength": 0}]},
        ],
    )
    result = run_wancli(capsys, "plan", write_job(tmp_path, job))
    assert result.code == 0
    assert [line for line in result.out.splitlines() if line.startswith("lora")] == [
        "lora: style.safetensors at 0.25, blocks 3, steps 1: 17 targets, rank 2, ComfyUI naming",
        "lora: peft.safetensors at 0, all blocks, all steps: 17 targets, rank 2, PEFT naming",
    ]
    for warning in (
        "shot b: peft.safetensors has strength 0 and changes nothing",
        "shot b: peft.safetensors has no alpha and no adapter_config.json beside it; its scale is taken as 1",
        "shot b: keys match nothing in this model: 1 of peft.safetensors (base_model.model.head.lora_C)",
    ):
        assert warning in result.err
    shots = json.loads(run_wancli(capsys, "plan", "--json", tmp_path / "job.yaml").out)["shots"]
    assert [len(shot["loras"]) for shot in shots] == [1, 2]
    assert shots[0]["loras"][0]["sha256"] == hashlib.sha256(lora.read_bytes()).hexdigest()
    assert shots[0]["loras"][0]["coverage"]["targets"] == 17


def test_planning_a_lora_does_not_load_torch(tmp_path: Path, quick: Path, lora: Path) -> None:
    path = write_job(tmp_path, tiny_job(model=quick, loras=[{"path": "style.safetensors"}]))
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from wancli.job import loader\nfrom wancli.plan import planner\n"
        f"plan = planner.build_plan(loader.load(Path({str(path)!r})), Path({str(tmp_path / 'memo')!r}))\n"
        "assert plan.shots[0].loras\n"
        "sys.exit(bool({'torch', 'numpy', 'transformers', 'safetensors'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def rewritten(path: Path, metadata: dict[str, str] | None = None, **ends: float) -> Path:
    """The same LoRA with other metadata, and tensors whose keys end so multiplied."""
    tensors = {
        key: tensor * next((factor for end, factor in ends.items() if end in key), 1)
        for key, tensor in load_file(path).items()
    }
    save_file(tensors, path, metadata)
    return path


def told(shot: Shot) -> list[str]:
    return [warning.kind.replace("{}", warning.detail) for warning in lora_warnings(shot.loras)]


def test_the_plan_shows_scales_and_the_key_covers_new_ones(decide: Callable[..., Shot], lora: Path) -> None:
    plain = decide({"path": "style.safetensors"})
    assert "scales" not in plain.loras[0].pixel_settings
    assert "scale" not in format_lora(plain.loras[0])
    shot = decide({"path": str(rewritten(lora, {"alpha": "1"}))})
    assert shot.loras[0].pixel_settings["scales"] == (0.5,)
    assert "rank 2, scale 0.5, ComfyUI naming" in format_lora(shot.loras[0])
    assert told(shot) == []


@pytest.mark.parametrize("end", ["lora_A", "lora_B"])
def test_a_lora_whose_effect_is_nothing_is_told(decide: Callable[..., Shot], lora: Path, end: str) -> None:
    rewritten(lora, **{end: 0.0})
    assert told(decide({"path": "style.safetensors"})) == [
        "style.safetensors: it changes nothing, because its matrices are 0, as before a training"
    ]


def test_what_the_metadata_says_in_vain_is_a_warning(decide: Callable[..., Shot], lora: Path) -> None:
    rewritten(lora, {"ss_network_alpha": "1"})
    (warning,) = told(decide({"path": "style.safetensors"}))
    assert "ss_network_alpha = '1'" in warning


def test_a_lora_in_the_hugging_face_cache_is_read_and_keeps_its_name(
    decide: Callable[..., Shot], lora: Path, tmp_path: Path
) -> None:
    digest = hashlib.sha256(lora.read_bytes()).hexdigest()
    (tmp_path / "blobs").mkdir()
    blob = lora.rename(tmp_path / "blobs" / digest)
    lora.symlink_to(blob)
    (use,) = decide({"path": "style.safetensors"}).loras
    assert (use.path, use.sha256) == (lora, digest)
    (use,) = decide({"path": f"blobs/{digest}"}).loras
    assert use.sha256 == digest
    blob.write_bytes(blob.read_bytes()[:-8] + bytes(8))
    with pytest.raises(CheckpointError, match="damaged: the SHA-256"):
        decide({"path": "style.safetensors"})


def test_a_download_of_a_lora_that_has_not_ended_is_refused(decide: Callable[..., Shot], lora: Path) -> None:
    lora.with_name("style.safetensors.aria2").touch()
    with pytest.raises(CheckpointError, match="aria2 has not finished this download"):
        decide({"path": "style.safetensors"})
