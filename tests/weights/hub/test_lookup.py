"""A job names its model, its parts and its LoRAs as the hub does, and finds them in the cache."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hub import COMMIT, serve_hub, use_hub
from jobs import SPIECE, T5, TINY, TRANSFORMER, VAE, manifest_of, run_wancli, tiny_job, write_job

from wancli.errors import CheckpointError, JobError
from wancli.job.loader import load
from wancli.plan import model_registry, planner
from wancli.plan.render_plan import Plan
from wancli.weights.checkpoint import Location
from wancli.weights.hub import cache
from wancli.weights.hub.models import KNOWN, KnownModel, find_known
from wancli.weights.hub.name import HubName, parse_name
from wancli.weights.single_files import SingleFiles

CHECKPOINT = ("config.json", TRANSFORMER, T5, VAE, "google/umt5-xxl/spiece.model")


@pytest.fixture(autouse=True)
def _own_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))


def cache_files(repo: str, files: dict[str, Path]) -> Path:
    """Put files into the cache as a repository."""
    folder = cache.repository_folder(repo)
    snapshot = folder / "snapshots" / COMMIT
    for name, path in files.items():
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(path)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)
    return snapshot


def plan_of(folder: Path, model: Any, **changes: Any) -> Plan:
    job = write_job(folder, tiny_job() | {"model": model} | changes)
    return planner.build_plan(load(job), folder / "memo" / "hashes.json")


def test_a_repository_in_the_cache_is_a_model(tmp_path: Path, capsys: Any) -> None:
    snapshot = cache_files("org/wan", {name: TINY / name for name in CHECKPOINT})
    plan = plan_of(tmp_path, "org/wan")
    assert plan.shots[0].key == plan_of(tmp_path, str(TINY)).shots[0].key
    assert plan.shots[0].model.checkpoint.root == snapshot
    assert plan.shots[0].model.checkpoint.name == "org/wan"
    assert plan_of(tmp_path, f"org/wan@{COMMIT}").shots[0].key == plan.shots[0].key
    shown = run_wancli(capsys, "inspect", "org/wan")
    assert "official layout" in shown.out


def test_a_folder_of_that_name_wins(tmp_path: Path) -> None:
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "wan").symlink_to(TINY)
    assert plan_of(tmp_path, "org/wan").shots[0].model.checkpoint.root == TINY


def test_what_is_not_in_the_cache_says_how_to_fetch_it(tmp_path: Path) -> None:
    with pytest.raises(JobError) as caught:
        plan_of(tmp_path, "Wan-AI/Wan2.1-T2V-1.3B")
    assert "job.yaml:1: model: 'Wan-AI/Wan2.1-T2V-1.3B' not found" in str(caught.value)
    assert "`wancli fetch Wan-AI/Wan2.1-T2V-1.3B` fetches 17.5 GB (Apache-2.0)" in caught.value.hint
    with pytest.raises(JobError) as caught:
        plan_of(tmp_path, "org/wan:a.gguf")
    assert "`wancli fetch org/wan:a.gguf --dry-run` says how large it is" in caught.value.hint


def test_a_file_that_the_snapshot_lacks_is_named_with_the_command(tmp_path: Path) -> None:
    cache_files("org/wan", {name: TINY / name for name in CHECKPOINT if name != VAE})
    with pytest.raises(CheckpointError, match=r"Wan2.1_VAE.pth or Wan2.2_VAE.pth is missing") as caught:
        plan_of(tmp_path, "org/wan")
    assert "`wancli fetch org/wan` fetches what is missing." in caught.value.hint


def test_parts_of_a_model_are_named_one_by_one(tmp_path: Path) -> None:
    cache_files("org/dit", {"split/dit.safetensors": TINY / TRANSFORMER})
    cache_files("org/rest", {T5: TINY / T5, "spiece.model": SPIECE, VAE: TINY / VAE})
    parts = {
        "transformer": "org/dit:dit.safetensors",
        "text_encoder": f"org/rest:{T5}",
        "heads": 2,
        "vae": f"org/rest:{VAE}",
        "tokenizer": "org/rest:spiece.model",
    }
    assert plan_of(tmp_path, parts).shots[0].key == plan_of(tmp_path, str(TINY)).shots[0].key


def test_models_yaml_may_name_repositories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache_files("org/wan", {name: TINY / name for name in CHECKPOINT})
    names = tmp_path / "models.yaml"
    names.write_text("small: org/wan\nlarge: Wan-AI/Wan2.1-T2V-14B\n")
    monkeypatch.setenv("WANCLI_MODELS", str(names))
    assert plan_of(tmp_path, "small").shots[0].model.checkpoint.name == "org/wan"
    with pytest.raises(JobError, match=r"'Wan-AI/Wan2\.1-T2V-14B' is not in the Hugging Face cache"):
        plan_of(tmp_path, "large")


def test_a_lora_is_named_by_its_repository(tmp_path: Path) -> None:
    with pytest.raises(JobError) as caught:
        plan_of(tmp_path, str(TINY), loras=[{"path": "org/lora:a.safetensors"}])
    assert "loras.0.path: 'org/lora:a.safetensors' is not in the Hugging Face cache" in str(caught.value)
    cache_files("org/lora", {"a.safetensors": TINY / TRANSFORMER})
    with pytest.raises(CheckpointError, match=r"a\.safetensors"):  # which holds no LoRA
        plan_of(tmp_path, str(TINY), loras=[{"path": "org/lora:a.safetensors"}])


@pytest.mark.parametrize(
    "model", [model for model in KNOWN if model.parts], ids=lambda model: model.name[-40:]
)
def test_the_table_gives_a_single_file_its_parts(tmp_path: Path, model: KnownModel) -> None:
    def resolve(text: str) -> Location:
        return model_registry.resolve_model(text, lambda *_: tmp_path, lambda *_: "model")

    with pytest.raises(JobError) as caught:
        resolve(model.name)
    assert f"`wancli fetch {model.name}` fetches {model.gigabytes:g} GB" in caught.value.hint
    for repo in {name.repo for name in model.files.values()}:
        cache_files(repo, {name.path: SPIECE for name in model.files.values() if name.repo == repo})
    found = resolve(model.name)
    assert isinstance(found, SingleFiles)
    assert {role: path for role, path in vars(found).items() if path} == {
        role: cache.find_path(name) for role, name in model.files.items()
    }
    assert resolve(f"{model.hub_name.repo}:{Path(model.hub_name.path).name}") == found


def test_the_table_is_sound() -> None:
    assert {model.layout for model in KNOWN} == {
        *("official", "diffusers", "ComfyUI", "kijai", "GGUF", "LoRA")
    }
    assert len({model.name for model in KNOWN}) == len(KNOWN)
    for model in KNOWN:
        assert parse_name(model.name) == model.hub_name
        assert str(model.hub_name) == model.name
        assert find_known(model.hub_name) == model
        assert 0.1 < model.gigabytes < 200
        assert model.licence == "Apache-2.0"
        assert not model.parts or {"text_encoder", "vae"} <= model.parts.keys()


def test_the_list_is_text_and_json(capsys: Any) -> None:
    cache_files("Wan-AI/Wan2.1-T2V-1.3B", {"config.json": TINY / "config.json"})
    text = run_wancli(capsys, "fetch", "--list")
    assert all(model.name in text.out for model in KNOWN)
    assert "17.5 GB  Apache-2.0  cached  Wan-AI/Wan2.1-T2V-1.3B\n" in text.out
    rows = json.loads(run_wancli(capsys, "fetch", "--list", "--json").out)
    assert [row["name"] for row in rows if row["cached"]] == ["Wan-AI/Wan2.1-T2V-1.3B"]
    assert run_wancli(capsys, "fetch").code == 2
    assert run_wancli(capsys, "fetch", "/models/wan").code == 2


def test_two_commands_lead_from_nothing_to_a_video(
    tmp_path: Path, quick: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    files = {
        path.relative_to(quick).as_posix(): path.read_bytes() for path in quick.rglob("*") if path.is_file()
    }
    with serve_hub(org__quick=files | {"README.md": b"#", "examples/a.png": b"PNG"}) as hub:
        use_hub(monkeypatch, hub, tmp_path / "home")
        assert run_wancli(capsys, "fetch", "org/quick").code == 0
    # the server is gone: the render asks nobody
    job = write_job(tmp_path, tiny_job() | {"model": "org/quick"})
    assert run_wancli(capsys, "render", job).code == 0
    assert manifest_of(tmp_path)["model"]["root"] == str(cache.find_path(HubName("org/quick")))
    names = [name for name, _ in hub.requests]
    assert "README.md" not in names
    assert "examples/a.png" not in names


def test_the_plan_imports_neither_torch_nor_the_hub(tmp_path: Path) -> None:
    cache_files("org/wan", {name: TINY / name for name in CHECKPOINT})
    job = write_job(tmp_path, tiny_job() | {"model": "org/wan"})
    program = (
        f"import sys; from wancli.cli import run; run(['plan', {str(job)!r}]);"
        "assert not {'torch', 'huggingface_hub', 'httpx2'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
