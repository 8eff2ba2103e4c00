"""The table of models and LoRAs on the Hugging Face hub that people use, for `wancli fetch --list`.

Sizes are those of the files that a render reads, in GB: as published where a source states them, else from
the number of parameters (transformers 1.42, 5.00, 14.29 and 16.39 G, UMT5 5.68 G, CLIP 1.19 G).
`wancli fetch NAME --dry-run` asks the hub for the exact ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Literal, TypeAlias

from wancli.weights.folder_layouts import Role
from wancli.weights.hub.name import HubName, parse_name

Layout: TypeAlias = Literal["official", "diffusers", "ComfyUI", "kijai", "GGUF", "LoRA"]
APACHE = "Apache-2.0"
_COMFY_21 = "Comfy-Org/Wan_2.1_ComfyUI_repackaged:split_files"
_COMFY_22 = "Comfy-Org/Wan_2.2_ComfyUI_Repackaged:split_files"
_UMT5 = f"{_COMFY_21}/text_encoders/umt5_xxl_fp8_e4m3fn_scaled.safetensors"  # its tokenizer is in the file
_CLIP = f"{_COMFY_21}/clip_vision/clip_vision_h.safetensors"
_VAE_21 = f"{_COMFY_21}/vae/wan_2.1_vae.safetensors"
_VAE_22 = f"{_COMFY_22}/vae/wan2.2_vae.safetensors"
_KIJAI_22 = "Kijai/WanVideo_comfy_fp8_scaled:T2V/Wan2_2-T2V-A14B"
_QUANT_T2V = "QuantStack/Wan2.2-T2V-A14B-GGUF"
_QUANT_I2V = "QuantStack/Wan2.2-I2V-A14B-GGUF"
_LIGHTNING = "lightx2v/Wan2.2-Lightning:Wan2.2-T2V-A14B-4steps-lora-rank64-Seko-V1.1"


@dataclass(frozen=True)
class KnownModel:
    """A model as `model:` names it, or a LoRA as `file:` does, and the size of all that it needs in GB.

    `parts` are the files that a single file does not hold, each by its role.
    """

    name: str
    layout: Layout
    gigabytes: float
    licence: str = APACHE
    parts: Mapping[Role, str] = field(default_factory=dict)

    @property
    def hub_name(self) -> HubName:
        return _parse(self.name)

    @property
    def files(self) -> dict[Role, HubName]:
        """The files of a checkpoint of single files by role; empty for a folder and for a LoRA."""
        if not self.parts:
            return {}
        main: Role = "high_noise" if "low_noise" in self.parts else "transformer"
        return {main: self.hub_name} | {role: _parse(name) for role, name in self.parts.items()}


def _parse(name: str) -> HubName:
    parsed = parse_name(name)
    assert parsed, name
    return parsed


def _single(name: str, layout: Layout, gigabytes: float, vae: str = _VAE_21, **others: str) -> KnownModel:
    parts = {"text_encoder": _UMT5, "vae": vae} | others
    return KnownModel(name, layout, gigabytes, parts=parts)  # type: ignore[arg-type]  # keys are roles


KNOWN = (
    KnownModel("Wan-AI/Wan2.1-T2V-1.3B", "official", 17.5),
    KnownModel("Wan-AI/Wan2.1-T2V-14B", "official", 69.0),
    KnownModel("Wan-AI/Wan2.1-I2V-14B-480P", "official", 82.2),
    KnownModel("Wan-AI/Wan2.1-I2V-14B-720P", "official", 82.2),
    KnownModel("Wan-AI/Wan2.1-FLF2V-14B-720P", "official", 82.2),
    KnownModel("Wan-AI/Wan2.2-T2V-A14B", "official", 126.2),
    KnownModel("Wan-AI/Wan2.2-I2V-A14B", "official", 126.2),
    KnownModel("Wan-AI/Wan2.2-TI2V-5B", "official", 34.2),
    KnownModel("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "diffusers", 28.9),
    KnownModel("Wan-AI/Wan2.1-T2V-14B-Diffusers", "diffusers", 80.4),
    KnownModel("Wan-AI/Wan2.1-I2V-14B-480P-Diffusers", "diffusers", 91.3),
    KnownModel("Wan-AI/Wan2.2-T2V-A14B-Diffusers", "diffusers", 126.2),
    KnownModel("Wan-AI/Wan2.2-TI2V-5B-Diffusers", "diffusers", 34.2),
    _single(f"{_COMFY_21}/diffusion_models/wan2.1_t2v_1.3B_fp16.safetensors", "ComfyUI", 9.8),
    _single(f"{_COMFY_21}/diffusion_models/wan2.1_t2v_14B_fp8_scaled.safetensors", "ComfyUI", 21.3),
    _single(
        f"{_COMFY_21}/diffusion_models/wan2.1_i2v_480p_14B_fp8_scaled.safetensors",
        "ComfyUI",
        24.7,
        image_encoder=_CLIP,
    ),
    _single(
        f"{_COMFY_22}/diffusion_models/wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors",
        "ComfyUI",
        35.6,
        low_noise=f"{_COMFY_22}/diffusion_models/wan2.2_t2v_low_noise_14B_fp8_scaled.safetensors",
    ),
    _single(
        f"{_COMFY_22}/diffusion_models/wan2.2_i2v_high_noise_14B_fp8_scaled.safetensors",
        "ComfyUI",
        35.6,
        low_noise=f"{_COMFY_22}/diffusion_models/wan2.2_i2v_low_noise_14B_fp8_scaled.safetensors",
    ),
    _single(f"{_COMFY_22}/diffusion_models/wan2.2_ti2v_5B_fp16.safetensors", "ComfyUI", 18.1, _VAE_22),
    _single("Kijai/WanVideo_comfy:Wan2_1-T2V-14B_fp8_e4m3fn.safetensors", "kijai", 21.3),
    _single(
        f"{_KIJAI_22}_HIGH_fp8_e4m3fn_scaled_KJ.safetensors",
        "kijai",
        36.0,
        low_noise=f"{_KIJAI_22}-LOW_fp8_e4m3fn_scaled_KJ.safetensors",
    ),
    _single("city96/Wan2.1-T2V-14B-gguf:wan2.1-t2v-14b-Q4_K_M.gguf", "GGUF", 16.6),
    _single("city96/Wan2.1-T2V-14B-gguf:wan2.1-t2v-14b-Q8_0.gguf", "GGUF", 22.4),
    _single(
        f"{_QUANT_T2V}:HighNoise/Wan2.2-T2V-A14B-HighNoise-Q4_K_M.gguf",
        "GGUF",
        26.3,
        low_noise=f"{_QUANT_T2V}:LowNoise/Wan2.2-T2V-A14B-LowNoise-Q4_K_M.gguf",
    ),
    _single(
        f"{_QUANT_I2V}:HighNoise/Wan2.2-I2V-A14B-HighNoise-Q4_K_M.gguf",
        "GGUF",
        26.3,
        low_noise=f"{_QUANT_I2V}:LowNoise/Wan2.2-I2V-A14B-LowNoise-Q4_K_M.gguf",
    ),
    _single("QuantStack/Wan2.2-TI2V-5B-GGUF:Wan2.2-TI2V-5B-Q5_K_M.gguf", "GGUF", 12.0, _VAE_22),
    KnownModel(
        "lightx2v/Wan2.1-T2V-14B-StepDistill-CfgDistill-Lightx2v"
        ":loras/Wan21_T2V_14B_lightx2v_cfg_step_distill_lora_rank64.safetensors",
        "LoRA",
        0.63,
    ),
    KnownModel(
        "lightx2v/Wan2.1-I2V-14B-480P-StepDistill-CfgDistill-Lightx2v"
        ":loras/Wan21_I2V_14B_lightx2v_cfg_step_distill_lora_rank64.safetensors",
        "LoRA",
        0.74,
    ),
    KnownModel(f"{_LIGHTNING}/high_noise_model.safetensors", "LoRA", 0.61),
    KnownModel(f"{_LIGHTNING}/low_noise_model.safetensors", "LoRA", 0.61),
)


def find_known(name: HubName) -> KnownModel | None:
    """Return the model of the table that a name means, at any revision, its file with or without folders."""
    for model in KNOWN:
        path = model.hub_name.path
        if model.hub_name.repo == name.repo and name.path in (path, PurePosixPath(path).name):
            return model
    return None
