"""Exact products whatever the user allows, and torch's settings back as they were."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext

import pytest
import torch

from trimtab.spectral import exact_products, leading, without_autocast
from trimtab.watch.signals.sigmas import SigmaTracker
from trimtab.watch.signals.spectra import qk_energy

matmul, cpu = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
pytestmark = pytest.mark.skipif(not hasattr(matmul, "fp32_precision"), reason="sets what torch has from 2.9 on")

SETTINGS: dict[str, Callable[[], None]] = {
    "untouched": lambda: None,
    "highest": lambda: torch.set_float32_matmul_precision("highest"),
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "allow_tf32": lambda: setattr(matmul, "allow_tf32", True),
    "everywhere": lambda: setattr(torch.backends, "fp32_precision", "tf32"),
    "on CUDA": lambda: setattr(matmul, "fp32_precision", "tf32"),
    "on the CPU": lambda: setattr(cpu, "fp32_precision", "bf16"),
    "tf32 on the CPU": lambda: setattr(cpu, "fp32_precision", "tf32"),
}


@pytest.fixture(params=SETTINGS)
def setting(request: pytest.FixtureRequest) -> Iterator[None]:
    SETTINGS[request.param]()
    yield
    reset()


def reset() -> None:
    torch.set_float32_matmul_precision("highest")
    torch.backends.fp32_precision = matmul.fp32_precision = cpu.fp32_precision = "none"


def told(read: Callable[[], object]) -> object:
    try:
        return read()
    except RuntimeError:  # torch refuses to read the older interface where the newer one says otherwise
        return "refused"


def settings() -> list[object]:
    older = [told(torch.get_float32_matmul_precision), told(lambda: matmul.allow_tf32)]
    return [*older, matmul.fp32_precision, cpu.fp32_precision, torch.backends.fp32_precision]


@pytest.mark.usefixtures("setting")
def test_settings_are_exact_inside_and_as_before_afterwards() -> None:
    before = settings()
    with exact_products("cpu"):
        assert {matmul.fp32_precision, cpu.fp32_precision} <= {"ieee", "none"}
        assert torch.get_float32_matmul_precision() == "highest"
        assert not matmul.allow_tf32
        inside = settings()
        with exact_products("cpu"):
            assert settings() == inside
    assert settings() == before
    with pytest.raises(KeyError), exact_products("cpu"):
        raise KeyError
    assert settings() == before


@pytest.mark.parametrize("name", SETTINGS)
def test_what_is_inherited_still_is_afterwards(name: str) -> None:
    found = []
    for measured in (False, True):
        SETTINGS[name]()
        try:
            with exact_products("cpu") if measured else nullcontext():
                pass
            told_later = []
            for everywhere in ("tf32", "ieee"):
                torch.backends.fp32_precision = everywhere
                told_later.append(settings())
            found.append(told_later)
        finally:
            reset()
    assert found[0] == found[1]


def test_autocast_is_off_inside() -> None:
    x = torch.randn(3, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for context in (exact_products("cpu"), without_autocast(x)):
            with context:
                assert (x @ x).dtype == torch.float32
            assert (x @ x).dtype == torch.bfloat16
    for context in (exact_products("meta"), without_autocast(x.to("meta"))):
        with context:
            assert (x @ x).dtype == torch.float32


def test_every_measurement_is_exact() -> None:
    """On a CPU without bfloat16 units no number would show it: what decides is asked at every product."""
    seen: list[str] = []

    class Notes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.mv):
                seen.append(cpu.fp32_precision)
            return function(*args, **(kwargs or {}))

    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(200, 150, generator=generator)
    tracker = SigmaTracker()
    torch.set_float32_matmul_precision("medium")
    try:
        with Notes():
            for measure in (
                lambda: leading(weight, 1),
                lambda: tracker.read({"w": weight}),
                lambda: tracker.read({"w": weight}),
                lambda: qk_energy(weight[None, :64], weight[None, :64]),
            ):
                seen.clear()
                measure()
                assert seen
                assert set(seen) == {"ieee"}
    finally:
        reset()
