"""Attention backends against torch's plain one, and what is refused before anything is loaded."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracles import relative_error
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from wancli.errors import MachineError
from wancli.models.attention import TORCH_BACKENDS, attend, choose_backend
from wancli.models.config import AttentionBackend, ComputeOptions, WanConfig
from wancli.models.dit import Request, WanModel

CONFIG = WanConfig(dim=96, ffn_dim=80, num_heads=3, num_layers=2, text_dim=32, freq_dim=64)
ON_CPU: tuple[AttentionBackend, ...] = ("flash", "math")


def velocity(kernels: ComputeOptions) -> Tensor:
    """Of a model whose weights and latent are the same each time."""
    torch.manual_seed(0)
    model = WanModel(CONFIG, kernels).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    with torch.inference_mode():
        mix = ((model.project(torch.randn(5, 32)), 1.0),)
        (found,) = model.predict_velocities([Request(torch.randn(1, 16, 2, 8, 6), 500.0, [mix] * 2)])
    return found


class Called(TorchDispatchMode):
    """The names of the operators that really run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **kwargs or {})


def ran(called: Called) -> str:
    flash = any("flash_attention_for_cpu" in name for name in called.names)
    return "flash_attention" if flash else "math"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("only", [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH])
@torch.no_grad()
def test_the_named_attention_backend_is_the_one_that_runs(only: SDPBackend, bias: bool, dtype: torch.dtype):
    q = torch.randn(1, 2, 300, 128, dtype=dtype)
    with sdpa_kernel(only):
        named = choose_backend("cpu", dtype, 128, bias=bias)
        with Called() as called:
            F.scaled_dot_product_attention(q, q, q, q.new_zeros(1, 1, 1, 300) if bias else None)
    assert named == ran(called) == only.name.lower()


@pytest.mark.parametrize("asked", ON_CPU)
@torch.no_grad()
def test_the_backend_asked_for_is_the_one_that_runs(asked: AttentionBackend):
    q = torch.randn(1, 2, 300, 32)
    with Called() as called:
        attend(q, q, q, asked)
    assert (
        ran(called)
        == choose_backend("cpu", torch.float32, 32, requested=asked)
        == TORCH_BACKENDS[asked].name.lower()
    )


@pytest.mark.parametrize("chunk", [None, 7])
@pytest.mark.parametrize("asked", ["auto", *ON_CPU])
def test_every_backend_of_the_cpu_gives_the_same_velocity(asked: AttentionBackend, chunk: int | None):
    assert relative_error(velocity(ComputeOptions(asked, chunk)), velocity(ComputeOptions("math"))) < 1e-6


def test_cross_attention_is_torchs_own_choice_whatever_is_asked():
    assert choose_backend("cpu", torch.float32, 32, bias=True, requested="math") == "flash_attention"
    q = torch.zeros(1, 1, 2, 8)
    with pytest.raises(ValueError, match="math takes no bias"):
        attend(q, q, q, "math", torch.zeros(2))


class Fake(ModuleType):
    """A package that computes attention with torch and notes the shapes it was handed."""

    def __init__(self, name: str, heads_at: int, returns_tuple: bool = False) -> None:
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None)
        self.heads_at, self.returns_tuple = heads_at, returns_tuple
        self.seen: list[tuple[tuple[int, ...], ...]] = []
        self.said: list[dict[str, Any]] = []

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, **said: Any) -> Any:
        self.seen.append((tuple(q.shape), tuple(k.shape), tuple(v.shape)))
        self.said.append(said)
        q, k, v = (x.transpose(1, self.heads_at) for x in (q, k, v))  # heads first
        scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
        y = (scores.softmax(-1) @ v).transpose(1, self.heads_at).contiguous()
        return (y, scores.logsumexp(-1)) if self.returns_tuple else y

    flash_attn_func = sageattn = _attend


FAKES: dict[AttentionBackend, Fake] = {
    "flash-attn-2": Fake("flash_attn", 2),
    "flash-attn-3": Fake("flash_attn_interface", 2, returns_tuple=True),
    "sage": Fake("sageattention", 1),
}


@pytest.mark.parametrize("chunk", [None, 7])
@pytest.mark.parametrize("asked", FAKES)
def test_packages_get_their_layout_and_the_scale_of_a_head(
    asked: AttentionBackend, chunk: int | None, monkeypatch: pytest.MonkeyPatch
):
    fake = FAKES[asked]
    fake.seen.clear()
    fake.said.clear()
    monkeypatch.setitem(sys.modules, fake.__name__, fake)
    assert relative_error(velocity(ComputeOptions(asked, chunk)), velocity(ComputeOptions("math"))) < 1e-6
    tokens, piece = 2 * 4 * 3, chunk or 24
    layout = (1, 3, tokens, 32) if fake.heads_at == 1 else (1, tokens, 3, 32)
    first = (1, 3, piece, 32) if fake.heads_at == 1 else (1, piece, 3, 32)
    assert fake.seen[0] == (first, layout, layout)
    assert len(fake.seen) == 2 * -(-tokens // piece)  # the self-attentions of two blocks
    assert fake.said[0] == ({"tensor_layout": "HND"} if asked == "sage" else {})


def gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a card")


@pytest.mark.parametrize("asked", FAKES)
def test_a_package_is_named_where_it_can_run(asked: AttentionBackend, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, FAKES[asked].__name__, FAKES[asked])
    gpu(monkeypatch, (9, 0))
    assert choose_backend("cuda", torch.bfloat16, 128, requested=asked) == asked


@pytest.mark.parametrize(
    ("asked", "device", "dtype", "head_dim", "capability", "why"),
    [
        ("flash-attn-2", "cpu", torch.bfloat16, 128, (9, 0), "runs on CUDA only, not on cpu"),
        ("sage", "cuda", torch.float32, 128, (9, 0), "computes in bf16 or fp16, not in fp32"),
        ("sage", "cuda", torch.float16, 256, (9, 0), "head_dim up to 128 in steps of 8, the model has 256"),
        (
            "flash-attn-2",
            "cuda",
            torch.float16,
            12,
            (9, 0),
            "to 256 in steps of 8, the model has 12",
        ),
        ("flash-attn-3", "cuda", torch.bfloat16, 128, (8, 9), "needs compute capability 9.0, a card has 8.9"),
    ],
)
def test_a_package_that_cannot_run_is_refused_with_the_reason(
    asked: AttentionBackend,
    device: str,
    dtype: torch.dtype,
    head_dim: int,
    capability: tuple[int, int],
    why: str,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setitem(sys.modules, FAKES[asked].__name__, FAKES[asked])
    gpu(monkeypatch, capability)
    with pytest.raises(MachineError, match=why):
        choose_backend(device, dtype, head_dim, requested=asked)


@pytest.mark.parametrize("asked", FAKES)
def test_a_package_that_is_not_installed_is_refused_with_how_to_install_it(asked: AttentionBackend):
    with pytest.raises(MachineError, match=f"'{asked}' is not available: .* is not installed") as caught:
        choose_backend("cpu", torch.bfloat16, 128, requested=asked)
    assert "install" in caught.value.hint


@pytest.mark.parametrize("asked", ["efficient", "cudnn"])
def test_a_backend_that_torch_does_not_support_here_is_refused(asked: AttentionBackend):
    with pytest.raises(MachineError, match=f"'{asked}' is not available: torch does not support it for fp32"):
        choose_backend("cpu", torch.float32, 32, requested=asked)
