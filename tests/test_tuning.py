"""Profiles of kernels: no choice changes a bit, only profiles of this machine are used, gains are told from noise."""

import itertools
import json
import os
import warnings

import numpy as np
import pytest

import attn_numba as an
from attn_numba import profiles, tuning
from attn_numba.cli import main
from attn_numba.cpu import choices
from attn_numba.cpu.choices import Choice, ideas, is_valid, shape_class, together, usual, usual_of
from attn_numba.cpu.plan import plan_of, unit_of
from attn_numba.rules import Sizes
from attn_numba.tuning import Effort, ratios_of, tune, tuned
from attn_numba.workloads import WORKLOADS
from combinations import BACKENDS
from processes import run_python

pytestmark = pytest.mark.skipif("cpu" not in BACKENDS, reason="profiles are of the cpu backend")

FORWARD = "forward float32 4x1x256x256 D64 E64, 2 threads, {}"
BACKWARD = "backward float32 4x1x256x256 D64 E64, 2 threads, {}"


@pytest.fixture(autouse=True)
def _as_usual():
    yield
    an.use_profile(None)


def every(name):
    """All single ideas for a class, and all of them at once."""
    found = [choice for idea in ideas(name) for choice in idea]
    last = usual_of(name)
    for idea in ideas(name):
        last = together(last, idea[-1], name)
    return [*found, last]


def mask_of(name, M, N):
    """A mask of each kind: none, by a tile hook, by lists of runs, and one that hides values that are not finite."""
    return {
        "full": {},
        "masked": {"mask": an.Causal(), "modifiers": an.SoftCap(5.0), "query_offset": N - M},
        "runs": {"mask": an.SlidingWindow(40, 3), "query_offset": N - M},
        "grid": {"mask": an.Neighborhood((16, 16), (5, 5))},
    }[name]


def bits(results):
    return [None if x is None else x.tobytes() for x in results]


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["full", "masked", "runs", "grid"])
def test_no_choice_changes_a_bit_of_the_output_and_the_lse(kind, dtype):
    rng = np.random.default_rng(0)
    number = pytest.importorskip("ml_dtypes").bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    M, N, (D, E) = (256, 256, (33, 24)) if kind == "grid" else (131, 420, (48, 80))
    q, k, v = (rng.standard_normal(s).astype(number) for s in ((1, 4, M, D), (1, 2, N, D), (1, 2, N, E)))
    if kind == "masked":
        k[:, :, -3:], v[:, :, -3:] = np.nan, np.inf  # seen by some rows and not by others
    usual_bits, used = None, set()
    for count, choice in itertools.product((1, 2), (None, *every(FORWARD.format("full")))):
        with an.threads(count), profiles.trying(choice) as trial:
            found = bits(an.attention(q, k, v, return_lse=True, backend="cpu", **mask_of(kind, M, N)))
        usual_bits = usual_bits or found
        assert found == usual_bits, choice
        used |= set(trial.asked)
    assert len(used) == 2
    assert all(name.startswith(f"forward {dtype} ") for name in used)
    assert all(name.endswith({"full": "full", "grid": "runs"}.get(kind, "masked")) for name in used)


def test_no_choice_changes_a_bit_of_the_weights():
    rng = np.random.default_rng(1)
    q, k, v = (rng.standard_normal((2, 70, 32)).astype(np.float32) for _ in range(3))
    expected = bits(an.attention(q, k, v, mask=an.Causal(), return_weights=True, backend="cpu"))
    for choice in every(FORWARD.format("full")):
        with profiles.trying(choice):
            assert bits(an.attention(q, k, v, mask=an.Causal(), return_weights=True, backend="cpu")) == expected


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_no_choice_changes_a_bit_of_gradients(dtype):
    rng = np.random.default_rng(2)
    q, k, v, dout = (rng.standard_normal((2, 3, 900, 24)).astype(dtype) for _ in range(4))  # several tiles of keys
    bias = an.Bias(rng.standard_normal((900, 900)).astype(dtype))  # its gradient is summed over sequences and heads
    rules = {"mask": an.Causal(), "modifiers": [bias, an.SoftCap(9.0)]}
    expected = None
    for count, by_heads in itertools.product((1, 2, 3), (False, True)):
        with an.threads(count), profiles.trying(usual("full")._replace(by_heads=by_heads)):
            found = an.attention_vjp(q, k, v, dout, backend="cpu", **rules)
        found = bits((found.q, found.k, found.v, found.of(bias)))
        expected = expected or found
        assert found == expected


def test_choices_reach_the_plan():
    sizes = Sizes(1, 4, 4, 2048, 2048, 64, 64)
    unit = unit_of("float32", False)
    layouts = {plan_of(unit, sizes, 2, True, 0, choice).layout for choice in every(FORWARD.format("full"))}
    assert len(layouts) > 0.7 * len(every(FORWARD.format("full")))


def test_every_idea_is_valid_and_nothing_else():
    for kind in ("full", "masked", "runs"):
        for name in (FORWARD.format(kind), BACKWARD.format(kind)):
            assert all(is_valid(choice, name) for choice in every(name))
    name, start = FORWARD.format("full"), Choice()
    for wrong in ({"group_rows": 20}, {"block_rows": 0}, {"items": 0}, {"tile_rows": 7}, {"by_heads": 2}):
        assert not is_valid(start._replace(**wrong), name)
    if (6, 4) in choices.tile_shapes():
        assert not is_valid(start._replace(tile_rows=6, tile_vectors=4, group_rows=32), name)
    assert not is_valid(start._replace(group_rows=16), BACKWARD.format("full"))  # fixes the order of sums there


def test_classes_round_lengths_up_and_tell_calls_apart():
    sizes = Sizes(1, 12, 12, 1000, 1000, 60, 64)
    name = shape_class("forward", "float32", sizes, 1, "masked")
    assert name == "forward float32 16x1x1024x1024 D64 E64, 1 thread, masked"
    assert shape_class("forward", "float32", sizes._replace(M=1024, N=513), 1, "masked") == name
    for other in (sizes._replace(M=1025), sizes._replace(H=24), sizes._replace(D=80)):
        assert shape_class("forward", "float32", other, 1, "masked") != name
    assert shape_class("forward", "float32", sizes, 2, "masked") != name


# --- files ---


def profile(tmp_path, **changed):
    """Write a profile of this machine with one choice, and change what is to be wrong with it."""
    path = tmp_path / "profile.json"
    name = shape_class("forward", "float32", Sizes(1, 2, 2, 64, 64, 16, 16), 1, "full")
    profiles.write_profile(path, {name: Choice(group_rows=16)}, [{"workload": "none"}], overwrite=True)
    content = json.loads(path.read_text())
    for key, value in changed.items():
        where = content
        *parents, last = key.split("__")
        for parent in parents:
            where = where[parent]
        where[last] = value
    path.write_text(json.dumps(content))
    return path, name


def test_a_profile_is_used_when_asked_for_and_reported(tmp_path):
    path, name = profile(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert an.use_profile(path)
    assert profiles.active() == {name: Choice(group_rows=16)}
    assert an.config_report()["profile"]["file"] == (str(path), "attn_numba.use_profile")
    assert choices.chosen("forward", "float32", Sizes(1, 2, 2, 64, 64, 16, 16), 1, "full").group_rows == 16
    assert choices.chosen("forward", "float32", Sizes(1, 2, 2, 64, 64, 16, 16), 2, "full") == usual("full")
    assert choices.chosen("forward", "float32", Sizes(1, 2, 2, 64, 64, 16, 16), 1, "runs") == usual("runs")
    assert not an.use_profile(None)
    assert choices.chosen("forward", "float32", Sizes(1, 2, 2, 64, 64, 16, 16), 1, "full") == usual("full")


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"processor__name": "z80"}, "measured elsewhere: its processor has name 'z80'"),
        ({"processor__features": ["mmx"]}, "its processor has features other features"),
        ({"versions__numba": "0.1"}, "its versions has numba '0.1'"),
        ({"version": 99}, "is of version 99; this library reads 1"),
        ({"format": "recipe"}, "is no profile of kernels"),
        ({"choices": {"forward float32, full": {"group_rows": 7}}}, "is damaged: 'forward float32, full'"),
        ({"choices": {"forward float32, full": {"speed": 7}}}, "is damaged"),
        ({"choices": {"forward float32, full": {"group_rows": 16.0}}}, "is damaged"),
        ({"choices": [1, 2]}, "is damaged"),
        ({"processor": 5}, "is damaged"),
    ],
)
def test_a_foreign_or_damaged_profile_is_ignored_with_one_warning(tmp_path, changed, reason):
    path, _ = profile(tmp_path, **changed)
    x = np.eye(4, dtype=np.float32)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert not an.use_profile(path)
        an.attention(x, x, x, backend="cpu")
    (warning,) = caught
    assert warning.category is RuntimeWarning
    assert str(path) in str(warning.message)
    assert reason in str(warning.message)
    assert profiles.active() is None
    assert "ignored" in an.config_report()["profile"]["file"][1]


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe", b"[]", b"null", b"[" * 100_000])
def test_a_file_that_is_no_profile_is_ignored(tmp_path, data):
    path = tmp_path / "profile.json"
    path.write_bytes(data)
    with pytest.warns(RuntimeWarning, match="calls are computed as usual"):
        assert not an.use_profile(path)


def test_arguments_of_use_profile(tmp_path):
    with pytest.raises(TypeError, match="path is int; needed the name of a file or None"):
        an.use_profile(5)
    with pytest.raises(FileNotFoundError, match=r"missing\.json"):
        an.use_profile(tmp_path / "missing.json")


CODE = """
import warnings
import numpy as np
import attn_numba as an
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    x = np.eye(4, dtype=np.float32)
    for _ in range(3):
        an.attention(x, x, x, backend="cpu")
print(len(caught), an.config_report()["profile"]["file"])
"""


def test_the_environment_names_a_profile(tmp_path):
    path, _ = profile(tmp_path)
    environment = dict(os.environ)
    for named, expected in (
        (str(path), f"0 ({str(path)!r}, 'ATTN_NUMBA_PROFILE')"),
        (str(tmp_path / "missing.json"), "1 (None, 'ATTN_NUMBA_PROFILE names"),
    ):
        assert expected in run_python(CODE, ATTN_NUMBA_PROFILE=named)
    assert os.environ == environment


# --- the search ---


@pytest.fixture
def slowed(monkeypatch):
    """Return what makes calls that take as long as a function of the choice says, by a clock that only they move."""
    now = 0.0
    monkeypatch.setattr(tuning, "thread_time", lambda: now)

    def slow(seconds_of):
        def call():
            nonlocal now
            now += seconds_of(choices.chosen("forward", "float32", Sizes(1, 4, 4, 256, 256, 64, 64), 1, "full"))
            return (np.zeros(3),)

        return call

    return slow


NAME = FORWARD.format("full").replace("2 threads", "1 thread")


def test_the_search_finds_what_is_faster(slowed):
    call = slowed(lambda choice: 0.001 * (0.8 if choice.by_heads else 1.0) * (0.7 if choice.block_rows == 256 else 1.0))
    with an.threads(1):
        found = tune(call, NAME, Effort(0.0, 3, 3))
    assert found.changed == {"by_heads": 1, "block_rows": 256}
    assert found.gain == found.found == pytest.approx(1 / 0.56)


def test_the_search_keeps_the_usual_where_nothing_is_faster(slowed):
    with an.threads(1):
        found = tune(slowed(lambda choice: 0.001), NAME, Effort(0.0, 3, 3))
    assert (found.choice, found.changed, found.gain) == (usual("full"), {}, 1.0)


def test_a_choice_that_changed_bits_would_be_reported(slowed):
    faster = slowed(lambda choice: 0.0005 if choice.by_heads else 0.001)

    def call():
        faster()
        return (np.full(2, choices.chosen("forward", "float32", Sizes(1, 4, 4, 256, 256, 64, 64), 1, "full").by_heads),)

    with an.threads(1), pytest.raises(RuntimeError, match="changes the result of a call"):
        tune(call, NAME, Effort(0.0, 3, 3))


def test_ratios_are_of_the_first_choice_over_the_others(slowed):
    start = usual("full")
    call = slowed(lambda choice: 0.002 if choice == start else 0.001)
    with an.threads(1):
        seconds, (same, other) = ratios_of(call, [start, start, start._replace(items=8)], Effort(0.0, 3, 3))
    assert seconds == pytest.approx(0.002)
    assert same == pytest.approx([1.0] * len(same))
    assert other == pytest.approx([2.0] * len(other))


def test_workloads_have_classes_of_their_own_and_are_measured_once():
    small = [WORKLOADS[name].small() for name in ("gpt2", "gpt2", "neighborhood")]
    with an.threads(1):
        found = list(tuned(small, np.dtype("float32"), effort=Effort(0.0, 1, 1)))
    assert [one.workload for one in found] == [
        "gpt2-smoke, forward", "gpt2-smoke, backward", "neighborhood-smoke, forward", "neighborhood-smoke, backward",
    ]  # fmt: skip
    assert [one.shape_class.split()[0] for one in found] == ["forward", "backward"] * 2
    assert not list(tuned(small, np.dtype("float16"), ["backward"]))
    with pytest.raises(ValueError, match="passes has 'sideways'; needed forward or backward"):
        list(tuned(small, np.dtype("float32"), ["sideways"]))


def test_the_command_writes_a_profile_that_is_used(tmp_path, capsys, monkeypatch):
    path = tmp_path / "profile.json"
    monkeypatch.setattr(tuning, "LEAST_GAIN", -1.0)  # so that some choice is kept, whatever it is worth
    monkeypatch.setattr("attn_numba.tune_kernels_command.QUICK", Effort(0.0, 1, 1))
    arguments = ["tune-kernels", "gpt2", "--small", "--quick", "--threads", "1", "--passes", "forward", "-o", str(path)]
    assert main(arguments) == 0
    output = capsys.readouterr()
    assert "gpt2-smoke, forward" in output.out
    assert "classes of calls" in output.out
    content = json.loads(path.read_text())
    assert content["measurements"][0]["workload"] == "gpt2-smoke, forward, float32"
    assert an.use_profile(path)
    assert main(arguments) == 2
    assert "exists" in capsys.readouterr().err
    assert main(["tune-kernels", "nothing"]) == 2
    assert "unknown workload nothing" in capsys.readouterr().err
