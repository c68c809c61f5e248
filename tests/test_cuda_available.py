"""Whether CUDA can run, with the reason why not; the card as the driver has it; and calls in Numba's simulator."""

from __future__ import annotations

import importlib.util
import re

import numpy as np
import pytest

import attn_numba as an
from attn_numba import api
from simulation import run_simulated

if importlib.util.find_spec("numba_cuda") is None or importlib.util.find_spec("cuda") is None:
    pytest.skip("numba-cuda is not installed", allow_module_level=True)

from numba import config

if config.ENABLE_CUDASIM:
    pytest.skip("Numba simulates CUDA in this process", allow_module_level=True)

from attn_numba.gpu import availability, driver
from fake_card import FakeCard

# --- whether there is a card ---


@pytest.fixture
def machine(monkeypatch):
    """A machine with a card, a driver and a toolkit, to take things away from."""
    card = FakeCard()
    monkeypatch.setattr(driver, "card_count", lambda: 1)
    monkeypatch.setattr(driver, "card", lambda index: card)
    monkeypatch.setattr(driver, "oldest_capability", lambda: (7, 5))
    monkeypatch.setattr(availability, "missing_compiler", lambda: "")
    monkeypatch.delenv(availability.CARRIED, raising=False)
    return card


def test_a_machine_with_all(machine):
    assert availability.availability() == (True, "fake card 0, compute capability 9.0")
    assert an.backends()["cuda"] == (True, "fake card 0, compute capability 9.0")


def failing(message):
    def fail(*arguments):
        raise RuntimeError(message)

    return fail


def test_reasons_why_there_is_no_cuda(machine, monkeypatch):
    def reason(**changes):
        with monkeypatch.context() as patch:
            for name, value in changes.items():
                patch.setattr(availability if hasattr(availability, name) else driver, name, value)
            available, found = availability.availability()
        assert not available
        return found

    assert "numba-cuda is not installed: install attn-numba[cuda13]" in reason(
        _is_installed=lambda m: m != "numba_cuda"
    )
    assert "cuda-core is not installed" in reason(_is_installed=lambda m: m != "cuda.core")
    assert "no NVIDIA driver that works: no libcuda" in reason(card_count=failing("no libcuda\nand more"))
    assert "finds no card" in reason(card_count=lambda: 0)
    assert "does not start: in use" in reason(card=failing("in use"))
    assert "no CUDA toolkit to compile for it: nvvm is missing" in reason(missing_compiler=lambda: "nvvm is missing")
    machine.capability = (7, 0)
    assert "too old: fake card 0, compute capability 7.0" in reason()


def test_machine_code_made_elsewhere_needs_no_toolkit(machine, monkeypatch):
    monkeypatch.setattr(availability, "missing_compiler", lambda: "nvvm is missing")
    monkeypatch.setenv(availability.CARRIED, "kernels")
    assert availability.availability()[0]


def test_a_missing_driver_is_named_where_cuda_is_asked_for(machine, monkeypatch):
    monkeypatch.setattr(driver, "card_count", failing("no libcuda"))
    api.cuda_engine.cache_clear()
    with pytest.raises(NotImplementedError, match="no NVIDIA driver that works: no libcuda; .*'cpu' and 'reference'"):
        an.attention(*np.zeros((3, 4, 8)), backend="cuda")


def test_a_forked_process_is_told_what_to_do(monkeypatch):
    monkeypatch.setattr(driver, "_started_in", [-1])
    with pytest.raises(RuntimeError, match="start processes by 'spawn'"):
        driver.card_count()


class Bindings:
    """The driver's functions that a `Card` calls, of one context at a time."""

    class CUctx:
        def __init__(self, name):
            self.name = name

        def __index__(self):
            return self.name

        __int__ = __index__

    def __init__(self, current=0):
        self.now, self.sets, self.fail = self.CUctx(current), [], None

    def cuCtxGetCurrent(self):
        return 0, self.now

    def cuCtxSetCurrent(self, context):
        self.now = context
        self.sets.append(int(context))
        return (0,)

    def cuCtxSynchronize(self):
        return (self.fail or 0,)


@pytest.fixture
def real_card(monkeypatch):
    bindings = Bindings()
    monkeypatch.setattr(driver, "_bindings", lambda: bindings)
    card = object.__new__(driver.Card)
    card.index, card.name, card._context = 0, "a card", Bindings.CUctx(7)
    return card, bindings


def test_a_card_is_current_for_a_block_alone(real_card):
    card, bindings = real_card

    def fail():
        with card.current(), card.current():  # where it is the current one already, nothing is to be done
            assert int(bindings.now) == 7
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert bindings.sets == [7, 0]


def test_errors_of_the_driver_are_named(real_card):
    from enum import IntEnum

    card, bindings = real_card
    bindings.fail = IntEnum("CUresult", {"CUDA_ERROR_ILLEGAL_ADDRESS": 700}).CUDA_ERROR_ILLEGAL_ADDRESS
    with pytest.raises(
        RuntimeError, match="the CUDA driver reports CUDA_ERROR_ILLEGAL_ADDRESS while a card was computing"
    ):
        card.synchronize()


# --- in the simulator ---

COMPARE = """
import sys
from attn_numba import cli
sys.exit(cli.main(sys.argv[1:] + ["--sizes", "1", "2", "1", "5", "6", "4", "3", "--repeat", "1", "--quiet"]))
"""


@pytest.mark.parametrize(
    "rules",
    [
        ("--causal", "--soft-cap", "2", "--query-offset", "1"),
        ("--score", "cosine", "--normalizer", "sparsemax"),
    ],
)
def test_compare_lists_all_three_backends_in_the_simulator(rules):
    text = "\n".join(run_simulated(f"import sys; sys.argv[1:] = ['compare', *{rules!r}]\n{COMPARE}", COLUMNS="200"))
    for name in ("reference", "cpu", "cuda"):
        assert re.search(rf"\b{name}\b", text)
    assert "skipped" not in text
    assert "FAILED" not in text


SIMULATED = """
import numpy as np
import attn_numba as an

random = np.random.default_rng(0)
q, k, v = (random.standard_normal(shape, dtype=np.float32) for shape in ((2, 5, 4), (1, 6, 4), (1, 6, 3)))
for backend in ("cpu", "cuda"):
    out = np.full((2, 5, 6), np.nan, np.float32)[..., ::2]
    rules = {"normalizer": an.Softmax(0.5), "mask": an.Causal(), "query_offset": 1, "dropout": an.Dropout(0.5, 3)}
    found = an.attention(q, k, v, out=out, return_lse=True, return_weights=True, backend=backend, **rules)
    assert found.out is out
    expected = an.attention(q, k, v, return_lse=True, return_weights=True, backend="reference", **rules)
    for one, other in zip(found, expected):
        assert one.shape == other.shape and np.allclose(one, other, atol=2e-6), backend
    none = an.attention(q, k[:, :0], v[:, :0], backend=backend, return_lse=True, return_weights=True)
    assert (none.out == 0).all() and (none.lse == -np.inf).all() and none.weights.shape == (2, 5, 0)
    for rows in (q[:, :0], q[None][:0]):
        keys = (k, v) if rows.ndim == 3 else (k[None][:0], v[None][:0])
        assert an.attention(rows, *keys, backend=backend).shape == (*rows.shape[:-1], 3)
    half = [x.astype(np.float16) for x in (q, k, v)]
    found, expected = (an.attention(*half, backend=name) for name in (backend, "reference"))
    assert found.dtype == np.float16 and abs(found.astype(float) - expected).max() < 2e-3
print(an.backends()["cuda"], an.config_report()["gpu"]["float16"])
"""


def test_calls_in_the_simulator_beside_those_of_the_cpu():
    text = "\n".join(run_simulated(SIMULATED))
    assert "Numba's simulator" in text
    assert "general" in text
