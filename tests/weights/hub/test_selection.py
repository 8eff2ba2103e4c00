"""Of a repository those files are chosen that a render reads, and no others."""

from __future__ import annotations

from pathlib import Path

import pytest
from jobs import TINY

from wancli.errors import JobError
from wancli.weights.checkpoint import identify
from wancli.weights.hub.selection import choose_files

SHARDS = [f"diffusion_pytorch_model-{number:05}-of-00002.safetensors" for number in (1, 2)]
INDEX = "diffusion_pytorch_model.safetensors.index.json"
OFFICIAL = [
    *(".gitattributes", "LICENSE.txt", "README.md", "assets/logo.png", "examples/i2v_input.JPG"),
    *("config.json", "models_t5_umt5-xxl-enc-bf16.pth", "Wan2.1_VAE.pth", "google/umt5-xxl/spiece.model"),
    *("google/umt5-xxl/tokenizer.json", "google/umt5-xxl/tokenizer_config.json"),
]
DIFFUSERS = [
    *("README.md", "model_index.json", "scheduler/scheduler_config.json", "tokenizer/spiece.model"),
    *("tokenizer/tokenizer.json", "text_encoder/config.json", "text_encoder/pytorch_model.bin"),
    *("text_encoder/model.safetensors", "text_encoder/model.fp16.safetensors", "text_encoder/tf_model.h5"),
    *("transformer/config.json", "vae/config.json", "vae/diffusion_pytorch_model.safetensors"),
    *(f"transformer/{name}" for name in (*SHARDS, INDEX)),
]


def test_of_an_official_repository_text_and_pictures_stay_behind() -> None:
    chosen = choose_files([*OFFICIAL, *SHARDS, INDEX])
    assert sorted(chosen) == sorted([*OFFICIAL[5:9], *SHARDS, INDEX])


def test_of_two_experts_both_are_chosen() -> None:
    experts = [f"{folder}/{name}" for folder in ("high_noise_model", "low_noise_model") for name in SHARDS]
    configs = ["high_noise_model/config.json", "low_noise_model/config.json"]
    chosen = choose_files([*OFFICIAL[:5], *OFFICIAL[6:], *experts, *configs])
    assert {*experts, *configs} <= {*chosen}
    assert "config.json" not in chosen


def test_clip_is_chosen_where_it_is() -> None:
    clip = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
    assert clip in choose_files([*OFFICIAL, clip, *SHARDS])


def test_of_a_diffusers_repository_one_copy_of_each_network_is_chosen() -> None:
    chosen = choose_files(DIFFUSERS)
    assert sorted(chosen) == sorted(
        [
            *("model_index.json", "tokenizer/spiece.model", "transformer/config.json"),
            *("text_encoder/model.safetensors", "vae/diffusion_pytorch_model.safetensors"),
            *(f"transformer/{name}" for name in (*SHARDS, INDEX)),
        ]
    )


def test_half_precision_is_chosen_where_nothing_else_is() -> None:
    names = [name.replace("model.safetensors", "model.fp16.safetensors") for name in DIFFUSERS]
    assert "vae/diffusion_pytorch_model.fp16.safetensors" in choose_files(names)


def test_a_folder_of_a_repository_is_chosen_like_a_repository() -> None:
    names = [f"models/wan/{name}" for name in (*OFFICIAL, *SHARDS, INDEX)]
    assert choose_files(["README.md", *names], "models/wan") == [
        f"models/wan/{name}" for name in choose_files([*OFFICIAL, *SHARDS, INDEX])
    ]


def test_a_file_is_found_without_its_folders() -> None:
    names = ["split_files/vae/wan_2.1_vae.safetensors", "split_files/diffusion_models/wan.safetensors"]
    assert choose_files(names, "wan_2.1_vae.safetensors") == names[:1]
    assert choose_files(names, names[1]) == names[1:]


def test_an_expert_brings_the_other_one_and_a_shard_its_set() -> None:
    experts = [f"d/wan2.2_t2v_{word}_noise_14B.safetensors" for word in ("high", "low")]
    assert choose_files(["d/slow.safetensors", *experts], experts[1]) == [experts[1], experts[0]]
    folders = [f"{word}Noise/Wan2.2-{word}Noise-Q4_K_M.gguf" for word in ("High", "Low")]
    assert choose_files(folders, folders[0]) == folders
    assert choose_files([*SHARDS, "x-00001-of-00002.safetensors"], SHARDS[1]) == SHARDS


def test_a_repository_of_several_models_asks_which_one() -> None:
    names = [f"wan-{type}.gguf" for type in ("Q4_0", "Q8_0")]
    with pytest.raises(JobError, match="which one is meant") as caught:
        choose_files(names)
    assert "REPOSITORY:FILE with one of wan-Q4_0.gguf, wan-Q8_0.gguf" in caught.value.hint
    assert choose_files(names[:1]) == names[:1]
    with pytest.raises(JobError, match=r"has no wan-Q5_0\.gguf"):
        choose_files(names, "wan-Q5_0.gguf")
    with pytest.raises(JobError, match="no weights that wancli reads"):
        choose_files(["README.md"])


def test_what_is_chosen_of_a_checkpoint_renders(tmp_path: Path) -> None:
    names = [path.relative_to(TINY).as_posix() for path in TINY.rglob("*") if path.is_file()]
    for name in choose_files(names):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).symlink_to(TINY / name)
    assert identify(tmp_path).variant == identify(TINY).variant
