"""Sequences from images, signals and texts: worked by hand, there and back, and under attention with their masks."""

import itertools
import re
import subprocess
import sys

import numpy as np
import pytest
from scipy import signal as scipy_signal

import attn_numba as an
from attn_numba.sequences import bucket, frames, pad, patches, unpatch


def random(*shape, seed=0, dtype=np.float64):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def project(tokens, size=8, seed=0):
    """Tokens (B, L, D) as one head of the given size, (B, 1, L, size)."""
    return (tokens @ random(tokens.shape[-1], size, seed=seed) / np.sqrt(tokens.shape[-1]))[:, None]


def kept(mask, B, L):
    """Which keys a mask keeps, (B, L)."""
    return an.mask_array(mask, (B, 1, 1, L))[:, 0, 0]


class TestPatches:
    def test_worked_by_hand(self):
        image = np.array([[1, 2, 3], [4, 5, 6], [7, 8, 9]])
        tokens, mask, grid = patches(image, 2)
        assert tokens.tolist() == [[[1, 2, 4, 5], [3, 0, 6, 0], [7, 8, 0, 0], [9, 0, 0, 0]]]
        assert grid == (2, 2)
        assert mask.array.tolist() == [[[[True] * 4]]]  # each holds a pixel

    def test_channels_are_fastest(self):
        tokens = patches(np.arange(24).reshape(2, 4, 3), 2).tokens
        assert tokens[0, 0].tolist() == [0, 1, 2, 3, 4, 5, 12, 13, 14, 15, 16, 17]

    @pytest.mark.parametrize("size", [1, 2, 3, 5, 16])
    @pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 6, 9, 3), (3, 7, 5, 2), (1, 16, 33, 1), (0, 4, 4, 3)])
    def test_tokens_are_the_patches_and_lead_back(self, shape, size):
        images = random(*shape)
        tokens, mask, (rows, columns) = patches(images, size)
        assert (rows, columns) == tuple(-(-side // size) for side in shape[1:3])
        assert tokens.shape == (shape[0], rows * columns, size * size * shape[3])
        assert isinstance(mask, an.Dense)
        assert mask.array.shape == (shape[0], 1, 1, rows * columns)
        assert mask.array.all()
        wide = np.pad(images, ((0, 0), (0, rows * size - shape[1]), (0, columns * size - shape[2]), (0, 0)))
        for r, c in itertools.product(range(rows), range(columns)):
            expected = wide[:, r * size : (r + 1) * size, c * size : (c + 1) * size].reshape(
                shape[0], size * size * shape[3]
            )
            np.testing.assert_array_equal(tokens[:, r * columns + c], expected)
        np.testing.assert_array_equal(unpatch(tokens, size, grid=(rows, columns)), wide)
        np.testing.assert_array_equal(unpatch(tokens, size, grid=(rows, columns), shape=shape[1:3]), images)

    def test_one_image_of_two_or_three_axes(self):
        image = random(6, 8, 3)
        np.testing.assert_array_equal(patches(image, 4).tokens, patches(image[None], 4).tokens)
        np.testing.assert_array_equal(patches(image[..., 0], 4).tokens, patches(image[None, ..., :1], 4).tokens)

    @pytest.mark.parametrize("dtype", ["uint8", "int16", "float16", "float32", ">f4", "bfloat16"])
    def test_the_dtype_stays(self, dtype):
        if dtype == "bfloat16":
            dtype = pytest.importorskip("ml_dtypes").bfloat16
        image = np.arange(30).reshape(5, 6).astype(dtype)
        for images in (image, [image, image[:3]]):
            tokens, _, grid = patches(images, 2)
            assert tokens.dtype == image.dtype.newbyteorder("=")
            assert unpatch(tokens, 2, grid=grid).dtype == tokens.dtype
            np.testing.assert_array_equal(unpatch(tokens, 2, grid=grid, shape=(5, 6))[0, :, :, 0], image)

    def test_images_of_unequal_size(self):
        images = [random(5, 3, 2, seed=1), random(2, 7, 2, seed=2), random(4, 4, 2, seed=3), np.zeros((0, 0, 2))]
        tokens, mask, grid = patches(images, 2)
        assert grid == (3, 4)
        assert tokens.shape == (4, 12, 8)
        expected = [
            [1, 1, 0, 0, 1, 1, 0, 0, 1, 1, 0, 0],  # 3 x 2 patches
            [1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0],  # 1 x 4
            [1, 1, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0],  # 2 x 2
            [0] * 12,
        ]
        assert kept(mask, 4, 12).astype(int).tolist() == expected
        assert not tokens[~kept(mask, 4, 12)].any()
        for row, image in zip(tokens, images, strict=True):
            np.testing.assert_array_equal(unpatch(row[None], 2, grid=grid, shape=image.shape[:2])[0], image)

    def test_gray_images_in_a_list(self):
        tokens, mask, grid = patches([np.ones((2, 2)), np.ones((4, 1))], 2)
        assert tokens.tolist() == [[[1, 1, 1, 1], [0, 0, 0, 0]], [[1, 0, 1, 0], [1, 0, 1, 0]]]
        assert kept(mask, 2, 2).tolist() == [[True, False], [True, True]]
        assert grid == (2, 1)

    def test_neighborhood_takes_the_grid(self, backend):
        tokens, mask, grid = patches([random(12, 20), random(9, 20)], 4)
        x = project(tokens)
        neighborhood = an.Neighborhood(grid, 3)
        out = an.attention(x, x, x, mask=neighborhood & mask, backend=backend)
        near = an.mask_array(neighborhood & mask, (2, 1, 15, 15))[0, 0, 7]
        assert np.flatnonzero(near).tolist() == [1, 2, 3, 6, 7, 8, 11, 12, 13]
        assert np.isfinite(out).all()

    def test_results_are_new_arrays(self):
        for size, shape in ((1, (1, 1, 4, 1)), (2, (1, 2, 4, 1)), (4, (1, 8, 4, 1))):
            image = random(*shape)
            tokens, _, grid = patches(image, size)
            assert not np.shares_memory(tokens, image)
            assert not np.shares_memory(unpatch(tokens, size, grid=grid), tokens)


class TestFrames:
    def test_worked_by_hand(self):
        tokens, mask = frames(np.arange(1, 7), 4, 3, window="boxcar")
        assert tokens.tolist() == [[[1, 2, 3, 4], [4, 5, 6, 0]]]
        assert mask.key_lengths.tolist() == [2]
        hann = frames(np.ones(4), 4, 4).tokens
        np.testing.assert_allclose(hann, [[[0, 0.5, 1, 0.5]]], atol=1e-15)  # sin(pi n / 4)^2, the periodic form

    @pytest.mark.parametrize(("length", "hop"), [(1, 1), (4, 1), (4, 3), (4, 4), (7, 5), (40, 20)])
    @pytest.mark.parametrize("samples", [0, 1, 3, 4, 5, 8, 31])
    def test_frames_are_what_the_formula_says(self, samples, length, hop):
        signals = random(2, samples)
        tokens, mask = frames(signals, length, hop, window=("kaiser", 5.0))
        count = 1 + max(0, -(-(samples - length) // hop)) if samples else 0
        assert tokens.shape == (2, count, length)
        assert mask.key_lengths.tolist() == [count] * 2
        window = scipy_signal.get_window(("kaiser", 5.0), length)
        long = np.pad(signals, ((0, 0), (0, length * (count + 1))))
        for n in range(count):
            np.testing.assert_array_equal(tokens[:, n], long[:, n * hop : n * hop + length] * window)

    @pytest.mark.parametrize(("length", "hop"), [(4, 4), (4, 2), (5, 3), (16, 4)])
    @pytest.mark.parametrize("samples", [1, 4, 37, 64])
    def test_every_sample_is_in_a_frame_and_leads_back(self, samples, length, hop):
        """Frames added where they lie, over the windows added alike, are the signal."""
        signal = random(samples)
        tokens = frames(signal, length, hop, window="hamming").tokens[0]
        total, weight = np.zeros((2, length + hop * len(tokens)))
        window = scipy_signal.get_window("hamming", length)
        for n, frame in enumerate(tokens):
            total[n * hop : n * hop + length] += frame
            weight[n * hop : n * hop + length] += window
        assert (weight[:samples] > 0).all()
        np.testing.assert_allclose(total[:samples] / weight[:samples], signal, rtol=1e-13)
        assert not total[samples:].any()

    def test_agrees_with_scipys_short_time_transform(self):
        signal = random(640)
        spectra = frames(signal, 64, 16, spectrum=True).tokens[0]
        _, _, expected = scipy_signal.stft(
            signal, window="hann", nperseg=64, noverlap=48, boundary=None, padded=False, detrend=False
        )
        whole = expected.T * scipy_signal.get_window("hann", 64).sum()  # SciPy divides by the window's sum
        np.testing.assert_allclose(spectra, np.log(np.abs(whole)), rtol=1e-10, atol=1e-10)

    @pytest.mark.parametrize("spectrum", [False, True])
    def test_signals_of_unequal_length(self, spectrum):
        signals = [random(n, seed=n) for n in (50, 8, 0, 9, 1)]
        tokens, mask = frames(signals, 8, 4, spectrum=spectrum)
        assert mask.key_lengths.tolist() == [12, 1, 0, 2, 1]
        padded = np.full((5, 50), np.nan)  # what lies behind a signal is not read
        for row, signal in zip(padded, signals, strict=True):
            row[: len(signal)] = signal
        again, same = frames(padded, 8, 4, lengths=[50, 8, 0, 9, 1], spectrum=spectrum)
        np.testing.assert_array_equal(tokens, again)
        np.testing.assert_array_equal(mask.key_lengths, same.key_lengths)
        assert not tokens[~kept(mask, 5, 12)].any()
        for row, signal, count in zip(tokens, signals, mask.key_lengths, strict=True):
            alone = frames(signal, 8, 4, spectrum=spectrum).tokens[0]
            assert len(alone) == count
            np.testing.assert_array_equal(row[:count], alone)

    def test_one_length_for_all(self):
        signals = random(3, 10)
        np.testing.assert_array_equal(
            frames(signals, 4, 2, lengths=6).tokens, frames(signals, 4, 2, lengths=[6] * 3).tokens
        )
        assert frames(signals, 4, 2, lengths=6).mask.key_lengths.tolist() == [2, 2, 2]

    @pytest.mark.parametrize(
        ("given", "expected"),
        [("int8", "f4"), ("int16", "f4"), (">i2", "f4"), ("int32", "f8"), ("float16", "f4"), ("f4", "f4"),
         ("f8", "f8"), ("bfloat16", "f4")],
    )  # fmt: skip
    @pytest.mark.parametrize("spectrum", [False, True])
    def test_dtypes(self, given, expected, spectrum):
        if given == "bfloat16":
            given = pytest.importorskip("ml_dtypes").bfloat16
        signal = (20 * random(30)).astype(given)
        tokens = frames(signal, 8, 4, spectrum=spectrum).tokens
        assert tokens.dtype == expected
        exact = frames(signal.astype(np.float64), 8, 4, spectrum=spectrum).tokens
        np.testing.assert_allclose(tokens, exact, rtol=1e-5, atol=1e-4)

    def test_silence_has_a_finite_spectrum(self):
        tokens, mask = frames(np.zeros((1, 12), np.float32), 4, 4, spectrum=True)
        assert mask.key_lengths.tolist() == [3]
        np.testing.assert_allclose(tokens, np.log(1e-10), rtol=1e-6)

    @pytest.mark.parametrize("spectrum", [False, True])
    def test_no_signals_and_no_samples(self, spectrum):
        width = 5 if spectrum else 8
        assert frames(np.zeros((0, 20)), 8, 4, spectrum=spectrum).tokens.shape == (0, 4, width)
        assert frames(np.zeros((2, 0)), 8, 4, spectrum=spectrum).tokens.shape == (2, 0, width)


class TestPad:
    def test_ids(self):
        tokens, mask = pad([[3, 1, 4], [], [1, 5]], value=-1)
        assert tokens.tolist() == [[3, 1, 4], [-1, -1, -1], [1, 5, -1]]
        assert tokens.dtype == np.array([1]).dtype
        assert isinstance(mask, an.Padding)
        assert mask.key_lengths.tolist() == [3, 0, 2]

    @pytest.mark.parametrize("lengths", [(1,), (3, 3), (5, 0, 2), (0, 0), (1, 64, 7, 7)])
    @pytest.mark.parametrize("tail", [(), (1,), (6,)])
    def test_sequences_lead_back(self, lengths, tail):
        sequences = [random(n, *tail, seed=n, dtype=np.float32) for n in lengths]
        tokens, mask = pad(sequences, value=7.5)
        assert tokens.shape == (len(lengths), max(lengths), *tail)
        assert tokens.dtype == np.float32
        assert mask.key_lengths.tolist() == list(lengths)
        for row, sequence in zip(tokens, sequences, strict=True):
            np.testing.assert_array_equal(row[: len(sequence)], sequence)
            assert (row[len(sequence) :] == 7.5).all()

    def test_dtypes(self):
        assert pad([np.array([1, 2], np.uint8), []], value=255).tokens.tolist() == [[1, 2], [255, 255]]
        assert pad([[], np.array([1, 2], np.uint8)], value=255).tokens.dtype == np.uint8
        bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
        assert pad([np.ones((2, 3), bfloat16), np.ones((1, 3), bfloat16)]).tokens.dtype == bfloat16

    def test_a_tuple_is_a_list(self):
        assert pad(((1, 2), (3,))).tokens.tolist() == [[1, 2], [3, 0]]


def fewest_batches(lengths, limit):
    """Found by trying every partition."""
    best = len(lengths)

    def place(rest, groups):
        nonlocal best
        if not rest:
            best = min(best, len(groups))
        elif len(groups) <= best:
            for n, group in enumerate(groups):
                if (len(group) + 1) * max(*group, rest[0]) <= limit:
                    place(rest[1:], [*groups[:n], [*group, rest[0]], *groups[n + 1 :]])
            place(rest[1:], [*groups, [rest[0]]])

    place(list(lengths), [])
    return best


class TestBucket:
    def test_worked_by_hand(self):
        batches = bucket([2, 9, 3, 3, 1, 8], 18)
        assert [batch.indices.tolist() for batch in batches] == [[1, 5], [2, 3, 0, 4]]
        assert [batch.mask.key_lengths.tolist() for batch in batches] == [[9, 8], [3, 3, 2, 1]]

    @pytest.mark.parametrize("seed", range(8))
    @pytest.mark.parametrize("limit", [64, 100, 1000])
    def test_properties(self, seed, limit):
        rng = np.random.default_rng(seed)
        lengths = rng.integers(0, 65, rng.integers(1, 200))
        batches = bucket(lengths, limit)
        together = np.concatenate([batch.indices for batch in batches])
        assert sorted(together.tolist()) == list(range(len(lengths)))  # every sequence once
        assert (np.diff(lengths[together]) <= 0).all()  # longest first
        same = np.diff(lengths[together]) == 0
        assert (np.diff(together)[same] > 0).all()  # equal ones in the order given
        for indices, mask in batches:
            assert len(indices) * lengths[indices].max() <= limit
            np.testing.assert_array_equal(mask.key_lengths, lengths[indices])

    @pytest.mark.parametrize("seed", range(20))
    def test_no_grouping_has_fewer_batches(self, seed):
        rng = np.random.default_rng(seed)
        lengths = rng.integers(0, 10, 7)
        limit = int(rng.integers(max(lengths.max(), 1), 30))
        assert len(bucket(lengths, limit)) == fewest_batches(lengths.tolist(), limit)

    def test_nothing(self):
        assert bucket([], 5) == []
        assert [batch.indices.tolist() for batch in bucket([0, 0, 0], 1)] == [[0, 1, 2]]

    def test_texts_give_the_same_vectors_in_batches_as_alone(self, backend):
        texts = [random(n, 8, seed=n) for n in (3, 11, 1, 6, 2, 9)]
        for indices, mask in bucket([len(text) for text in texts], 22):
            tokens, same = pad([texts[n] for n in indices], value=np.nan)
            np.testing.assert_array_equal(mask.key_lengths, same.key_lengths)
            x = tokens[:, None]
            out = an.attention(x, x, x, mask=mask, backend=backend)
            for row, n in zip(out, indices, strict=True):
                text = texts[n][None, None]
                alone = an.attention(text, text, text, backend=backend)
                np.testing.assert_allclose(row[0, : len(texts[n])], alone[0, 0], rtol=1e-12)


IMAGES = [random(20, 31, 3, seed=1), random(13, 8, 3, seed=2)]
SOUNDS = [random(300, seed=3), random(170, seed=4)]
TEXTS = [random(9, 16, seed=5), random(4, 16, seed=6)]
KINDS = {
    "images": lambda: patches(IMAGES, 8)[:2],
    "sounds": lambda: frames(SOUNDS, 40, 16),
    "spectra": lambda: frames(SOUNDS, 40, 16, spectrum=True),
    "texts": lambda: pad(TEXTS),
}


@pytest.mark.parametrize(("queries", "keys"), list(itertools.permutations(KINDS, 2)))
def test_cross_attention_between_any_two(queries, keys, backend):
    """The padded batch gives what each pair gives alone, and NaN in the padding changes nothing."""
    (asked, _), (given, mask) = KINDS[queries](), KINDS[keys]()
    q, k, v = project(asked), project(given, seed=1), project(given, 5, seed=2)
    out = an.attention(q, k, v, mask=mask, backend=backend)
    assert out.shape == (2, 1, asked.shape[1], 5)
    real = kept(mask, 2, given.shape[1])
    assert not real.all()
    assert real.any(1).all()
    for n in range(2):
        alone = an.attention(q[n], k[n][:, real[n]], v[n][:, real[n]], backend=backend)
        np.testing.assert_allclose(out[n], alone, rtol=1e-11, atol=1e-13)
    k, v = k.copy(), v.copy()
    k[:, 0][~real] = v[:, 0][~real] = np.nan
    np.testing.assert_array_equal(an.attention(q, k, v, mask=mask, backend=backend), out)


def test_inputs_are_not_written_and_may_have_any_strides():
    def locked(array):
        array.flags.writeable = False
        return array

    image, signals, ids = locked(random(2, 9, 12, 3)), locked(random(2, 50)), locked(np.arange(5))
    before = image.copy(), signals.copy(), ids.copy()
    for given in (image, list(image)):
        tokens, _, grid = patches(given, 4)
        unpatch(locked(tokens), 4, grid=grid)
    for given in (signals, list(signals)):
        frames(given, 8, 4, spectrum=True)
    frames(signals, 8, 8, window="boxcar", lengths=locked(np.array([50, 20]))).tokens[...] = 0  # results are new
    pad([ids, ids[:2]]).tokens[...] = 0
    bucket(ids, 5)[0].indices[...] = 0
    for now, then in zip((image, signals, ids), before, strict=True):
        np.testing.assert_array_equal(now, then)
    turned = image[:, ::-1].swapaxes(1, 2)
    np.testing.assert_array_equal(patches(turned, 4).tokens, patches(turned.copy(), 4).tokens)
    np.testing.assert_array_equal(frames(signals[:, ::-2], 8, 4).tokens, frames(signals[:, ::-2].copy(), 8, 4).tokens)


def test_reached_from_the_package():
    assert an.sequences.pad is pad
    assert "sequences" in dir(an)


def test_scipy_is_loaded_by_the_first_frames_only():
    code = """
import sys
import attn_numba as an
assert "attn_numba.sequences" not in sys.modules
an.sequences.patches([[[1, 2]]], 1), an.sequences.pad([[1]]), an.sequences.bucket([1], 1)
assert not {"scipy", "numba"} & set(sys.modules)
an.sequences.frames([[1.0, 2.0]], 2, 1)
assert "scipy" in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


ARRAY = np.zeros((1, 4, 16))
REFUSED = [
    (lambda: patches(np.zeros((4, 4)), 2.0), TypeError, "patches: size is float; needed an integer"),
    (lambda: patches(np.zeros((4, 4)), 0), ValueError, "patches: size is 0; needed at least 1"),
    (lambda: patches(np.zeros(4), 2), ValueError, "patches: images has shape (4,); needed (B, height, width"),
    (lambda: patches(np.zeros((1,) * 5), 2), ValueError, "patches: images has shape (1, 1, 1, 1, 1); needed"),
    (lambda: patches(np.zeros((4, 4), complex), 2), TypeError, "patches: images has dtype complex128; needed integers"),
    (lambda: patches(np.zeros((4, 4), bool), 2), TypeError, "patches: images has dtype bool"),
    (lambda: patches("cat.png", 2), TypeError, "patches: images is str"),
    (lambda: patches(None, 2), TypeError, "patches: images is NoneType"),
    (lambda: patches([], 2), ValueError, "patches: images is empty; needed at least one"),
    (lambda: patches([np.zeros(4)], 2), ValueError, "patches: images[0] has shape (4,); needed all (height, width, ch"),
    (lambda: patches([np.zeros((4, 4, 3)), np.zeros((4, 4, 1))], 2), ValueError,
     "patches: images[1] has shape (4, 4, 1), images[0] (4, 4, 3); needed all (height, width, channels), channels the"),
    (lambda: patches([np.zeros((4, 4, 3)), np.zeros((4, 4))], 2), ValueError, "images[1] has shape (4, 4), images[0]"),
    (lambda: patches([np.zeros((4, 4)), np.zeros((4, 4), np.uint8)], 2), TypeError,
     "patches: images[1] has dtype uint8; images[0] has float64"),
    (lambda: unpatch(ARRAY, True, grid=(2, 2)), TypeError, "unpatch: size is True; needed an integer"),
    (lambda: unpatch(ARRAY, -1, grid=(2, 2)), ValueError, "unpatch: size is -1; needed at least 1"),
    (lambda: unpatch("x", 2, grid=(2, 2)), TypeError, "unpatch: tokens is str"),
    (lambda: unpatch(ARRAY[0], 2, grid=(2, 2)), ValueError, "pass tokens[None] for one image"),
    (lambda: unpatch(ARRAY[None], 2, grid=(2, 2)), ValueError, "unpatch: tokens has shape (1, 1, 4, 16); needed 3"),
    (lambda: unpatch(ARRAY, 2, grid=(2, 3)), ValueError, "unpatch: grid is (2, 3), 6 patches; tokens has 4"),
    (lambda: unpatch(ARRAY, 2, grid=(-2, -2)), ValueError, "unpatch: grid is (-2, -2); needed at least 0"),
    (lambda: unpatch(ARRAY, 2, grid=4), TypeError, "unpatch: grid is int; needed two integers"),
    (lambda: unpatch(ARRAY, 2, grid=(4,)), ValueError, "unpatch: grid is (4,); needed two integers"),
    (lambda: unpatch(ARRAY, 2, grid=(2.0, 2)), TypeError, "unpatch: grid is float; needed an integer"),
    (lambda: unpatch(ARRAY, 3, grid=(2, 2)), ValueError, "unpatch: tokens are of size 16; needed a multiple of 9"),
    (lambda: unpatch(ARRAY, 2, grid=(2, 2), shape=(4, 5)), ValueError,
     "unpatch: shape is (4, 5); the grid holds (4, 4) pixels"),
    (lambda: unpatch(ARRAY, 2, grid=(2, 2), shape=(4, 4, 4)), ValueError, "unpatch: shape is (4, 4, 4); needed two"),
    (lambda: unpatch(ARRAY, 2, grid=(2, 2), shape=(-1, 4)), ValueError, "unpatch: shape is (-1, 4); needed at least 0"),
    (lambda: frames(np.zeros(9), 4.0, 2), TypeError, "frames: length is float; needed an integer"),
    (lambda: frames(np.zeros(9), 0, 2), ValueError, "frames: length is 0; needed at least 1"),
    (lambda: frames(np.zeros(9), 4, "2"), TypeError, "frames: hop is str; needed an integer"),
    (lambda: frames(np.zeros(9), 4, 0), ValueError, "frames: hop is 0; needed at least 1"),
    (lambda: frames(np.zeros(9), 4, 5), ValueError, "frames: hop is 5; needed at most 4, the length"),
    (lambda: frames(np.zeros(9), 4, 2, window=None), TypeError, "frames: window is NoneType; needed a name"),
    (lambda: frames(np.zeros(9), 4, 2, window=np.ones(4)), TypeError, "frames: window is ndarray; needed a name"),
    (lambda: frames(np.zeros(9), 4, 2, window="hat"), ValueError, "frames: window is 'hat'; needed one that scipy"),
    (lambda: frames(np.zeros(9), 4, 2, window="kaiser"), ValueError, "frames: window is 'kaiser'; needed one that"),
    (lambda: frames(np.zeros(9), 4, 2, window=("kaiser", "x")), ValueError, "frames: window is ('kaiser', 'x')"),
    (lambda: frames(np.zeros(9), 4, 2, window=("hann", 1, 2, 3)), ValueError, "frames: window is ('hann', 1, 2, 3)"),
    (lambda: frames(np.zeros(9), 4, 2, window=()), ValueError, "frames: window is ()"),
    (lambda: frames(np.zeros(9), 4, 2, window=(4,)), ValueError, "frames: window is (4,)"),
    (lambda: frames(np.zeros(9), 4, 2, spectrum="log"), TypeError, "frames: spectrum is str; needed a truth value"),
    (lambda: frames(np.zeros((1, 2, 9)), 4, 2), ValueError, "frames: signals has shape (1, 2, 9); needed (B, samples)"),
    (lambda: frames(np.float64(3), 4, 2), ValueError, "frames: signals has shape (); needed (B, samples)"),
    (lambda: frames(np.zeros(9, complex), 4, 2), TypeError, "frames: signals has dtype complex128"),
    (lambda: frames([], 4, 2), ValueError, "frames: signals is empty; needed at least one"),
    (lambda: frames([1.0, 2.0], 4, 2), ValueError, "frames: signals[0] has shape (); needed (samples,)"),
    (lambda: frames([np.zeros(3), np.zeros(3, "f4")], 4, 2), TypeError,
     "frames: signals[1] has dtype float32; signals[0] has float64"),
    (lambda: frames([np.zeros(3)], 4, 2, lengths=3), TypeError, "frames: lengths is given, but signals is a list"),
    (lambda: frames(np.zeros((2, 9)), 4, 2, lengths=[1.0, 2.0]), TypeError, "frames: lengths has dtype float64"),
    (lambda: frames(np.zeros((2, 9)), 4, 2, lengths=[9]), ValueError, "frames: lengths has shape (1,); needed one num"),
    (lambda: frames(np.zeros((2, 9)), 4, 2, lengths=[3, 10]), ValueError,
     "frames: lengths go from 3 to 10; needed 0 to 9, the samples"),
    (lambda: frames(np.zeros((2, 9)), 4, 2, lengths=-1), ValueError, "frames: lengths go from -1 to -1; needed 0 to 9"),
    (lambda: pad(np.zeros((2, 3))), TypeError, "pad: sequences is ndarray; needed a list of arrays"),
    (lambda: pad("text"), TypeError, "pad: sequences is str; needed a list of arrays"),
    (lambda: pad(x for x in ([1], [2])), TypeError, "pad: sequences is generator; needed a list of arrays"),
    (lambda: pad(["one", "two"]), TypeError, "pad: sequences[0] is str"),
    (lambda: pad([]), ValueError, "pad: sequences is empty; needed at least one"),
    (lambda: pad([1, 2]), ValueError, "pad: sequences[0] has shape (); needed all (L_n, D), D the same, or all (L_n,)"),
    (lambda: pad([[1], [[1, 2], [3]]]), TypeError, "pad: sequences[1] is list, which does not make an array"),
    (lambda: pad([np.zeros((1, 2, 3))]), ValueError, "pad: sequences[0] has shape (1, 2, 3); needed all (L_n, D)"),
    (lambda: pad([np.zeros((2, 3)), np.zeros((2, 4))]), ValueError,
     "pad: sequences[1] has shape (2, 4), sequences[0] (2, 3); needed all (L_n, D), D the same, or all (L_n,)"),
    (lambda: pad([np.zeros((2, 3)), np.zeros(3)]), ValueError, "pad: sequences[1] has shape (3,), sequences[0] (2, 3)"),
    (lambda: pad([[], [1], [2.0]]), TypeError, "pad: sequences[2] has dtype float64; sequences[1] has int64"),
    (lambda: pad([[1]], value=0.5), TypeError, "pad: value is float; needed an integer"),
    (lambda: pad([[1]], value=None), TypeError, "pad: value is NoneType; needed an integer"),
    (lambda: pad([[1.0]], value="0"), TypeError, "pad: value is str"),
    (lambda: pad([np.zeros(2, np.uint8)], value=256), ValueError, "pad: value is 256; needed 0 to 255, as the sequenc"),
    (lambda: pad([np.zeros(2, np.uint8)], value=-1), ValueError, "pad: value is -1; needed 0 to 255"),
    (lambda: bucket([1, 2], 2.5), TypeError, "bucket: limit is float; needed an integer"),
    (lambda: bucket([1, 2], 0), ValueError, "bucket: limit is 0; needed at least 1"),
    (lambda: bucket([1.0, 2.0], 4), TypeError, "bucket: lengths has dtype float64; needed integers"),
    (lambda: bucket(3, 4), ValueError, "bucket: lengths is one number; needed one axis, (sequences,)"),
    (lambda: bucket([[1, 2]], 4), ValueError, "bucket: lengths has shape (1, 2); needed at most 1 axes"),
    (lambda: bucket(["ab"], 4), TypeError, "bucket: lengths is list of dtype <U2; needed numbers"),
    (lambda: bucket([1, -2], 4), ValueError, "bucket: lengths[1] is -2; needed at least 0"),
    (lambda: bucket([1, 5, 6], 4), ValueError, "bucket: lengths[1] is 5; needed at most the limit, 4"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "kind", "message"), REFUSED, ids=[message for _, _, message in REFUSED])
def test_refused(call, kind, message):
    with pytest.raises(kind, match=re.escape(message)):
        call()
