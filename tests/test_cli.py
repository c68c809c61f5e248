"""The command line: it computes what the functions compute, and refuses what is wrong in one line, with code 2."""

from __future__ import annotations

import io
import os
import subprocess
import sys

import numpy as np
import pytest

import attn_numba as an
from attn_numba import cli, comparison, files, job
from attn_numba.integrations.ml_dtypes import bfloat16

RANDOM = np.random.default_rng(0)
Q = RANDOM.standard_normal((2, 4, 36, 8)).astype(np.float32)
K, V = (RANDOM.standard_normal((2, 2, 36, 8)).astype(np.float32) for _ in "kv")
ALLOWED = RANDOM.random((2, 1, 36, 36)) < 0.7
BIAS = RANDOM.standard_normal((4, 36, 36)).astype(np.float32)
DOCUMENTS = np.repeat(np.arange(4), 9)[None]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with inputs, and the process in it."""
    monkeypatch.chdir(tmp_path)
    for name, array in {"q": Q, "k": K, "v": V, "allowed": ALLOWED, "bias": BIAS, "documents": DOCUMENTS}.items():
        np.save(f"{name}.npy", array)
    files.write_arrays("qkv.npz", {"q": Q, "k": K, "v": V})
    files.write_arrays("qkv.safetensors", {"q": Q, "k": K, "v": V})
    return tmp_path


def refused(capsys, *words: str) -> str:
    """Return the one line that a command is refused with."""
    assert cli.main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("attn-numba: error: ")
    assert err.count("\n") == 1
    return err


@pytest.fixture
def pictures():
    """The functions that draw; the test is skipped without matplotlib."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed; it belongs to the extra plot")
    from attn_numba.integrations import matplotlib

    return matplotlib


RULES = {
    "": {},
    "--causal": {"mask": an.Causal()},
    "--window 5 -1": {"mask": an.SlidingWindow(5, -1)},
    "--grid 6x6 --neighborhood 3x5": {"mask": an.Neighborhood((6, 6), (3, 5))},
    "--padding-lengths 20,36": {"mask": an.Padding(np.array([20, 36]))},
    "--causal --padding-lengths 20,36": {"mask": an.Causal() & an.Padding(np.array([20, 36]))},
    "--prefix-lengths 7,0": {"mask": an.PrefixLM(np.array([7, 0]))},
    "--documents documents.npy": {"mask": an.SameDocument(np.broadcast_to(DOCUMENTS, (2, 36)))},
    "--mask allowed.npy": {"mask": ALLOWED},
    "--bias bias.npy --soft-cap 2": {"modifiers": (an.Bias(BIAS), an.SoftCap(2.0))},
    "--alibi-slopes 0.5,0.25,0.125,0.0625": {"modifiers": an.ALiBi(2.0 ** -np.arange(1, 5))},
    "--sink 0.5": {"normalizer": an.Softmax(sink=0.5)},
    "--normalizer sparsemax": {"normalizer": an.Sparsemax()},
    "--normalizer entmax15 --causal": {"normalizer": an.Entmax15(), "mask": an.Causal()},
    "--score cosine --normalizer double-softmax --scale 9": {
        "score": an.Cosine(),
        "normalizer": an.DoubleSoftmax(),
        "scale": 9.0,
    },
    "--scale -0.25": {"scale": -0.25},
    "--causal --query-offset 9 --key-offset 3": {"mask": an.Causal(), "query_offset": 9, "key_offset": 3},
}


def has_lse(words):
    return isinstance(RULES[words].get("normalizer", an.Softmax()), an.Softmax)


@pytest.mark.parametrize("words", RULES)
def test_run_computes_what_attention_computes(folder, words):
    lse = has_lse(words)
    assert cli.main(["run", "qkv.npz", "-o", "out.npz", *["--lse"] * lse, "--weights", *words.split()]) == 0
    found = files.read_arrays("out.npz")
    expected = an.attention(Q, K, V, return_lse=lse, return_weights=True, **RULES[words])
    for name, array in expected._asdict().items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


@pytest.mark.parametrize("inputs", ["q.npy k.npy v.npy", "qkv.npz", "qkv.safetensors"])
@pytest.mark.parametrize("output", ["out.npy", "out.npz", "out.safetensors"])
def test_run_reads_and_writes_every_kind_of_file(folder, inputs, output):
    assert cli.main(["run", *inputs.split(), "--causal", "-o", output, "--backend", "cpu", "--threads", "1"]) == 0
    np.testing.assert_array_equal(files.read_array(output), an.attention(Q, K, V, mask=an.Causal()))


def test_run_takes_arrays_by_other_names(folder):
    files.write_arrays("model.npz", {"layer.q": Q, "layer.k": K, "layer.v": V, "else": np.ones(3)})
    words = ["--names", "layer.q", "layer.k", "layer.v"]
    assert cli.main(["run", "model.npz", *words, "-o", "out.npy"]) == 0
    np.testing.assert_array_equal(np.load("out.npy"), an.attention(Q, K, V))


def test_run_keeps_rank_and_bfloat16(folder):
    q, k, v = (x[0, 0].astype(bfloat16) for x in (Q, K, V))
    files.write_arrays("half.safetensors", {"q": q, "k": k, "v": v})
    assert cli.main(["run", "half.safetensors", "-o", "out.safetensors"]) == 0
    found = files.read_array("out.safetensors")
    assert found.dtype == bfloat16
    np.testing.assert_array_equal(found.view(np.uint16), an.attention(q, k, v).view(np.uint16))


def test_run_refuses_bfloat16_where_it_cannot_be_kept(folder, capsys):
    files.write_arrays("half.safetensors", {name: x.astype(bfloat16) for name, x in zip("qkv", (Q, K, V), strict=True)})
    assert "bfloat16; use .safetensors" in refused(capsys, "run", "half.safetensors", "-o", "out.npy")
    assert not (folder / "out.npy").exists()


def test_run_replaces_a_file_only_when_told(folder, capsys):
    (folder / "out.npy").write_bytes(b"mine")
    assert "out.npy exists" in refused(capsys, "run", "qkv.npz", "-o", "out.npy")
    assert (folder / "out.npy").read_bytes() == b"mine"
    assert cli.main(["run", "qkv.npz", "-o", "out.npy", "--force"]) == 0
    np.testing.assert_array_equal(np.load("out.npy"), an.attention(Q, K, V))


REFUSED = {
    "run missing.npz -o out.npy": "missing.npz",
    "run q.npy k.npy -o out.npy": "not 2 files",
    "run q.npy -o out.npy": "has no array k",
    "run qkv.npz -o out.txt": "unknown kind of file '.txt'",
    "run qkv.npz -o out.npy --lse": "holds one array",
    "run q.npy q.npy v.npy -o out.npy": "v has 2 heads; k has 4",
    "run qkv.npz -o out.npy --scale nan": "NaN",
    "run qkv.npz -o out.npy --backend gpu": "gpu",
    "run qkv.npz -o out.npy --padding-lengths 3,x": "neither numbers",
    "run qkv.npz -o out.npy --padding-lengths 3,4,5": "Padding",
    "run qkv.npz -o out.npy --mask bias.npy": "modifiers=Bias(m)",
    "run qkv.npz -o out.npy --grid 6x6": "go together",
    "run cut.npz -o out.npy --causal": "query_offset",
    "run truncated.npy k.npy v.npy -o out.npy": "truncated.npy",
    "run pickled.npy k.npy v.npy -o out.npy": "pickle",
    "compare qkv.npz --soft-cap -1": "SoftCap",
    "bench nothing --small": "unknown workload nothing; known are minilm",
    "warmup float8": "float8",
    "run qkv.npz -o out.npy --normalizer sparsemax --sink 0": "a sink needs softmax",
    "run qkv.npz -o out.npz --normalizer entmax15 --lse": "Entmax15 has no lse",
}


@pytest.mark.parametrize("words", REFUSED)
def test_bad_input_is_refused_in_one_line(folder, capsys, words):
    files.write_arrays("cut.npz", {"q": Q[:, :, :9], "k": K, "v": V})
    (folder / "truncated.npy").write_bytes((folder / "q.npy").read_bytes()[:-8])
    np.save("pickled.npy", np.array([{}], object), allow_pickle=True)
    before = sorted(folder.iterdir())
    assert REFUSED[words] in refused(capsys, *words.split())
    assert sorted(folder.iterdir()) == before


def test_bad_usage_ends_with_code_2(capsys):
    for words in (
        ["run", "q.npz"],
        ["fly"],
        [],
        ["bench", "--repeat", "0"],
        ["run", "q.npz", "-o", "x.npy", "--grid", "6by6"],
    ):
        with pytest.raises(SystemExit) as caught:
            cli.main(words)
        assert caught.value.code == 2


def test_traceback_is_shown_when_asked_for():
    with pytest.raises(FileNotFoundError):
        cli.main(["run", "missing.npz", "-o", "out.npy", "--traceback"])


def test_an_interrupt_ends_with_code_130(folder, capsys, monkeypatch):
    def interrupt(*arrays, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "attention", interrupt)
    assert cli.main(["run", "qkv.npz", "-o", "out.npy"]) == 130
    assert capsys.readouterr().err == "attn-numba: interrupted\n"
    assert not list(folder.glob("*out*"))


@pytest.mark.parametrize("words", RULES)
def test_pieces_have_the_bits_of_the_whole(folder, monkeypatch, words):
    monkeypatch.setattr(job, "ROWS", 8)
    arguments = cli._parser().parse_args(["run", "qkv.npz", "-o", "out.npy", *words.split()])
    call = cli._job(arguments)
    pieces = call.pieces(pairs=2 * 20 * 36)
    assert len(pieces) == 2 * 2 * 3
    done: list[int] = []
    found = call.run(an.attention, pieces, done.append, lse=has_lse(words), weights=True)
    for name, array in call.run(an.attention, lse=has_lse(words), weights=True).items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)
    assert sum(done) == call.pairs
    assert len(done) == len(pieces)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("words", "shown"), [((), True), (("--quiet",), False)])
def test_long_work_shows_a_bar_on_a_terminal(folder, monkeypatch, words, shown):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(cli, "PIECE_FLOP", 1)
    assert cli.main(["run", "qkv.npz", "-o", "out.npy", *words]) == 0
    assert ("attention:" in terminal.getvalue()) == shown
    np.testing.assert_array_equal(np.load("out.npy"), an.attention(Q, K, V))


def test_no_bar_goes_into_a_file(folder, capsys, monkeypatch):
    monkeypatch.setattr(cli, "PIECE_FLOP", 1)
    assert cli.main(["run", "qkv.npz", "-o", "out.npy"]) == 0
    assert capsys.readouterr() == ("", "")


def test_a_job_with_nothing_to_do_has_no_pieces():
    call = job.Job(Q[:, :, :0], K, V)
    assert call.pieces(100) == []
    assert call.run(an.attention)["out"].shape == (2, 4, 0, 8)


def test_info_tells_every_setting_and_backend(capsys):
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    for words in ("numba", "threads", "cache", "backends", "reference", "cuda"):
        assert words in out


def test_info_has_sections_without_settings(capsys, monkeypatch):
    monkeypatch.setattr(cli, "config_report", lambda: {"cache": {}})
    assert cli.main(["info"]) == 0
    assert capsys.readouterr().out.startswith("cache\nbackends\n")


def test_compare_passes_on_files_and_on_random_input(folder, capsys):
    assert cli.main(["compare", "qkv.npz", "--causal", "--repeat", "1"]) == 0
    assert cli.main(["compare", "--sizes", "1", "4", "2", "20", "30", "8", "6", "--dtype", "bfloat16"]) == 0
    out = capsys.readouterr().out
    assert "skipped" in out or "cuda" in out
    assert "FAILED" not in out


def test_compare_fails_on_a_wrong_backend(capsys, monkeypatch):
    right = comparison.attention

    def wrong(*arrays, backend, **options):
        return right(*arrays, backend=backend, **options) * (1.001 if backend == "cpu" else 1)

    monkeypatch.setattr(comparison, "attention", wrong)
    assert cli.main(["compare", "--sizes", "1", "1", "1", "9", "9", "8", "8"]) == 1
    assert "FAILED" in capsys.readouterr().out


def test_tables_need_no_rich(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "attn_numba.integrations.rich", None)
    assert cli.main(["compare", "--sizes", "1", "1", "1", "9", "9", "8", "8"]) == 0
    assert "\nreference  " in capsys.readouterr().out


def test_bench_times_workloads(capsys):
    assert cli.main(["bench", "gpt2", "decode", "--small", "--repeat", "1"]) == 0
    out = capsys.readouterr().out
    for words in ("gpt2-smoke", "decode-smoke", "numpy", "GFLOP/s visible"):
        assert words in out


def test_warmup_says_how_long_it_took(capsys):
    assert cli.main(["warmup"]) == 0
    assert capsys.readouterr().out.startswith("float32: ")


def test_module_and_version():
    done = subprocess.run(
        [sys.executable, "-m", "attn_numba", "--version"], capture_output=True, text=True, check=True, cwd=os.path.sep
    )
    assert done.stdout == f"attn-numba {an.__version__}\n"


@pytest.fixture
def plotted(folder, pictures, monkeypatch):
    """A function that runs `plot` and returns the figure that it saved."""
    saved = []
    save = pictures.save

    def remember(figure, path, **options):
        saved.append(figure)
        save(figure, path, **options)

    monkeypatch.setattr(pictures, "save", remember)

    def run(words: str):
        assert cli.main(["plot", *words.split(), "-o", "picture.png", "--force"]) == 0
        assert (folder / "picture.png").read_bytes().startswith(b"\x89PNG")
        return saved[-1]

    return run


def panels(figure) -> list[np.ndarray]:
    return [axes.images[0].get_array() for axes in figure.axes if axes.get_label() != "<colorbar>"]


def test_plot_draws_the_weights_of_all_heads(plotted):
    figure = plotted("weights qkv.npz --causal --sequence 1")
    expected = an.attention(Q, K, V, mask=an.Causal(), return_weights=True).weights[1]
    np.testing.assert_allclose(panels(figure), expected, rtol=1e-4, atol=1e-6)
    assert figure.get_suptitle() == "Attention weights, sequence 1"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["excluded by the mask"]


@pytest.mark.parametrize("words", RULES)
def test_plot_draws_what_run_computes(plotted, words):
    figure = plotted(f"weights q.npy k.npy --heads 3 1 --rows 5:20 --backend reference {words}")
    expected = an.attention(Q, K, V, return_weights=True, **RULES[words]).weights[0, [3, 1], 5:20]
    np.testing.assert_allclose(panels(figure), expected, rtol=1e-4, atol=1e-6)
    assert [axes.get_title() for axes in figure.axes[:2]] == ["head 3", "head 1"]
    assert figure.axes[0].get_yticklabels()[0].get_text() == "5"


def test_plot_takes_labels_title_and_the_top_of_the_scale(folder, plotted):
    (folder / "tokens.txt").write_text("".join(f"wörd{n}\n" for n in range(36)), encoding="utf-8")
    words = "weights qkv.npz --heads 2 --rows 30:36 --labels tokens.txt --title Head --highest 0.5 --backend reference"
    figure = plotted(words)
    assert figure.get_suptitle() == "Head"
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == [f"wörd{n}" for n in range(30, 36)]
    assert figure.axes[0].get_xticklabels()[35].get_text() == "wörd35"
    assert figure.axes[1].get_ylim() == (0, 0.5)


def test_plot_averages_long_sequences(plotted):
    q, k = RANDOM.standard_normal((2, 1, 1100, 4)).astype(np.float32)
    np.savez("long.npz", q=q, k=k)
    figure = plotted("weights long.npz --causal --backend reference")
    w = an.attention(q, k, k, mask=an.Causal(), return_weights=True, backend="reference").weights[0]
    assert figure.get_suptitle() == "Attention weights\naveraged over 3 x 3 (queries x keys)"
    np.testing.assert_allclose(panels(figure)[0][100, 50], w[300:303, 150:153].mean(), rtol=1e-4)


def test_plot_draws_the_entropy_of_layers(plotted):
    np.savez("other.npz", q=K, k=Q[:, :2])
    np.savez("layer.npz", q=Q[:, :2], k=K)
    axes, bar = plotted("entropy layer.npz other.npz --causal --backend reference").axes
    w = [an.attention(*x, K, mask=an.Causal(), return_weights=True).weights for x in ((Q[:, :2], K), (K, Q[:, :2]))]
    expected = [-(x * np.log(np.where(x > 0, x, 1))).sum(-1).mean((0, 2)) for x in w]
    np.testing.assert_allclose(axes.images[0].get_array(), expected, rtol=1e-4)
    assert bar.get_ylabel() == "entropy (nats)\nat most ln 36 = 3.58"


def test_plot_draws_a_mask(plotted):
    figure = plotted("mask --shape 2x4x36x36 --causal --padding-lengths 20,36")
    expected = an.mask_array(an.Causal() & an.Padding([20, 36]), (2, 4, 36, 36))[:, 0]
    np.testing.assert_array_equal(np.stack(panels(figure)) == 2, expected)


def test_plot_draws_a_rollout(folder, plotted):
    for name in ("first", "second"):
        assert cli.main(["run", "qkv.npz", "-o", f"{name}.npz", "--weights", "--causal"]) == 0
    w = files.read_arrays("first.npz")["weights"]
    expected = an.rollout([w, w], 0.25)
    figure = plotted("rollout first.npz second.npz --sequence 1 --residual 0.25")
    np.testing.assert_allclose(panels(figure)[0], expected[1], rtol=1e-6)
    assert figure.axes[1].get_ylabel() == "share (0 to 1)"
    np.save("image.npy", RANDOM.random((14, 21, 3)))
    over = plotted("rollout first.npz second.npz --residual 0.25 --image image.npy --patch 3 --query 35").axes[1]
    np.testing.assert_allclose(over.images[1].get_array()[::3, ::3].ravel(), expected[0, 35, 1:], rtol=1e-6)


@pytest.mark.parametrize("output", ["picture.svg", "picture.pdf"])
def test_plot_writes_other_kinds_of_files(folder, pictures, output):
    assert cli.main(["plot", "mask", "--shape", "1x1x4x4", "--causal", "-o", output]) == 0
    assert (folder / output).stat().st_size > 1000


PLOT_REFUSED = {
    "weights missing.npz -o x.png": "missing.npz",
    "weights q.npy k.npy v.npy -o x.png": "not 3 files",
    "weights qkv.npz -o x.gif": "unknown kind of file '.gif'; known are .png, .svg, .pdf",
    "weights qkv.npz -o q.npy": "unknown kind",
    "weights qkv.npz -o old.png": "old.png exists",
    "weights qkv.npz -o x.png --heads 0 4": "--heads has 4; needed 0 to 3",
    "weights qkv.npz -o x.png --sequence 2": "--sequence has 2; needed 0 to 1",
    "weights qkv.npz -o x.png --rows 30:40": "--rows is 30:40; needed a part of 0:36",
    "weights qkv.npz -o x.png --labels three.txt": "three.txt has 3 lines; there are 36 queries",
    "weights qkv.npz -o x.png --labels latin.txt": "latin.txt is not UTF-8",
    "weights qkv.npz -o x.png --labels a b c": "not in 3",
    "weights qkv.npz -o x.png --names q w": "has no array w",
    "weights qkv.npz -o x.png --highest 0 --backend reference": "highest is 0.0",
    "weights qkv.npz -o x.png --backend gpu": "gpu",
    "entropy q.npy -o x.png": "has no array",
    "mask --shape 1x1x4x4 -o x.png": "no mask is given",
    "mask --shape 4x4 --causal -o x.png": "--shape is 4x4; needed four sizes",
    "mask --shape 1x1x2x4 --causal -o x.png": "query_offset",
    "rollout qkv.npz -o x.png": "has no array weights; it holds k, q, v",
    "rollout q.npy -o x.png": "needed (B, H, M, M)",
    "rollout square.npy -o x.png --image q.npy": "--image and --patch go together",
    "rollout square.npy -o x.png --query 1": "--query is for a picture with --image",
    "rollout square.npy -o x.png --image square.npy --patch 4 --highest 1": "without --image",
    "rollout square.npy -o x.png --image square.npy --patch 1": "relevance has shape (4,); needed (16,)",
    "rollout square.npy -o x.png --image k.npy --patch 1": "image has shape (2, 2, 36, 8)",
    "rollout square.npy -o x.png --query 4 --image square.npy --patch 4": "--query has 4; needed 0 to 3",
}


@pytest.mark.parametrize("words", PLOT_REFUSED)
def test_plot_refuses_bad_input_in_one_line(folder, pictures, capsys, words):
    (folder / "three.txt").write_text("a\nb\nc\n")
    (folder / "latin.txt").write_bytes("é".encode("latin-1"))
    (folder / "old.png").write_bytes(b"mine")
    np.save("square.npy", np.full((4, 4), 0.25))
    before = sorted(folder.iterdir())
    assert PLOT_REFUSED[words] in refused(capsys, "plot", *words.split())
    assert sorted(folder.iterdir()) == before
    assert (folder / "old.png").read_bytes() == b"mine"


def test_plot_without_matplotlib_names_the_extra(folder, capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, "attn_numba.integrations.matplotlib", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delattr("attn_numba.integrations.matplotlib", raising=False)
    message = refused(capsys, "plot", "mask", "--shape", "1x1x4x4", "--causal", "-o", "x.png")
    assert 'pip install "attn-numba[plot]"' in message


def test_plot_usage_ends_with_code_2():
    for words in ("plot", "plot pie", "plot mask --causal -o x.png", "plot weights q.npz -o x.png --rows 5"):
        with pytest.raises(SystemExit) as caught:
            cli.main(words.split())
        assert caught.value.code == 2
