"""Where a model is: paths, the names of models.yaml, files one by one; in jobs and on the command line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from jobs import SPIECE, T5, TINY, TRANSFORMER, VAE, manifest_of, run_wancli, tiny_job, write_job

from wancli.errors import CheckpointError, JobError
from wancli.job.loader import load
from wancli.plan import model_registry
from wancli.plan import planner as planning
from wancli.plan.shot import Shot
from wancli.weights.single_files import SingleFiles

ROOT = Path(__file__).parents[2]
WHOLE = {"transformer": TRANSFORMER, "text_encoder": T5, "tokenizer": "spiece.model", "vae": VAE, "heads": 2}


@pytest.fixture
def name_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], Path]:
    """A models.yaml at $WANCLI_MODELS."""

    def written_as(entries: Any) -> Path:
        path = tmp_path / "models.yaml"
        path.write_text(entries if isinstance(entries, str) else yaml.safe_dump(entries))
        monkeypatch.setenv("WANCLI_MODELS", str(path))
        return path

    return written_as


@pytest.fixture
def flat(tmp_path: Path, shallow: Path) -> Path:
    """The tiny checkpoint of 4 blocks as single files in one folder, its config.json gone."""
    folder = tmp_path / "flat"
    folder.mkdir()
    for source in (shallow / TRANSFORMER, TINY / T5, TINY / VAE, SPIECE):
        shutil.copy(source, folder)
    return folder


def shot_of(tmp_path: Path, **changes: Any) -> Shot:
    (shot,) = planning.build_plan(
        load(write_job(tmp_path, tiny_job(**changes))), tmp_path / "memo.json"
    ).shots
    return shot


def problem(tmp_path: Path, model: Any) -> JobError:
    with pytest.raises(JobError) as caught:
        planning.build_plan(load(write_job(tmp_path, tiny_job() | {"model": model})), tmp_path / "memo.json")
    return caught.value


def test_the_example_models_are_all_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANCLI_MODELS", str(ROOT / "configs/models.yaml"))
    found = model_registry.registered_models()
    assert found.keys() == yaml.safe_load((ROOT / "configs/models.yaml").read_text()).keys()
    assert found["wan2.2-t2v-a14b"] == Path("/models/Wan2.2-T2V-A14B")
    small = found["my-small-wan"]
    assert isinstance(small, SingleFiles)
    assert (small.heads, small.vae) == (4, ROOT / "configs/small/vae.safetensors")


def test_a_name_of_models_yaml_is_a_model(
    tmp_path: Path, name_models: Any, flat: Path, shallow: Path
) -> None:
    files = {key: value if key == "heads" else f"flat/{value}" for key, value in WHOLE.items()}
    name_models({"folder": str(shallow), "files": files})
    key = shot_of(tmp_path, model=str(shallow)).key
    assert shot_of(tmp_path, model="folder").key == shot_of(tmp_path, model="files").key == key


def test_models_yaml_is_in_the_users_config_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    (tmp_path / "config/wancli").mkdir(parents=True)
    (tmp_path / "config/wancli/models.yaml").write_text(f"mine: {TINY}\n")
    assert shot_of(tmp_path, model="mine").model.checkpoint.root == TINY


def test_a_name_wins_over_a_folder_and_a_path_is_always_a_path(tmp_path: Path, name_models: Any) -> None:
    name_models({"wan": str(TINY)})
    (tmp_path / "wan").mkdir()
    assert shot_of(tmp_path, model="wan").model.checkpoint.root == TINY
    with pytest.raises(CheckpointError, match="no Wan transformer in this folder"):
        shot_of(tmp_path, model="./wan")


def test_an_unknown_name_lists_those_that_are_known(tmp_path: Path, name_models: Any) -> None:
    path = name_models({"wan2.1-14b": "/a", "wan2.2-a14b": "/b"})
    error = problem(tmp_path, "wan2.1-14B")
    assert str(error).endswith("job.yaml:1: model: 'wan2.1-14B' not found")
    assert error.hint == (
        f"Looked for {tmp_path}/wan2.1-14B; {path} names wan2.1-14b, wan2.2-a14b; did you mean 'wan2.1-14b'?"
    )
    assert problem(tmp_path, "sdxl").hint.endswith("names wan2.1-14b, wan2.2-a14b.")
    hint = problem(tmp_path, "models/sdxl").hint
    assert "`wancli fetch models/sdxl` fetches it" in hint
    assert hint.endswith(f" There is no {tmp_path}/models/sdxl, either.")


def test_without_a_models_yaml_the_hint_says_where_one_would_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    assert problem(tmp_path, "x").hint.endswith(f"{tmp_path}/config/wancli/models.yaml names no models.")


def test_the_file_that_wancli_models_names_must_exist(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("WANCLI_MODELS", str(tmp_path / "no.yaml"))
    assert str(problem(tmp_path, "x")).startswith("$WANCLI_MODELS: ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: {transformr: x}", "models.yaml:1: a.transformr: unknown key; did you mean 'transformer'?"),
        ("a: b\nc: 5", "models.yaml:2: c: expected text, got 5; put it in quotes"),
        ("a: {vae: x}", "models.yaml:1: a: names no transformer"),
        (
            "a: {transformer: x, high_noise: y}",
            "models.yaml:1: a: names a transformer and an expert; use one or the other",
        ),
        ("a: {transformer: x, heads: 0}", "a.heads: should be greater than or equal to 1, got 0"),
        ("[a]", "models.yaml: is not a mapping of names to models"),
        ("a: [", "models.yaml:1:5: is not YAML"),
    ],
)  # fmt: skip
def test_an_error_in_models_yaml_names_its_key(
    tmp_path: Path, name_models: Any, text: str, message: str
) -> None:
    name_models(text)
    assert message in str(problem(tmp_path, "a"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"transformr": "x"}, "model.transformr: unknown key; did you mean 'transformer'?"),
        ({"vae": "no.pth"}, "model.vae: 'no.pth' not found"),
        ({"vae": 7}, "model.vae: expected text, got 7; put it in quotes"),
        ({"high_noise": "x"}, "model: names a transformer and an expert; use one or the other"),
        ({"heads": 2.5}, "model.heads: expected a whole number, got 2.5"),
        ({"transformer": None}, "model: names no transformer"),
    ],
)
def test_a_mapping_of_files_is_strict(flat: Path, changes: dict[str, Any], message: str) -> None:
    error = str(problem(flat, WHOLE | changes))
    assert message in error
    assert "job.yaml:" in error


def test_single_files_render_the_same_video_and_decode_from_the_manifest(
    flat: Path,
    shallow: Path,
    tmp_path: Path,
    warm: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WANCLI_CACHE", str(warm))
    kept = {"keep_latents": True}
    for folder, model in ((tmp_path / "whole", str(shallow)), (flat, WHOLE)):
        path = write_job(folder, tiny_job() | {"model": model, "video": kept})
        assert run_wancli(capsys, "render", path, "-q").code == 0
    whole, single = manifest_of(tmp_path / "whole"), manifest_of(flat)
    assert whole["key"] == single["key"]
    assert whole["files"][0]["sha256"] == single["files"][0]["sha256"]
    assert (whole["model"]["files"], single["model"]["files"]["vae"]) == (None, str(flat / VAE))
    latents = flat / "out" / "clip.latents.safetensors"
    result = run_wancli(capsys, "decode", latents, "-q", "-o", tmp_path / "again.mp4")
    assert (result.code, result.err) == (0, "")


def test_the_other_files_are_found_beside_the_transformer(flat: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="48 is not a multiple of 128"):
        shot_of(flat, model=TRANSFORMER)
    from safetensors.torch import save_file

    from wancli.models.config import WanConfig
    from wancli.models.dit import WanModel

    config = WanConfig(128, 64, 1, 1, text_dim=64, freq_dim=32)
    save_file(WanModel(config).state_dict(), flat / TRANSFORMER)
    shot = shot_of(flat, model=TRANSFORMER)
    assert shot.model.checkpoint.transformer_config == config
    assert shot.model.checkpoint.vae_files == (flat / VAE,)
    assert shot_of(flat, model=".").key == shot.key


def test_a_model_on_the_command_line_may_be_a_name(
    tmp_path: Path, name_models: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    name_models({"tiny": str(TINY)})
    result = run_wancli(capsys, "encode", "-q", "--model", "tiny", "a fog", "--json")
    assert (result.code, len(json.loads(result.out))) == (0, 1)
    result = run_wancli(capsys, "encode", "-q", "--model", "tny", "a fog")
    assert (result.code, "did you mean 'tiny'?" in result.err) == (2, True)
