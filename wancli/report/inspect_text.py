"""The text of `wancli inspect`: one paragraph per network, within 80 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from wancli.progress import make_printable
from wancli.storage import disk
from wancli.units import format_bytes

COLUMNS, LABEL = 80, 16
DTYPES = {"F8_E4M3": "fp8 e4m3fn", "F8_E5M2": "fp8 e5m2", "BF16": "bf16"}
SCHEMES = {
    "plain": "none",
    "fp8": "plain fp8, cast without scales",
    "fp8_scaled": "fp8 scaled (ComfyUI's first layout, kijai)",
    "kijai": "fp8 scaled (kijai)",
    "comfy_quant": "fp8 scaled (ComfyUI's comfy_quant layout)",
    "lightx2v": "fp8 with a scale per row (LightX2V)",
    "block": "fp8 with a scale per block of a row",
    "gguf": "GGUF",
}


def format_inspection(document: Mapping[str, Any]) -> Iterator[str]:
    """Format the checkpoint, then every network in it, then the results of --deep."""
    root = Path(document["path"])
    facts = [] if document["layout"] == "file" else [f"{document['layout']} layout"]
    facts += [document["variant"]] if document["variant"] else []
    yield make_printable(f"{root}{': ' if facts else ''}{', '.join(facts)}")
    if document["defaults"]:
        yield from _format_row("made for", format_defaults(document["defaults"]))
    refused = any(part["refusal"] for part in document["parts"])
    if document["missing"]:
        yield from _format_row("missing", "; ".join(document["missing"]))
    elif document["problem"] and not refused:  # the paragraph of a refused part has the reason
        yield from _format_row("to render", document["problem"].removeprefix(f"{disk.resolve(root)}: "))
    folder = root if disk.is_folder(root) else root.parent
    for part in document["parts"]:
        yield ""
        yield from _format_component(part, folder)
    for file in document.get("deep", ()):
        yield ""
        yield make_printable(_relative_path(file["file"], folder))
        yield from _format_row("sha256", file["sha256"])
        bad = file["not_finite"]
        finite = "all finite" if bad == [] else "not checked: they are GGUF blocks"
        yield from _format_row("values", f"NaN or Inf in {', '.join(bad)}" if bad else finite)
        if file["zero"]:
            yield from _format_row("", f"only zeros in {', '.join(file['zero'])}")
        if file["damage"]:
            yield from _format_row("bytes", file["damage"])


def format_defaults(row: Mapping[str, Any]) -> str:
    """Format the defaults of a variant: `1280x720, 81 frames at 16 fps, 40 steps, shift 12 ...`."""
    guidance = f"{row['guidance']:g}"
    if row["guidance_low"] is not None:
        guidance += f" from timestep {1000 * row['boundary']:g} up, {row['guidance_low']:g} below"
    return (
        f"{row['width']}x{row['height']}, {row['frames']} frames at {row['fps']} fps, "
        f"{row['steps']} steps, shift {row['shift']:g}, guidance {guidance}"
    )


def _format_component(part: Mapping[str, Any], folder: Path) -> Iterator[str]:
    expert = f", {part['expert']}-noise expert" if part["expert"] else ""
    yield make_printable(f"{part['kind']}: {part['name']}{expert}")
    first, *others = (_relative_path(file, folder) for file in part["files"])
    within = Path(first).parent
    yield from _format_row("file", f"{len(others) + 1} shards in {within}" if others else first)
    count = f"{part['parameters']:,} parameters in " if part["parameters"] else ""
    yield from _format_row("size", f"{format_bytes(part['bytes'])}, {count}{part['tensors']:,} tensors")
    if part["sizes"]:
        yield from _format_row("network", _describe_network(part))
    if part["variant_reason"]:
        yield from _format_row("variant", f"{part['variant']}, {part['variant_reason']}")
    if part["kind"] in ("transformer", "text encoder", "image encoder", "vae"):
        prefix = f", after {part['prefix']}" if part["prefix"] else ""
        yield from _format_row("names", f"{part['naming']}{prefix}")
        yield from _format_row("quantization", _describe_scheme(part["scheme"]))
    if part["lora"]:
        yield from _format_lora(part["lora"])
    for index, (group, dtypes) in enumerate(part["precision"].items()):
        counts = ", ".join(f"{count} {_dtype_name(dtype)}" for dtype, count in dtypes.items())
        yield from _format_row("" if index else "precision", f"{group}: {counts}")
    yield from _format_problems(part)


def _format_problems(part: Mapping[str, Any]) -> Iterator[str]:
    """Format problems: missing tensors, a surprising count, an unknown scheme or model."""
    if part["gaps"]:
        more = f" and {len(part['gaps']) - 5} more" if len(part["gaps"]) > 5 else ""
        yield from _format_row("missing", ", ".join(part["gaps"][:5]) + more)
    wanted = part["parameters_of_network"]
    if wanted is not None and wanted != part["parameters"]:
        yield from _format_row("unexpected", f"a network of these sizes has {wanted:,} parameters")
    if part["name"] == "Wan2.1-T2V-14B" and not part["expert"]:
        yield from _format_row(
            "or", "one expert of Wan2.2-T2V-A14B: the shapes are the same, only names tell"
        )
    if part["tokenizer"]:
        yield from _format_row("tokenizer", "inside the file")
    if part["refusal"]:
        yield from _format_row("not supported", part["refusal"])
        yield from _format_row("", part["hint"])


def _describe_network(part: Mapping[str, Any]) -> str:
    sizes = part["sizes"]
    if part["kind"] == "transformer":
        heads = f"{sizes['num_heads']} heads, " if "num_heads" in sizes else ""
        return (
            f"{sizes['num_layers']} blocks of width {sizes['dim']}, {heads}feed-forward {sizes['ffn_dim']}, "
            f"{sizes['in_dim']} channels in, {sizes['out_dim']} out"
        )
    if part["kind"] == "text encoder":
        return f"{sizes['num_layers']} blocks of width {sizes['d_model']}, {sizes['vocab_size']:,} words"
    decoder = f", {sizes['dec_dim']} in the decoder" if "dec_dim" in sizes else ""
    return f"width {sizes['dim']}{decoder}, {sizes['z_dim']} latent channels"


def _describe_scheme(scheme: Mapping[str, Any]) -> str:
    if scheme["refusal"]:
        return str(scheme["refusal"])
    if scheme["name"] == "plain":
        return SCHEMES["plain"]
    dtypes = " and ".join(_dtype_name(dtype) for dtype in scheme["dtypes"])
    per = f", a scale per {scheme['scales']}" if scheme["scales"] else ""
    full = ", to be multiplied in full precision" if scheme["full_precision"] else ""
    return f"{SCHEMES[scheme['name']]}: {scheme['layers']} matrices in {dtypes}{per}{full}"


def _format_lora(lora: Mapping[str, Any]) -> Iterator[str]:
    yield from _format_row("style", f"{lora['style']}, {' and '.join(lora['methods'])}")
    kinds = ", ".join(f"{count} {name}" for name, count in lora["layers"].items())
    yield from _format_row("targets", f"{lora['targets']} layers in {lora['blocks']} blocks: {kinds}")
    ranks = ", ".join(map(str, lora["ranks"])) or "none"
    alphas = ", ".join(f"{alpha:g}" for alpha in lora["alphas"])
    if lora["config"]:
        alphas = f"in {lora['config']}"
    yield from _format_row("rank", f"{ranks}; alpha {alphas}" if alphas else f"{ranks}; no alpha, so scale 1")
    for note in lora["notes"]:
        yield from _format_row("", note)
    if lora["image_layers"]:
        yield from _format_row("", f"{lora['image_layers']} targets are of image-to-video models only")
    if lora["unknown"]:
        examples = ", ".join(lora["examples"])
        yield from _format_row(
            "skipped", f"{lora['unknown']} keys that belong to no Wan transformer: {examples}"
        )


def _dtype_name(dtype: str) -> str:
    return DTYPES.get(dtype) or (f"fp{dtype[1:]}" if dtype in ("F16", "F32", "F64") else dtype)


def _relative_path(file: str, folder: Path) -> str:
    path = Path(file)
    return str(path.relative_to(folder)) if path.is_relative_to(folder) else file


def _format_row(label: str, value: str) -> Iterator[str]:
    yield from textwrap.wrap(
        make_printable(value),
        COLUMNS,
        initial_indent=f"  {label:<{LABEL - 2}}",
        subsequent_indent=" " * LABEL,
        break_on_hyphens=False,
        break_long_words=False,
    )
