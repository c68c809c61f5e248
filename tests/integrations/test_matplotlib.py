"""Pictures: what they show, that every word of them can be read, and that they are files or nothing."""

from __future__ import annotations

import itertools
import subprocess
import sys
import warnings

import numpy as np
import pytest

matplotlib = pytest.importorskip("matplotlib", reason="matplotlib is not installed; it belongs to the extra plot")

import attn_numba as an  # noqa: E402
from attn_numba.averages import average, average_mask  # noqa: E402
from attn_numba.integrations import matplotlib as pictures  # noqa: E402

RANDOM = np.random.default_rng(0)
SHORT = ["the", "cat", "sat", "on", "the", "mat"]
LONG = ["incomprehensibilities" if n % 3 == 0 else f"token{n}" for n in range(64)]
STRANGE = ["日本", "語", "🌊", "naïve", "Привет", "مرحبا", "$x^2$", "$", "\n", "ᶁ", "", "x" * 300]


def weights(*shape: int) -> np.ndarray:
    w = RANDOM.random(shape)
    return w / w.sum(-1, keepdims=True)


def texts(figure) -> list:
    """Return every text of a figure that is drawn and not empty."""
    found = [text for text in figure.findobj(matplotlib.text.Text) if text.get_visible() and text.get_text().strip()]
    axes_of_figure = [axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)]
    ticks = {label for axis in axes_of_figure for label in axis.get_ticklabels()}
    shown = {
        label
        for axes in figure.axes
        for axis, (low, high) in ((axes.xaxis, sorted(axes.get_xlim())), (axes.yaxis, sorted(axes.get_ylim())))
        for place, label in zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=True)
        if axes.axison and low <= place <= high
    }
    return [text for text in found if text not in ticks or text in shown]


def check_legible(figure) -> None:
    """Check that nothing is cut off, that labels do not touch, and that a color bar says what it shows."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a missing glyph is a warning of matplotlib
        figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    width, height = figure.canvas.get_width_height()
    assert max(width, height) < 4000
    boxes = {text: text.get_window_extent(renderer) for text in texts(figure)}
    assert boxes
    for text, box in boxes.items():
        inside = box.x0 >= -0.5 and box.y0 >= -0.5 and box.x1 <= width + 0.5 and box.y1 <= height + 0.5
        assert inside, f"{text.get_text()!r} is cut off: {box} in {width} x {height}"
        assert text.get_fontsize() >= 6
    for (one, a), (other, b) in itertools.combinations(boxes.items(), 2):
        overlap = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
        assert min(overlap) < 1, f"{one.get_text()!r} touches {other.get_text()!r}"
    for axes in figure.axes:
        box = axes.get_window_extent(renderer)
        bar = axes.get_label() == "<colorbar>"
        assert min(box.width, box.height) > (6 if bar else 30)
        assert axes.get_ylabel().strip() or not bar


SHOWN = {
    "one pair": lambda: pictures.plot_weights([[1.0]]),
    "one pair with labels": lambda: pictures.plot_weights([[1.0]], queries=["a"], keys=["b"], mask=[[True]]),
    "short": lambda: pictures.plot_weights(weights(6, 6), queries=SHORT, keys=SHORT, mask=np.tri(6, dtype=bool)),
    "long": lambda: pictures.plot_weights(weights(64, 64), queries=LONG, keys=LONG),
    "strange": lambda: pictures.plot_weights(weights(12, 12), queries=STRANGE, keys=STRANGE, title="日本 $a_1 🌊"),
    "long title": lambda: pictures.plot_weights(weights(3, 3), title="what it looks at " * 12),
    "200 x 200": lambda: pictures.plot_weights(weights(200, 200)),
    "200 x 200 with labels": lambda: pictures.plot_weights(
        weights(200, 200), queries=[*"abcdefgh" * 25], keys=LONG * 3 + LONG[:8]
    ),
    "one row": lambda: pictures.plot_weights(weights(1, 200), queries=["last"]),
    "one column": lambda: pictures.plot_weights(np.ones((90, 1)), keys=["first"]),
    "averaged": lambda: pictures.plot_weights(weights(1500, 1100), mask=np.tri(1500, 1100, dtype=bool)),
    "9 heads": lambda: pictures.plot_weights(weights(9, 6, 6), queries=SHORT, keys=SHORT, mask=np.tri(6, dtype=bool)),
    "16 heads": lambda: pictures.plot_weights(weights(16, 12, 20), queries=STRANGE, keys=LONG[:20], highest=0.1),
    "5 heads, long": lambda: pictures.plot_weights(weights(5, 64, 64), queries=LONG, keys=LONG),
    "64 heads": lambda: pictures.plot_weights(weights(64, 5, 5)),
    "NaN": lambda: pictures.plot_weights([[np.nan, 1.0], [np.inf, 0.0]], mask=[[True, True], [True, False]]),
    "nothing but 0": lambda: pictures.plot_weights(np.zeros((2, 4, 4))),
    "entropy": lambda: pictures.plot_entropy(RANDOM.random((30, 9)), keys=64),
    "entropy of one head": lambda: pictures.plot_entropy([[0.0]], keys=1),
    "entropy with NaN": lambda: pictures.plot_entropy([[0.0, np.nan], [100.0, 2.0]]),
    "entropy of many heads": lambda: pictures.plot_entropy(RANDOM.random((12, 40))),
    "rollout": lambda: pictures.plot_rollout(RANDOM.random(14 * 10), RANDOM.random((224, 160, 3)), 16),
    "rollout, wide": lambda: pictures.plot_rollout(RANDOM.random(2 * 7), RANDOM.integers(0, 255, (30, 100)), 16),
    "rollout, NaN": lambda: pictures.plot_rollout([np.nan, 1.0], np.zeros((4, 8, 1)), 4),
    "front": lambda: pictures.plot_front([900, 80, 300], [0.9, 0.7, 0.9], [1, 2], deviations=[0.1, 0.02, 0.0]),
    "front of one": lambda: pictures.plot_front([5.0], [0.5], [0], unit="s", labels=["日本 $a_1 🌊"]),
    "front, many": lambda: pictures.plot_front(
        10.0 ** np.arange(40), np.arange(40), range(40), labels=[f"hidden_size={n}, " * (1 + n % 9) for n in range(40)]
    ),
    "front, seconds": lambda: pictures.plot_front(
        [2e-5, 3e-4, 1e-3], [-5e4, -1e4, -9e3], [0, 1, 2], unit="s", cost="seconds per sample", title="long " * 40
    ),
    "front, near": lambda: pictures.plot_front([12345, 12346, 12350], [0.97, 0.971, 0.9711], [0, 1, 2]),
    "mask": lambda: pictures.plot_mask(an.Causal() & an.Padding([20, 30, 30]), (3, 4, 30, 30)),
    "mask, one pair": lambda: pictures.plot_mask(an.Causal(), (1, 1, 1, 1)),
    "mask, averaged": lambda: pictures.plot_mask(an.SlidingWindow(300, 0), (1, 1, 3000, 3000)),
    "mask, many": lambda: pictures.plot_mask(RANDOM.random((4, 4, 8, 8)) < 0.5, (4, 4, 8, 8), keys=LONG[:8]),
}


@pytest.mark.parametrize("name", SHOWN)
def test_every_word_can_be_read(name):
    check_legible(SHOWN[name]())


def legend(figure) -> list[str]:
    return [text.get_text() for box in figure.legends for text in box.get_texts()]


def pixel_colors(figure, axes) -> set[tuple[int, ...]]:
    """Return the colors in the middle of the panels' cells."""
    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())
    (x0, x1), (y1, y0) = axes.get_xlim(), axes.get_ylim()
    places = itertools.product(np.arange(np.ceil(x0), x1), np.arange(np.ceil(y0), y1))
    found = (axes.transData.transform(place) for place in places)
    return {tuple(pixels[len(pixels) - 1 - int(y), int(x)]) for x, y in found}


def test_weights_are_drawn_as_they_are():
    w = weights(2, 3, 4)
    figure = pictures.plot_weights(w, queries=["a", "b", "c"], keys=["d", "e", "f", "g"])
    one, other, bar = figure.axes
    np.testing.assert_array_equal(one.images[0].get_array(), w[0])
    np.testing.assert_array_equal(other.images[0].get_array(), w[1])
    assert one.images[0].norm is other.images[0].norm
    assert bar.get_ylim() == (0, w.max())
    assert bar.get_ylabel() == "weight (0 to 1)"
    assert [label.get_text() for label in one.get_yticklabels()] == ["a", "b", "c"]
    assert [label.get_text() for label in one.get_xticklabels()] == ["d", "e", "f", "g"]
    assert one.get_title() == "head 0"
    assert one.get_ylabel() == "query"
    assert one.get_xlabel() == other.get_xlabel() == "key"
    assert legend(figure) == []


def test_excluded_pairs_and_nan_have_colors_of_their_own():
    w = np.array([[0.0, np.nan], [0.0, 1.0]])
    figure = pictures.plot_weights(w, mask=np.array([[True, True], [False, True]]))
    assert legend(figure) == ["NaN or infinite", "excluded by the mask"]
    assert len(pixel_colors(figure, figure.axes[0])) == 4
    assert (255, 0, 0, 255) in pixel_colors(figure, figure.axes[0])
    assert legend(pictures.plot_weights(np.eye(2), mask=np.eye(2, dtype=bool))) == ["excluded by the mask"]
    assert legend(pictures.plot_weights(np.eye(2), mask=np.ones((2, 2), bool))) == []


def test_a_scale_may_end_below_the_largest_weight():
    bar = pictures.plot_weights(np.eye(3), highest=0.25).axes[1]
    assert bar.get_ylim() == (0, 0.25)
    assert bar._colorbar.extend == "max"


def test_long_sequences_are_averaged_and_the_title_says_so():
    w = weights(1100, 600)
    figure = pictures.plot_weights(w, title="Weights")
    assert figure.get_suptitle() == "Weights\naveraged over 3 x 2 (queries x keys)"
    np.testing.assert_allclose(figure.axes[0].images[0].get_array()[5, 7], w[15:18, 14:16].mean())
    assert figure.axes[0].get_ylim() == (1099.5, -0.5)
    assert figure.axes[1].get_ylabel() == "mean weight (0 to 1)"
    given = pictures.plot_weights(
        average(w, 100), mask=average_mask(an.Causal(), (1, 1, 1100, 600), 0, cells=100).at(0, 0)
    )
    assert "averaged over 11 x 6" in given.get_suptitle()
    assert legend(given) == ["excluded by the mask"]


def test_labels_are_drawn_in_fonts_that_have_them_or_escaped():
    figure = pictures.plot_weights(np.eye(4), queries=["ᶁ", "日", "\n", "$x^2$"])
    labels = figure.axes[0].get_yticklabels()
    shown = [label.get_text() for label in labels]
    assert shown in (["ᶁ", "\\u65e5", "\\n", "$x^2$"], ["ᶁ", "日", "\\n", "$x^2$"])
    assert len(labels[0].get_fontfamily()) > 1  # matplotlib's own font lacks the first, one that comes with it has it
    assert not labels[3].get_parse_math()


def test_many_labels_are_thinned_and_stay_at_their_rows():
    axes = pictures.plot_weights(weights(200, 200), queries=[f"q{n}" for n in range(200)]).axes[0]
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert 20 < len(labels) < 120
    assert labels == [f"q{int(place)}" for place in axes.get_yticks()]


def test_entropy_has_its_bound_and_its_numbers():
    figure = pictures.plot_entropy([[0.5, 1.0], [0.25, 0.75]], keys=4)
    axes, bar = figure.axes
    assert [text.get_text() for text in axes.texts] == ["0.50", "1.00", "0.25", "0.75"]
    assert bar.get_ylim() == (0, np.log(4))
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("head", "layer")


def test_rollout_lies_over_its_patches():
    image = RANDOM.random((5, 6, 3))
    patches = an.sequences.patches(image, 2)
    rows, columns = patches.grid
    relevance = np.arange(rows * columns) / 9
    plain, over, _ = pictures.plot_rollout(relevance, image, 2).axes
    np.testing.assert_allclose(plain.images[0].get_array(), image)
    spread = over.images[1].get_array()
    np.testing.assert_array_equal(spread, np.kron(relevance.reshape(rows, columns), np.ones((2, 2)))[:5, :6])
    larger = pictures.plot_rollout(np.arange(16.0), image, 2, grid=(4, 4))
    np.testing.assert_array_equal(larger.axes[1].images[1].get_array()[:, 0], [0, 0, 4, 4, 8])


def test_images_of_other_numbers_are_stretched():
    for image in (
        np.array([[0, 255]], np.uint8),
        np.array([[-3.0, 5.0]]),
        np.array([[0, 1000]]),
        np.array([[0.0, 1.0]]),
    ):
        plain = pictures.plot_rollout([1.0, 0.0], image, 1).axes[0]
        np.testing.assert_array_equal(plain.images[0].get_array(), [[0.0, 1.0]])


def test_a_mask_has_one_panel_for_each_that_differs():
    mask = an.Causal() & an.Padding([2, 3, 2])
    figure = pictures.plot_mask(mask, (3, 2, 3, 3))
    assert [axes.get_title() for axes in figure.axes] == ["sequences 0, 2", "sequence 1"]
    shown = np.stack([axes.images[0].get_array() for axes in figure.axes]) == 2
    np.testing.assert_array_equal(shown, an.mask_array(mask, (3, 2, 3, 3))[:2, 0])
    assert legend(figure) == ["not allowed", "allowed"]
    chosen = pictures.plot_mask(mask, (3, 2, 3, 3), places=[(2, 1)])
    assert [axes.get_title().replace("\n", " ") for axes in chosen.axes] == ["sequence 2, head 1"]
    by_head = np.array([True, False, True, True]).reshape(1, 4, 1, 1)
    titles = [axes.get_title() for axes in pictures.plot_mask(by_head, (1, 4, 2, 2)).axes]
    assert titles == ["heads 0, 2, 3", "head 1"]
    assert pictures.plot_mask(an.Causal(), (3, 2, 3, 3)).axes[0].get_title() == ""


def test_a_mask_takes_offsets():
    axes = pictures.plot_mask(an.Causal(), (1, 1, 2, 5), query_offset=3).axes[0]
    np.testing.assert_array_equal(axes.images[0].get_array() == 2, [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
    averaged = pictures.plot_mask(an.Causal(), (1, 1, 2000, 2000))
    assert legend(averaged) == ["not allowed", "partly allowed", "allowed"]
    assert averaged.get_suptitle().endswith("averaged over 4 x 4 (queries x keys)")


def test_a_front_is_joined_and_named_from_cheap_to_dear():
    costs, scores = [900.0, 80.0, 300.0, 85.0], [0.9, 0.7, 0.85, 0.6]
    figure = pictures.plot_front(costs, scores, [0, 2, 1], labels=["c", "a", "b", "x"], cost="products")
    assert legend(figure) == ["a", "b", "c", "others"]
    (axes,) = figure.axes
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_xscale()) == ("products", "score", "log")
    np.testing.assert_array_equal(axes.lines[0].get_xydata(), [[80, 0.7], [300, 0.85], [900, 0.9]])
    drawn = np.concatenate([points.get_offsets() for points in axes.collections])
    np.testing.assert_array_equal(drawn, [[80, 0.7], [300, 0.85], [900, 0.9], [85, 0.6]])
    named = [tuple(points.get_facecolor()[0]) for points in axes.collections]
    assert len(set(named)) == 4
    assert pictures.plot_front([0, 80], [1, 2], [0]).axes[0].get_xscale() == "linear"


def test_a_front_has_bars_and_names_some_of_many():
    figure = pictures.plot_front(range(1, 61), range(60), range(60), deviations=[0.5] * 60)
    assert legend(figure)[0] == "model 0"
    assert legend(figure)[-1] == "model 59"
    assert len(legend(figure)) == 24
    segments = figure.axes[0].containers[0][2][0].get_segments()
    np.testing.assert_array_equal(segments[3], [[4, 2.5], [4, 3.5]])


IMAGE = np.zeros((4, 4))
REFUSED = [
    (lambda: pictures.plot_front([], [], []), ValueError, r"costs has shape \(0,\); needed \(models,\)"),
    (lambda: pictures.plot_front([1, 2], [1], [0]), ValueError, r"scores has shape \(1,\); needed \(2,\)"),
    (lambda: pictures.plot_front([1j], [1], [0]), TypeError, "costs has dtype complex128; needed real numbers"),
    (lambda: pictures.plot_front([1], [np.nan], [0]), ValueError, "scores has NaN or infinity"),
    (lambda: pictures.plot_front([1], [1], []), ValueError, "front is empty"),
    (lambda: pictures.plot_front([1], [1], [1]), ValueError, "front has 1; needed 0 to 0"),
    (lambda: pictures.plot_front([1], [1], [0, 0]), ValueError, "needed each model once"),
    (lambda: pictures.plot_front([1], [1], [0], deviations=[-1]), ValueError, "deviations has -1; needed 0 and more"),
    (lambda: pictures.plot_front([1], [1], [0], labels="ab"), ValueError, "labels has 2 texts; there are 1 models"),
    (lambda: pictures.plot_front([1], [1], [0], labels=[3]), TypeError, "labels has 3; needed text"),
    (lambda: pictures.plot_weights(np.ones(3)), ValueError, r"weights has shape \(3,\); needed 2 or 3 axes"),
    (lambda: pictures.plot_weights(np.ones((0, 3))), ValueError, "there is nothing to draw"),
    (lambda: pictures.plot_weights([[0.5, -0.5]]), ValueError, "weights goes down to -0.5"),
    (lambda: pictures.plot_weights([["a"]]), TypeError, "weights is list of dtype <U1; needed numbers"),
    (lambda: pictures.plot_weights([[1j]]), TypeError, "weights has dtype complex128; needed real numbers"),
    (lambda: pictures.plot_weights(np.eye(3), queries=SHORT), ValueError, "queries has 6 labels; there are 3 queries"),
    (lambda: pictures.plot_weights(np.eye(2), keys=["a", 5]), TypeError, r"keys\[1\] is int; needed text"),
    (lambda: pictures.plot_weights(np.eye(2), mask=np.eye(2)), TypeError, "mask has dtype float64; needed truth"),
    (lambda: pictures.plot_weights(np.eye(2), mask=np.ones(3, bool)), ValueError, r"mask has shape \(3,\)"),
    (lambda: pictures.plot_weights(np.eye(2), mask=average(np.eye(3))), ValueError, "mask is averaged over"),
    (lambda: pictures.plot_weights(np.eye(2), highest=0), ValueError, "highest is 0.0; needed a number above 0"),
    (lambda: pictures.plot_weights(np.ones((65, 2, 2))), ValueError, "weights has 65 heads; needed at most 64"),
    (lambda: pictures.plot_weights(np.ones((2, 2, 2)), names=["a"]), ValueError, "names has 1 labels"),
    (lambda: pictures.plot_entropy([0.5]), ValueError, r"entropy has shape \(1,\)"),
    (lambda: pictures.plot_entropy([[2.0]], keys=4), ValueError, "entropy reaches 2 nats; with 4 keys"),
    (lambda: pictures.plot_rollout(np.ones(5), IMAGE, 2), ValueError, r"relevance has shape \(5,\); needed \(4,\)"),
    (lambda: pictures.plot_rollout(np.ones(4), np.zeros((4, 4, 2)), 2), ValueError, "image has shape"),
    (lambda: pictures.plot_rollout(np.ones(4), IMAGE + np.nan, 2), ValueError, "image holds NaN"),
    (lambda: pictures.plot_mask(an.Causal(), (1, 1, 2, 3)), ValueError, "query_offset"),
    (lambda: pictures.plot_mask(an.Causal(), (1, 1, 2, 2), places=[(0, 1)]), ValueError, r"places has \(0, 1\)"),
    (lambda: pictures.plot_mask(an.Causal(), (1, 1, 0, 2)), ValueError, "needed sizes of at least 1"),
    (lambda: pictures.plot_mask(np.eye(2), (1, 1, 2, 2)), TypeError, "mask"),
]


@pytest.mark.parametrize("call", range(len(REFUSED)))
def test_what_cannot_be_drawn_is_refused_by_name(call):
    draw, kind, message = REFUSED[call]
    with pytest.raises(kind, match=message):
        draw()


@pytest.mark.parametrize(("kind", "start"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")])
def test_files_are_whole_and_the_same_every_time(tmp_path, kind, start):
    contents = []
    for n in range(2):
        path = tmp_path / f"{n}{kind}"
        pictures.save(pictures.plot_weights(np.eye(6), queries=SHORT, mask=np.tri(6, dtype=bool)), path)
        contents.append(path.read_bytes())
    assert contents[0].startswith(start)
    assert contents[0] == contents[1]
    assert len(list(tmp_path.iterdir())) == 2


def test_files_are_not_replaced_unless_told(tmp_path):
    path = tmp_path / "w.png"
    path.write_bytes(b"mine")
    figure = pictures.plot_weights([[1.0]])
    with pytest.raises(FileExistsError, match="exists"):
        pictures.save(figure, path)
    assert path.read_bytes() == b"mine"
    pictures.save(figure, path, overwrite=True)
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="unknown kind of file '.gif'; known are .png, .svg, .pdf"):
        pictures.save(figure, tmp_path / "w.gif")


def test_a_failure_leaves_no_file(tmp_path, monkeypatch):
    figure = pictures.plot_weights([[1.0]])

    def fail(file, **options):
        file.write(b"half")
        raise OSError("the disk is full")

    monkeypatch.setattr(figure, "savefig", fail)
    with pytest.raises(OSError, match="the disk is full"):
        pictures.save(figure, tmp_path / "w.png")
    assert not list(tmp_path.iterdir())


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_the_state_of_matplotlib_is_left_alone():
    code = """
import sys
from attn_numba.integrations import matplotlib as pictures
before = sys.modules["matplotlib"].rcParams.copy()
pictures.plot_weights([[1.0]]).canvas.draw()
print("matplotlib.pyplot" in sys.modules, before == sys.modules["matplotlib"].rcParams.copy())
"""
    assert run(code).split() == ["False", "True"]


def test_a_missing_matplotlib_names_the_extra():
    code = """
import sys
sys.modules["matplotlib"] = None
try:
    from attn_numba.integrations import matplotlib
except ImportError as error:
    print(error)
"""
    assert 'pip install "attn-numba[plot]"' in run(code)
