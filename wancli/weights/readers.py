"""Files -> named tensors -> networks. The only place that opens weights.

A network is built on the meta device, where tensors have a shape and no storage, and then takes
over the tensors read: mapped from the file where the dtype fits, converted one at a time where not.
So weights are never in memory twice.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from wancli.errors import CheckpointError
from wancli.models.dit import WanModel
from wancli.models.vae import WanVAE
from wancli.weights.headers import DOWNLOAD_AGAIN, header
from wancli.weights.identify import Checkpoint
from wancli.weights.parts import Part
from wancli.weights.sizes import vae_config

LISTED = 10  # tensors named in one message; the rest are counted
KEPT_FP32 = ("norm", "modulation", "time_", "text_embedding", "patch_embedding", "head.")


def tensors(files: Sequence[Path]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the files, by name, mapped from disk: pages are read when touched.

    Raises CheckpointError for a damaged file and for a pickle that wants to run code.
    """
    for path in files:
        yield from _from_safetensors(path) if path.suffix == ".safetensors" else _from_pickle(path)


def own_tensors(part: Part) -> Iterator[tuple[str, Tensor]]:
    """The tensors of one network under its own names, without what else the files hold."""
    for name, tensor in tensors(part.files):
        if (own := part.own_name(name)) is not None:
            yield own, tensor


def load_into(
    module: nn.Module,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    rename: Callable[[str], str],
    dtype: torch.dtype,
    device: torch.device | str,
    keep_fp32: Callable[[str], bool],
    where: str,
) -> None:
    """Gives a module built on the meta device its tensors, in `dtype` but for those kept in fp32.

    Strict: a missing, unexpected or mis-shaped tensor raises CheckpointError, with the list, before
    any tensor is converted or assigned. `rename` maps a name in the file to the module's own,
    `keep_fp32` is asked with the latter.
    """
    wanted = module.state_dict()
    found = {rename(name): tensor for name, tensor in tensors}
    problems = [f"missing {name}" for name in wanted.keys() - found.keys()]
    problems += [f"unexpected {name}" for name in found.keys() - wanted.keys()]
    problems += [
        f"{name} is {list(found[name].shape)}, expected {list(wanted[name].shape)}"
        for name in found.keys() & wanted.keys()
        if found[name].shape != wanted[name].shape
    ]
    if problems:
        more = [f"and {len(problems) - LISTED} more"] if len(problems) > LISTED else []
        raise CheckpointError(
            "the tensors do not fit the model: " + "; ".join(sorted(problems)[:LISTED] + more),
            where=where,
            hint="the file belongs to another model or is damaged; compare it with config.json",
        )
    for name in wanted:
        kept = torch.float32 if keep_fp32(name) else dtype
        found[name] = found[name].to(device=device, dtype=kept)
    module.load_state_dict(found, assign=True)


def load_transformer(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device | str) -> WanModel:
    """The diffusion transformer of a checkpoint, ready to run. In half precision everything outside
    the large matrices of the blocks stays fp32."""
    with torch.device("meta"):
        model = WanModel(checkpoint.transformer)
    load_into(
        model,
        own_tensors(checkpoint.experts[-1]),
        rename=str,
        dtype=dtype,
        device=device,
        keep_fp32=lambda name: any(part in name for part in KEPT_FP32),
        where=str(checkpoint.transformer_files[0].parent),
    )
    return model.eval()


def load_vae(checkpoint: Checkpoint, device: torch.device | str) -> WanVAE:
    """The VAE of a checkpoint, in fp32 as the official code runs it; its sizes are read off its tensors."""
    where = str(checkpoint.vae.files[0])
    found = dict(own_tensors(checkpoint.vae))
    with torch.device("meta"):
        vae = WanVAE(vae_config({name: tuple(tensor.shape) for name, tensor in found.items()}, where))
    load_into(
        vae,
        found.items(),
        rename=str,
        dtype=torch.float32,
        device=device,
        keep_fp32=lambda _: True,
        where=where,
    )
    return vae.eval()


def _from_safetensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    header(path)
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - a safetensors handle is not a mapping
                yield name, file.get_tensor(name)
    except SafetensorError as error:
        raise CheckpointError(str(error), where=str(path), hint=DOWNLOAD_AGAIN) from error


def _from_pickle(path: Path) -> Iterator[tuple[str, Tensor]]:
    _check_zip(path)
    try:
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            "its pickle asks to run code, which wancli refuses",
            where=str(path),
            hint="download the official file, or save the weights as .safetensors where you trust them",
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        raise CheckpointError(f"damaged: {error}", where=str(path), hint=DOWNLOAD_AGAIN) from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError("not a plain table of named tensors", where=str(path), hint=DOWNLOAD_AGAIN)
    yield from state.items()


def _check_zip(path: Path) -> None:
    """A .pth is an uncompressed zip: what unpacks to more than the file holds is an attack."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except FileNotFoundError:
        raise CheckpointError("no such file", where=str(path), hint=DOWNLOAD_AGAIN) from None
    except zipfile.BadZipFile as error:
        raise CheckpointError(
            "truncated, or not a PyTorch file of this decade", where=str(path), hint=DOWNLOAD_AGAIN
        ) from error
    compressed = any(member.compress_type != zipfile.ZIP_STORED for member in members)
    if compressed or sum(member.file_size for member in members) > path.stat().st_size:
        raise CheckpointError(
            "its members unpack to more than the file holds; PyTorch does not write such files",
            where=str(path),
            hint=DOWNLOAD_AGAIN,
        )
