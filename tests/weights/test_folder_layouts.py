"""Which file of a folder is which component: links, shards, strays, and parts that contradict each other."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import weight_files
from jobs import SPIECE, T5, TINY, TRANSFORMER, VAE
from safetensors.torch import load_file, save_file
from weight_files import cast, dit, dit_diffusers, stored, umt5, vae21_diffusers, write

from wancli.errors import CheckpointError
from wancli.models.variants import T2V_A14B
from wancli.plan.model_registry import resolve_path
from wancli.weights.checkpoint import identify
from wancli.weights.component import expert_from_name
from wancli.weights.fingerprint import fingerprint
from wancli.weights.folder_layouts import find_safetensors
from wancli.weights.formats.infer_config import infer_transformer_config
from wancli.weights.formats.safetensors_header import read_tensors
from wancli.weights.inspect import inspect
from wancli.weights.single_files import SingleFiles, find_siblings

STEM = "diffusion_pytorch_model"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint, to be changed."""
    return shutil.copytree(TINY, tmp_path / "model")


def shard(folder: Path, count: int = 2) -> None:
    """Store the transformer in shards, without an index, beside the file."""
    tensors = load_file(folder / TRANSFORMER)
    names = sorted(tensors)
    for n in range(count):
        part = {name: tensors[name] for name in names[n::count]}
        save_file(part, folder / f"{STEM}-{n + 1:05d}-of-{count:05d}.safetensors")


def link_into_cache(source: Path, hub: Path) -> Path:
    """A snapshot as huggingface_hub lays it out: links to blobs that are called by their SHA-256."""
    snapshot = hub / "snapshots" / "0123abcd"
    (hub / "blobs").mkdir(parents=True)
    for file in sorted(path for path in source.rglob("*") if path.is_file()):
        blob = hub / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copy(file, blob)
        link = snapshot / file.relative_to(source)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


# ---- links ----


def test_a_snapshot_of_the_hugging_face_cache_is_a_checkpoint(tmp_path: Path) -> None:
    snapshot = link_into_cache(TINY, tmp_path / "models--org--name")
    assert identify(snapshot).transformer_config == identify(TINY).transformer_config


def test_files_of_a_snapshot_may_be_named_one_by_one(tmp_path: Path) -> None:
    snapshot = link_into_cache(TINY, tmp_path / "models--org--name")
    paths = [resolve_path(tmp_path, str(snapshot / name), "") for name in (TRANSFORMER, T5, VAE)]
    assert [path.name for path in paths] == [TRANSFORMER, T5, VAE]
    found = identify(SingleFiles(paths[0], None, None, paths[1], SPIECE, paths[2], heads=2))
    assert found.transformer_config == identify(TINY).transformer_config
    blobs = [path.resolve() for path in paths]
    found = identify(SingleFiles(blobs[0], None, None, blobs[1], SPIECE, blobs[2], heads=2))
    assert found.transformer_config == identify(TINY).transformer_config


@pytest.mark.parametrize(
    "name", ["wan2.2_t2v_high_noise_14B.safetensors", "wan2.2_t2v_low_noise_14B.safetensors"]
)
def test_the_name_of_a_link_or_of_its_target_says_the_expert(tmp_path: Path, name: str) -> None:
    (tmp_path / "blobs").mkdir()
    blob = tmp_path / "blobs" / ("0" * 64)
    blob.touch()
    link, far = tmp_path / name, tmp_path / "far.safetensors"
    link.symlink_to(blob)
    far.symlink_to(link)
    expected = "high" if "high" in name else "low"
    assert expert_from_name(link) == expert_from_name(far) == expected
    assert expert_from_name(blob) is None


def test_a_link_and_a_target_that_say_different_experts_are_refused(tmp_path: Path) -> None:
    low, high = tmp_path / "low_noise.safetensors", tmp_path / "high_noise.safetensors"
    low.touch()
    high.symlink_to(low)
    with pytest.raises(
        CheckpointError, match=r"names say both experts: high_noise.safetensors and low_noise"
    ):
        expert_from_name(high)


def test_what_lies_beside_a_link_and_beside_its_target_is_found(tmp_path: Path) -> None:
    store, links = tmp_path / "store", tmp_path / "links"
    links.mkdir()
    write(store / "dit.safetensors", stored(dit("14B"), "F16"))
    write(store / "umt5.safetensors", stored(umt5(), "F16"))
    (links / "dit.safetensors").symlink_to(store / "dit.safetensors")
    write(links / "vae.safetensors", stored(vae21_diffusers(), "F16"))
    found = find_siblings(links / "dit.safetensors")
    assert (found.transformer, found.text_encoder, found.vae) == (
        links / "dit.safetensors",
        store / "umt5.safetensors",
        links / "vae.safetensors",
    )


def test_a_link_beside_its_target_is_one_file(tmp_path: Path) -> None:
    write(tmp_path / "dit.safetensors", stored(dit("14B"), "F16"))
    write(tmp_path / "vae.safetensors", stored(vae21_diffusers(), "F16"))
    (tmp_path / "vae_again.safetensors").symlink_to(tmp_path / "vae.safetensors")
    assert find_siblings(tmp_path / "dit.safetensors").vae == tmp_path / "vae.safetensors"


# ---- damage that the size does not show ----


def test_a_blob_that_is_not_called_by_its_digest_is_refused(tmp_path: Path) -> None:
    snapshot = link_into_cache(TINY, tmp_path / "models--org--name")
    file = snapshot / TRANSFORMER
    assert fingerprint([file], tmp_path / "memo") == file.resolve().name
    data = file.read_bytes()
    file.resolve().write_bytes(data[:-1000] + bytes(1000))
    for memo in ("memo", "memo"):  # also if the digest is remembered
        with pytest.raises(CheckpointError, match="damaged: the SHA-256 of its content is"):
            fingerprint([file], tmp_path / memo)
    (deep,) = inspect(file.resolve(), deep=True)["deep"]
    assert deep["damage"].startswith("damaged: the SHA-256")


@pytest.mark.parametrize("suffix", [".aria2", ".st", ".lftp-pget-status"])
@pytest.mark.parametrize("part", [TRANSFORMER, T5, VAE])
def test_a_download_that_has_not_ended_is_refused(folder: Path, part: str, suffix: str) -> None:
    (folder / f"{part}{suffix}").write_bytes(b"\0")
    with pytest.raises(
        CheckpointError, match=f"{part}: .* has not finished this download: {part}{suffix} is"
    ):
        identify(folder)


def test_a_deep_look_names_matrices_of_zeros(tmp_path: Path) -> None:
    tensors = load_file(TINY / TRANSFORMER)
    tensors["blocks.1.ffn.0.weight"].zero_()
    tensors["blocks.1.ffn.0.bias"].zero_()
    save_file(tensors, tmp_path / "a.safetensors")
    (deep,) = inspect(tmp_path / "a.safetensors", deep=True)["deep"]
    assert (deep["zero"], deep["not_finite"], deep["damage"]) == (["blocks.1.ffn.0.weight"], [], "")


# ---- one file and shards ----


def test_shards_without_an_index_are_one_network(folder: Path) -> None:
    shard(folder)
    (folder / TRANSFORMER).unlink()
    assert len(identify(folder).transformer_files) == 2
    assert identify(folder).transformer_config == identify(TINY).transformer_config
    (folder / f"{STEM}-00001-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=f"{STEM}-00001-of-00002.safetensors: no such file"):
        identify(folder)


@pytest.mark.parametrize("index", [True, False])
def test_one_file_beside_shards_is_refused_naming_both(folder: Path, index: bool) -> None:
    shard(folder)
    if index:
        (folder / f"{TRANSFORMER}.index.json").write_text("{}")
    with pytest.raises(
        CheckpointError, match=f"holds {TRANSFORMER} and also {STEM}-00001-of-00002"
    ) as caught:
        identify(folder)
    assert "move one of the two elsewhere" in caught.value.hint


def test_an_index_whose_shards_are_gone_does_not_hide_the_file(folder: Path) -> None:
    (folder / f"{TRANSFORMER}.index.json").write_text("{}")
    assert find_safetensors(folder, STEM) == (folder / TRANSFORMER,)


def test_two_sets_of_shards_are_refused(folder: Path) -> None:
    shard(folder, 2)
    shard(folder, 3)
    (folder / TRANSFORMER).unlink()
    with pytest.raises(CheckpointError, match=r"several sets of shards: .*of-00002.* and .*of-00003"):
        identify(folder)


def test_links_that_are_named_as_shards_are_one_network(folder: Path) -> None:
    shard(folder)
    (folder / TRANSFORMER).unlink()
    for n in (1, 2):
        shard_file = folder / f"{STEM}-{n:05d}-of-00002.safetensors"
        blob = shard_file.rename(folder / f"blob{n}")
        shard_file.symlink_to(blob)
    (folder / "main").symlink_to(folder / f"{STEM}-00001-of-00002.safetensors")
    config = identify(TINY).transformer_config
    for name in (f"{STEM}-00001-of-00002.safetensors", "main"):
        assert identify(named(folder, transformer=folder / name)).transformer_config == config


def official(root: Path, size: str) -> Path:
    write(root / TRANSFORMER, stored(dit(size), "F16"))
    write(root / "models_t5_umt5-xxl-enc-bf16.safetensors", stored(umt5(), "F16"))
    write(root / "Wan2.1_VAE.safetensors", stored(vae21_diffusers(), "F16"))
    write(root / "Wan2.2_VAE.safetensors", stored(weight_files.vae22(), "F16"))
    shutil.copy(SPIECE, root)
    return root


@pytest.mark.parametrize(("size", "vae"), [("14B", "Wan2.1_VAE"), ("5B", "Wan2.2_VAE")])
def test_of_two_vaes_the_one_that_fits_is_used(tmp_path: Path, size: str, vae: str) -> None:
    found = identify(official(tmp_path / "m", size))
    assert found.vae_files[0].stem == vae
    other = "Wan2.1_VAE" if vae == "Wan2.2_VAE" else "Wan2.2_VAE"
    assert [note.partition(" in ")[0] for note in found.notes] == [f"{other}.safetensors"]


def test_an_encoder_that_is_not_used_is_named(tmp_path: Path) -> None:
    root = official(tmp_path / "m", "14B")
    (root / "Wan2.2_VAE.safetensors").unlink()
    assert identify(root).notes == ()
    write(root / "models_t5_umt5-xxl-enc-fp8.safetensors", stored(umt5(), "F16"))
    (note,) = identify(root).notes
    assert note.startswith("models_t5_umt5-xxl-enc-fp8.safetensors in ")


# ---- strays ----


def comfy_tree(root: Path) -> Path:
    spiece = SPIECE.read_bytes()
    text = stored(umt5(), "F16") | {"spiece_model": ("U8", (len(spiece),))}
    write(root / "diffusion_models" / "w.safetensors", stored(dit("14B"), "F16"))
    write(root / "text_encoders" / "umt5.safetensors", text, data={"spiece_model": spiece})
    write(root / "vae" / "wan_2.1_vae.safetensors", stored(vae21_diffusers(), "F16"))
    return root


@pytest.mark.parametrize("stray", ["config.json", "model_index.json", "google/umt5-xxl/spiece.model"])
def test_a_stray_file_does_not_make_a_tree_of_single_files_official(tmp_path: Path, stray: str) -> None:
    root = comfy_tree(tmp_path / "tree")
    (root / stray).parent.mkdir(parents=True, exist_ok=True)
    (root / stray).write_bytes(SPIECE.read_bytes() if stray.endswith(".model") else b"{}")
    assert [path.name for path in identify(root).transformer_files] == ["w.safetensors"]
    assert inspect(root)["layout"] == "single files"


def test_an_official_folder_without_its_transformer_still_says_what_is_missing(folder: Path) -> None:
    (folder / TRANSFORMER).unlink()
    with pytest.raises(CheckpointError, match=f"{TRANSFORMER} is missing"):
        identify(folder)


@pytest.mark.parametrize("official", [True, False])
def test_a_folder_with_only_tokenizer_json_says_what_is_needed(folder: Path, official: bool) -> None:
    root = folder
    if official:
        (folder / "google/umt5-xxl/spiece.model").unlink()
        (folder / "google/umt5-xxl/tokenizer.json").write_text("{}")
    else:
        root = folder / "pipeline"
        write(root / "transformer" / TRANSFORMER, stored(dit_diffusers("14B"), "F16"))
        write(root / "text_encoder" / "model.safetensors", stored(umt5(), "F16"))
        write(root / "vae" / TRANSFORMER, stored(vae21_diffusers(), "F16"))
        (root / "tokenizer").mkdir()
        (root / "tokenizer/tokenizer.json").write_text("{}")
        (root / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline"}))
    with pytest.raises(
        CheckpointError, match=r"only .*tokenizer\.json is there, which wancli does not"
    ) as caught:
        identify(root)
    assert "spiece.model" in caught.value.hint
    assert "Wan-AI" in caught.value.hint


# ---- whole checkpoints ----


@pytest.mark.parametrize("transformer", ["", "model.diffusion_model."])
@pytest.mark.parametrize(
    "place", ["", "text_encoders.umt5xxl.", "text_encoders.umt5xxl.transformer.", "tokenizer."]
)
def test_a_whole_checkpoint_may_keep_its_tokenizer_anywhere(
    tmp_path: Path, transformer: str, place: str
) -> None:
    spiece = SPIECE.read_bytes()
    entries = (
        stored(dit("14B"), "F16", transformer)
        | stored(umt5(), "F16", "text_encoders.umt5xxl.transformer.")
        | stored(vae21_diffusers(), "F16", "vae.")
        | {f"{place}spiece_model": ("U8", (len(spiece),))}
    )
    path = write(tmp_path / "whole.safetensors", entries, data={f"{place}spiece_model": spiece})
    found = identify(path)
    assert found.tokenizer == path
    assert all(not part.mismatches for part in (*found.experts, found.text_encoder, found.vae))


def test_a_tokenizer_in_another_shard_of_the_encoder_is_found(tmp_path: Path) -> None:
    spiece = SPIECE.read_bytes()
    entries = stored(umt5(), "F16") | {"spiece_model": ("U8", (len(spiece),))}
    files = weight_files.shards(tmp_path, "model", entries, 2, index=False)
    holder = next(file for file in files if "spiece_model" in read_tensors(file))
    write(tmp_path / "dit.safetensors", stored(dit("14B"), "F16"))
    write(tmp_path / "vae.safetensors", stored(vae21_diffusers(), "F16"))
    found = identify(
        SingleFiles(
            transformer=tmp_path / "dit.safetensors",
            text_encoder=files[0],
            vae=tmp_path / "vae.safetensors",
        )
    )
    assert found.tokenizer == holder


# ---- parts that contradict each other ----


def pipeline(root: Path, **index: Any) -> Path:
    for name in ("transformer", "transformer_2"):
        write(root / name / TRANSFORMER, stored(dit_diffusers("14B"), "F16"))
    write(root / "text_encoder" / "model.safetensors", stored(umt5(), "F16"))
    write(root / "vae" / TRANSFORMER, stored(vae21_diffusers(), "F16"))
    (root / "tokenizer").mkdir()
    shutil.copy(SPIECE, root / "tokenizer")
    two = {"_class_name": "WanPipeline", "transformer_2": ["diffusers", "WanTransformer3DModel"]}
    (root / "model_index.json").write_text(json.dumps(two | index))
    return root


@pytest.mark.parametrize(
    ("said", "boundary"), [({}, 0.875), ({"boundary_ratio": None}, 0.875), ({"boundary_ratio": 0.9}, 0.9)]
)
def test_the_boundary_of_a_pipeline_is_obeyed(tmp_path: Path, said: dict[str, Any], boundary: float) -> None:
    found = identify(pipeline(tmp_path / "p", **said))
    assert (found.variant.name, found.variant.boundary) == (T2V_A14B.name, boundary)


@pytest.mark.parametrize("ratio", ["0.9", 1.5, 0, True])
def test_a_boundary_that_is_none_is_refused(tmp_path: Path, ratio: object) -> None:
    with pytest.raises(CheckpointError, match="boundary_ratio is"):
        identify(pipeline(tmp_path / "p", boundary_ratio=ratio))


def configured(folder: Path, **changes: Any) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({k: v for k, v in (config | changes).items() if v is not None})
    )
    return folder


def test_heads_that_do_not_make_up_the_width_are_refused(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(CheckpointError, match="2 heads do not make up the width 48: each has 16 numbers"):
        identify(configured(folder, attention_head_dim=16))
    big = comfy_tree(tmp_path / "tree")
    files = find_siblings(big / "diffusion_models/w.safetensors")
    with pytest.raises(CheckpointError, match="20 heads do not make up the width 5120: each has 128"):
        identify(SingleFiles(**(vars(files) | {"heads": 20})))


def test_a_network_of_a_released_width_and_another_depth_has_the_heads_that_its_config_says() -> None:
    sizes = {"dim": 1536, "ffn_dim": 8960, "num_layers": 30, "in_dim": 16, "out_dim": 16}
    sizes |= {"text_dim": 4096, "freq_dim": 256}
    assert infer_transformer_config(sizes, {}, "w").num_heads == 12
    assert infer_transformer_config(sizes | {"num_layers": 20}, {"num_heads": 24}, "w").head_dim == 64
    with pytest.raises(CheckpointError, match="24 heads do not make up the width 1536: each has 128"):
        infer_transformer_config(sizes, {"num_heads": 24}, "w")


@pytest.mark.parametrize(
    ("said", "what"),
    [
        ('{"num_heads": NaN}', "num_heads is nan"),
        ('{"num_heads": Infinity}', "num_heads is inf"),
        ('{"num_heads": 1e999}', "num_heads is inf"),
        ('{"num_heads": true}', "num_heads is True"),
        ('{"num_heads": "2"}', "num_heads is '2'"),
        ('{"num_heads": 2, "eps": NaN}', "eps = nan"),
        ('{"num_heads": 2, "eps": -0.5}', "eps = -0.5"),
        ('{"num_heads": 2, "window_size": [3, 3]}', r"window_size = \[3, 3\]"),
        ('{"num_heads": 2, "patch_size": [1, 4, 4]}', r"patch_size = \[1, 4, 4\]"),
    ],
)
def test_a_config_that_no_network_can_have_is_refused(folder: Path, said: str, what: str) -> None:
    (folder / "config.json").write_text(said)
    with pytest.raises(CheckpointError, match=what):
        identify(folder)


def test_null_in_a_config_says_nothing(folder: Path) -> None:
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(said | dict.fromkeys(("eps", "text_len", "dim"))))
    assert identify(folder).transformer_config == identify(TINY).transformer_config


def test_the_width_of_a_head_tells_their_number(folder: Path) -> None:
    config = identify(configured(folder, num_heads=None, attention_head_dim=24)).transformer_config
    assert (config.num_heads, config.head_dim) == (2, 24)


# ---- messages name what is not there ----


def named(folder: Path, **files: Path) -> SingleFiles:
    parts = {"transformer": folder / TRANSFORMER, "text_encoder": folder / T5, "vae": folder / VAE}
    return SingleFiles(**(parts | {"tokenizer": SPIECE, "heads": 2} | files))


@pytest.mark.parametrize("wrapper", ["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"])
def test_a_transformer_wrapped_block_by_block_is_read(folder: Path, wrapper: str) -> None:
    tensors = load_file(folder / TRANSFORMER)
    compiled = {
        f"{wrapper}." + name.replace("blocks.0.", f"blocks.0.{wrapper}."): tensor
        for name, tensor in tensors.items()
    }
    path = folder / "compiled.safetensors"
    save_file(compiled, path)
    assert identify(named(folder, transformer=path)).transformer_config == identify(TINY).transformer_config


@pytest.mark.parametrize(
    ("keep", "missing"),
    [
        (
            lambda name: not name.startswith("blocks."),
            r"a part of a Wan transformer: blocks\.0\.\* is missing",
        ),
        (
            lambda name: name.startswith("blocks."),
            r"a part of a Wan transformer: patch_embedding\.\* is missing",
        ),
    ],
)
def test_a_part_of_a_transformer_says_what_it_lacks(folder: Path, keep: Any, missing: str) -> None:
    tensors = load_file(folder / TRANSFORMER)
    path = folder / "part.safetensors"
    save_file({name: tensor for name, tensor in tensors.items() if keep(name)}, path)
    with pytest.raises(CheckpointError, match=missing):
        identify(named(folder, transformer=path))


@pytest.mark.parametrize("half", ["encoder", "decoder"])
def test_half_a_vae_says_which_half_is_missing(folder: Path, half: str) -> None:
    other = "decoder" if half == "encoder" else "encoder"
    tensors = torch.load(folder / VAE, weights_only=True)
    path = folder / "half.safetensors"
    save_file({name: t.contiguous() for name, t in tensors.items() if not name.startswith(f"{other}.")}, path)
    with pytest.raises(CheckpointError, match=rf"a part of a Wan VAE: {other}\.\* is missing"):
        identify(named(folder, vae=path))


@pytest.mark.parametrize("step", [torch.tensor(5), torch.tensor([5])])
def test_a_counter_among_the_weights_is_unexpected_and_no_quantization(
    folder: Path, step: torch.Tensor
) -> None:
    path = folder / "step.pt"
    torch.save({**load_file(folder / TRANSFORMER), "step": step}, path)
    with pytest.raises(CheckpointError, match="unexpected step"):
        identify(named(folder, transformer=path))


# ---- fp8 in square blocks ----


@pytest.mark.parametrize("end", ["weight_scale_inv", "weight_scale", "scale_weight"])
def test_fp8_in_square_blocks_is_refused_by_its_name(tmp_path: Path, end: str) -> None:
    root = comfy_tree(tmp_path / "tree")
    grid = {end: lambda shape: ("F32", (shape[0] // 128, shape[1] // 128))}
    write(root / "diffusion_models/w.safetensors", cast(stored(dit("14B"), "F16"), **grid))
    message = "quantized as fp8 in square blocks, which wancli does not load"
    with pytest.raises(CheckpointError, match=message):
        identify(root / "diffusion_models/w.safetensors")
    (part,) = inspect(root / "diffusion_models/w.safetensors")["parts"]
    assert message in part["refusal"]


def test_single_files_beside_only_a_tokenizer_json_say_so(tmp_path: Path) -> None:
    write(tmp_path / "dit.safetensors", stored(dit("14B"), "F16"))
    write(tmp_path / "umt5.safetensors", stored(umt5(), "F16"))
    write(tmp_path / "vae.safetensors", stored(vae21_diffusers(), "F16"))
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer/tokenizer.json").write_text("{}")
    message = r"SentencePiece model \(tokenizer\); tokenizer\.json is there, which wancli does not read"
    with pytest.raises(CheckpointError, match=message):
        identify(tmp_path / "dit.safetensors")


def test_a_folder_whose_encoder_holds_the_tokenizer_misses_none(folder: Path) -> None:
    (folder / "google/umt5-xxl/spiece.model").unlink()
    encoder = torch.load(folder / T5, weights_only=True)
    spiece = torch.tensor(list(SPIECE.read_bytes()), dtype=torch.uint8)
    (folder / T5).unlink()
    save_file(
        {k: t.contiguous() for k, t in encoder.items()} | {"spiece_model": spiece},
        folder / T5.replace(".pth", ".safetensors"),
    )
    assert identify(folder).tokenizer.name == T5.replace(".pth", ".safetensors")
    assert inspect(folder)["missing"] == []


# ---- what lies in a folder, or beside single files ----


@pytest.mark.parametrize("parts", [1, 2])
def test_files_in_one_precision_of_diffusers_are_read(folder: Path, parts: int) -> None:
    if parts > 1:
        shard(folder, parts)
        (folder / TRANSFORMER).unlink()
    for path in list(folder.glob(f"{STEM}*.safetensors")):
        path.rename(path.with_name(path.name.replace(STEM, f"{STEM}.fp16")))
    found = identify(folder)
    assert found.transformer_config == identify(TINY).transformer_config
    assert len(found.transformer_files) == parts
    shutil.copy(found.transformer_files[0], folder / f"{STEM}.bf16.safetensors")
    with pytest.raises(CheckpointError, match=f"several variants: {STEM}.bf16 and {STEM}.fp16"):
        find_safetensors(folder, STEM)


def test_an_index_of_nothing_is_refused(folder: Path) -> None:
    (folder / TRANSFORMER).rename(folder / f"{STEM}-00001-of-00001.safetensors")
    (folder / f"{TRANSFORMER}.index.json").write_text('{"weight_map": {}}')
    with pytest.raises(CheckpointError, match=r"index.json: no index of shards"):
        identify(folder)


@pytest.mark.parametrize("suffix", [".part", ".incomplete", ".crdownload", ".!qB"])
@pytest.mark.parametrize("name", [TRANSFORMER, T5, VAE])
def test_a_download_that_has_not_ended_is_named(folder: Path, name: str, suffix: str) -> None:
    (folder / name).rename(folder / f"{name}{suffix}")
    with pytest.raises(CheckpointError, match=f"missing; {name}{suffix} is there, a download that has not"):
        identify(folder)


@pytest.mark.parametrize("name", [TRANSFORMER, T5, VAE])
def test_a_link_to_nothing_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    (folder / name).symlink_to("nowhere")
    with pytest.raises(CheckpointError, match=f"missing; {name} is there, a link to nothing"):
        identify(folder)


def test_a_damaged_file_is_named_and_not_called_missing(tmp_path: Path) -> None:
    root = comfy_tree(tmp_path)
    for folder in ("vae", "diffusion_models"):
        (damaged,) = (root / folder).glob("*.safetensors")
        os.truncate(damaged, 1000)
        with pytest.raises(CheckpointError, match=rf"{damaged.name} is there, and cannot be read: truncated"):
            identify(root)


def test_the_folder_of_comfyui_itself_is_a_model(tmp_path: Path) -> None:
    below = identify(comfy_tree(tmp_path / "ComfyUI" / "models"))
    root = identify(tmp_path / "ComfyUI")
    assert root.transformer_files == below.transformer_files
    assert (root.text_encoder_files, root.vae_files) == (below.text_encoder_files, below.vae_files)
    assert root.tokenizer == below.tokenizer
    assert len(inspect(tmp_path / "ComfyUI")["parts"]) == 3


def test_hidden_files_are_no_weights(tmp_path: Path) -> None:
    root = comfy_tree(tmp_path)
    before = identify(root)
    for path in list(root.rglob("*.safetensors")):
        path.with_name(f"._{path.name}").write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X        ")
    assert identify(root) == before
    assert [part["kind"] for part in inspect(root)["parts"]].count("other") == 0
