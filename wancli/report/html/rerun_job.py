"""The job that renders a recorded shot again: everything that was decided, spelled out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

Job = dict[str, Any]


def rerun_command(job: Job) -> str:
    """For a shell; the job is JSON, which is YAML too."""
    return f"wancli render - <<'JOB'\n{json.dumps(job, indent=1, ensure_ascii=False)}\nJOB\n"


def build_job(body: Mapping[str, Any], output: str) -> Job:
    """A job of one shot whose key is that of the manifest `body`, on the machine that wrote it."""
    shot, model, prompts = body["shot"], body["model"], body["prompts"]
    rules = body["injection"]
    texts = {prompt["id"]: prompt for prompt in prompts}
    guidance: Any = shot["guidance"]
    if any(stage["expert"] != "only" for stage in shot["stages"]):
        guidance = {stage["expert"]: stage["guidance"] for stage in shot["stages"]}
        guidance = {"high": shot["guidance"], "low": shot["guidance"]} | guidance
    job: Job = {
        "model": model["files"] or model["root"],
        "output": output,
        "id": shot["id"],
        "prompt": _prompt_value(prompts[0]),
    }
    if len(prompts) > 1 + len(rules):
        job["negative"] = _prompt_value(prompts[1])
    job |= {
        "size": f"{shot['width']}x{shot['height']}",
        "frames": shot["frames"],
        "seed": shot["seed"],
        "noise": shot["noise"],
        "sampler": {key: shot[key] for key in ("solver", "steps", "shift")} | {"guidance": guidance},
        "text": {
            "max_tokens": prompts[0].get("max_tokens", 256),
            "truncate": any(prompt["truncated"] for prompt in prompts),
        },
        "inject": [_inject_entry(rule, texts[rule["text"]]) for rule in rules],
        "loras": [_lora_entry(lora) for lora in body["loras"]],
        "video": {"fps": shot["fps"], "crf": shot["crf"], "codec": shot["codec"]},
        "memory": {
            "device": model["device"],
            "dtype": model["dtype"],
            "attention": model["kernels"]["attention"],
            "fp8_matmul": model["kernels"]["fp8_matmul"],
            "decode_chunk": shot["decode_chunk"],
        },
    }  # fmt: skip
    return job


def _prompt_value(prompt: Mapping[str, Any]) -> Any:
    if prompt["file"]:
        return {"embedding": prompt["file"], "index": prompt.get("index", 0)}
    return prompt["text"]


def _inject_entry(rule: Mapping[str, Any], prompt: Mapping[str, Any]) -> Job:
    blocks = {int(block): strength for block, strength in rule["blocks"].items()}
    steps = {int(step): factor for step, factor in rule["steps"].items()}
    return {
        "prompt": _prompt_value(prompt),
        "blocks": sorted(blocks),
        "strength": [blocks[block] for block in sorted(blocks)],
        "steps": f"{min(steps)}-{max(steps)}",
        "step_strength": [steps[step] for step in sorted(steps)],
        "branch": "both" if len(rule["branches"]) == 2 else rule["branches"][0],
        "blend": rule["blend"],
        "gain": rule["gain"],
    }


def _lora_entry(lora: Mapping[str, Any]) -> Job:
    entry: Job = {"path": lora["path"], "strength": lora["strength"], "expert": lora["expert"] or "both"}
    if lora["blocks"] is not None:
        entry["blocks"] = lora["blocks"]
    if lora["steps"] is not None:
        entry["steps"] = f"{min(lora['steps'])}-{max(lora['steps'])}"
    return entry
