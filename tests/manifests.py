"""Records of shots that nobody rendered."""

from __future__ import annotations

from typing import Any

from wancli.storage.manifest_schema import Manifest


def body(**changes: Any) -> dict[str, Any]:
    """The body of a small manifest, with these keys instead of its own."""
    return {
        "key": "0123456789abcdef",
        "latents_key": "fedcba9876543210",
        "shot": {
            "index": 0,
            "id": "0000",
            "labels": {},
            "output": "clip.mp4",
            "width": 64,
            "height": 64,
            "frames": 1,
            "tokens": 16,
            "seed": 5,
            "noise": "cpu",
            "solver": "unipc",
            "steps": 2,
            "shift": 5.0,
            "guidance": 5.0,
            "stages": [{"expert": "only", "steps": [0, 1], "guidance": 5.0}],
            "timesteps": [999.0, 833.0],
            "sigmas": [1.0, 0.83, 0.0],
            "fps": 16,
            "crf": 16,
            "codec": "h264",
            "decode_chunk": 1,
        },
        "model": {
            "root": "/models/tiny",
            "variant": "Wan 2.1 T2V 1.3B",
            "sizes": {"dim": 128, "ffn_dim": 256, "num_heads": 1, "num_layers": 4},
            "dtype": "fp32",
            "device": "cpu",
            "sha256": {"transformer": "a" * 64, "text_encoder": "b" * 64, "vae": "c" * 64},
        },
        "predicted": [],
        "versions": {"wancli": "0"},
        "prompts": [prompt("p", "a red fox")],
        "encoder_loaded": True,
        "injection": [],
        "effects": [],
        "phases": [phase("encode"), phase("load"), phase("sample"), phase("decode")],
        "files": [],
    } | changes


def prompt(id: str, text: str, **changes: Any) -> dict[str, Any]:
    facts = {"id": id, "text": text, "tokens": 4, "truncated": False, "file": None, "cached": False}
    return facts | changes


def rule(prompt_id: str, **changes: Any) -> dict[str, Any]:
    facts: dict[str, Any] = {"text": prompt_id, "branches": ["cond"], "blend": "context-lerp", "gain": 1.0}
    facts |= {"blocks": {"3": 1.0}, "steps": {"0": 1.0}, "planned": 1, "hits": 1}
    facts |= {"hits_by_step": {"0": 1}, "hits_by_branch": {"cond": 1}, "hits_by_block": {"3": 1}}
    return facts | {"difference": {"verdict": {"percent": 50.0, "band": "far"}}} | changes


def phase(name: str, **changes: Any) -> dict[str, Any]:
    return {"name": name, "seconds": 1.0, "rss_start": 1, "rss": 2, "cuda": None} | changes


def record(**changes: Any) -> Manifest:
    return Manifest.model_validate(body(**changes))
