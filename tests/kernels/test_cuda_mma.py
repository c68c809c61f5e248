"""Every case in 16 bits by ``mma.sync``, on a card whose calls ``wgmma`` serves."""

import pytest

import attn_numba as an
from attn_numba.testing import check_attention
from cases import CASES

AVAILABLE, REASON = an.backends()["cuda"]
if not AVAILABLE:
    pytest.skip(f"backend 'cuda' cannot run: {REASON}", allow_module_level=True)
launches = pytest.importorskip("launches", reason="the folder benchmarks is not beside the tests")
if "wgmma" not in launches.modules():
    pytest.skip("the simulator has no tensor cores", allow_module_level=True)

from attn_numba.gpu import driver  # noqa: E402

CAPABILITY = driver.card(0).capability
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        launches.expected("bfloat16", CAPABILITY) != "wgmma", reason="mma serves this card's calls by itself"
    ),
]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case(case, dtype):
    *arrays, kwargs = case.build(dtype)
    with launches.Without("wgmma"), launches.recorded() as started:
        check_attention(*arrays, "cuda", name=case.name, **kwargs)
    assert "wgmma" not in started
