"""Sequences from images, signals and texts: arrays (B, L, D), and the mask that belongs to each.

A list stands for sequences of unequal size, an array for sequences of equal size. What is missing to a common size is
filled up, and the mask excludes it as *keys*: give a call the mask of the sequence that its keys come from. The
outputs of queries that are themselves filling are there to be dropped.

Examples
--------
Patches of an image attend to frames of two signals: other lengths, other sizes, an ordinary call.

>>> import numpy as np
>>> import attn_numba as an
>>> random = np.random.default_rng(0)
>>> image = an.sequences.patches(random.random((2, 32, 48, 3)), 16)
>>> sound = an.sequences.frames([random.random(16000), random.random(12000)], 400, 160, spectrum=True)
>>> image.tokens.shape, sound.tokens.shape
((2, 6, 768), (2, 99, 201))
>>> to_q, to_k, to_v = (random.standard_normal((size, 64)) / size for size in (768, 201, 201))
>>> out = an.attention(*(x[:, None] for x in (image.tokens @ to_q, sound.tokens @ to_k, sound.tokens @ to_v)),
...                    mask=sound.mask)
>>> out.shape
(2, 1, 6, 64)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from attn_numba.rules import Dense, Padding
from attn_numba.rules.data import AnyArray, as_array, integers, real_number, whole_number

__all__ = ["Batch", "Patches", "Tokens", "bucket", "frames", "pad", "patches", "unpatch"]

FLOOR = 1e-10  # magnitudes below it count as it, so that the logarithm of silence is finite


class Tokens(NamedTuple):
    """Sequences in one array, and the mask that belongs to them.

    Parameters
    ----------
    tokens : array (B, L, D), or (B, L) for ids
        The sequences, filled up at their ends.
    mask : Padding
        Excludes the filling as keys; ``mask.key_lengths`` (B,) says how long each sequence is.
    """

    tokens: AnyArray
    mask: Padding


class Patches(NamedTuple):
    """Images as sequences of patches, and the mask that belongs to them.

    Parameters
    ----------
    tokens : array (B, L, size * size * channels)
        One token for each patch: the grid row by row; in a patch the pixels row by row, channels fastest.
    mask : Dense
        Excludes, as keys, the patches that hold no pixel of their image; ``mask.array`` is (B, 1, 1, L).
    grid : (int, int)
        Rows and columns of the grid, ``L = rows * columns``: the shape that `Neighborhood` takes.
    """

    tokens: AnyArray
    mask: Dense
    grid: tuple[int, int]


class Batch(NamedTuple):
    """Which sequences make a batch, and the mask that belongs to them once they are padded.

    Parameters
    ----------
    indices : int array (B,)
        Places of the sequences in what was bucketed, longest first.
    mask : Padding
        The lengths of these sequences, in that order.
    """

    indices: AnyArray
    mask: Padding


def patches(images: Any, size: int) -> Patches:
    """Return images cut into square patches, as sequences of tokens.

    Parameters
    ----------
    images : array (B, height, width, channels), (height, width, channels) or (height, width); or a list
        Integers or real numbers. A list holds images of any sizes, all (height, width, channels) or all (height,
        width), with the same channels and dtype.
    size : int
        Side of a patch, in pixels.

    Returns
    -------
    Patches
        The tokens, in the dtype of the images, always with a B axis; the mask; the shape of the grid.

    Raises
    ------
    TypeError
        If `images` is not of numbers, the images of a list differ in dtype, or `size` is not an integer.
    ValueError
        If `images` has another number of axes, a list is empty or its images differ in channels, or `size` is below 1.

    See Also
    --------
    unpatch : The way back.

    Notes
    -----
    Token ``r * columns + c`` is ``images[b, r * size : (r + 1) * size, c * size : (c + 1) * size].ravel()``. Where a
    side is no multiple of `size`, or an image of a list is smaller than the largest, zeros below and to the right fill
    the grid up. A patch that holds at least one pixel of its image is kept; patches wholly of zeros that were added
    exist only beside images of unequal size, and the mask excludes them.

    References
    ----------
    A. Dosovitskiy et al. (2021), "An image is worth 16x16 words: transformers for image recognition at scale",
    section 3.1.

    Examples
    --------
    >>> import numpy as np
    >>> image = np.arange(16).reshape(4, 4)
    >>> tokens, mask, grid = patches(image, 2)
    >>> tokens
    array([[[ 0,  1,  4,  5],
            [ 2,  3,  6,  7],
            [ 8,  9, 12, 13],
            [10, 11, 14, 15]]])
    >>> unpatch(tokens, 2, grid=grid)[0, :, :, 0].tolist() == image.tolist()
    True

    Two images of unequal size: the second is one patch wide.

    >>> patches([image, image[:, :1]], 2).mask.array[:, 0, 0]
    array([[ True,  True,  True,  True],
           [ True, False,  True, False]])

    Each patch sees its eight neighbors and itself:

    >>> from attn_numba import Neighborhood
    >>> Neighborhood(patches(np.zeros((224, 224, 3)), 16).grid, 3)
    Neighborhood(shape=(14, 14), size=(3, 3), dilation=(1, 1))
    """
    size = _positive("patches", "size", size)
    pixels, sides = _images(images)
    B, height, width, channels = pixels.shape
    rows, columns = -(-height // size), -(-width // size)
    canvas = np.zeros((B, rows * size, columns * size, channels), pixels.dtype)
    canvas[:, :height, :width] = pixels
    tokens = canvas.reshape(B, rows, size, columns, size, channels).swapaxes(2, 3)
    real_rows, real_columns = (size * np.arange(n) < sides[:, axis, None] for axis, n in enumerate((rows, columns)))
    real = real_rows[:, :, None] & real_columns[:, None, :]
    return Patches(
        tokens.reshape(B, rows * columns, size * size * channels),
        Dense(real.reshape(B, 1, 1, rows * columns)),
        (rows, columns),
    )


def unpatch(tokens: Any, size: int, *, grid: Sequence[int], shape: Sequence[int] | None = None) -> AnyArray:
    """Return the images that sequences of patches came from.

    Parameters
    ----------
    tokens : array (B, L, size * size * channels)
        Patches in the order of `patches`.
    size : int
        Side of a patch, in pixels.
    grid : (int, int)
        Rows and columns of the grid, ``rows * columns = L``.
    shape : (int, int), optional
        Height and width to cut the images to, in pixels; without it, those of the whole grid.

    Returns
    -------
    array (B, height, width, channels)
        A new array in the dtype of `tokens`.

    Raises
    ------
    TypeError
        If `tokens` is not of numbers, or the others not of integers.
    ValueError
        If the sizes do not fit each other, or `size` is below 1.

    See Also
    --------
    patches : The way there.

    Examples
    --------
    >>> import numpy as np
    >>> image = np.random.default_rng(0).random((1, 30, 45, 3))
    >>> cut = patches(image, 16)
    >>> bool((unpatch(cut.tokens, 16, grid=cut.grid, shape=(30, 45)) == image).all())
    True
    """
    size = _positive("unpatch", "size", size)
    array = _numbers("unpatch", "tokens", tokens)
    if array.ndim != 3:
        cure = ": pass tokens[None] for one image" if array.ndim == 2 else ""
        raise ValueError(
            f"unpatch: tokens has shape {array.shape}; needed 3 axes, (B, L, size * size * channels){cure}"
        )
    B, L, D = array.shape
    rows, columns = _two_sides("grid", grid)
    if rows * columns != L:
        raise ValueError(f"unpatch: grid is {(rows, columns)}, {rows * columns} patches; tokens has {L}")
    if D % size**2:
        raise ValueError(f"unpatch: tokens are of size {D}; needed a multiple of {size**2}, the pixels of a patch")
    height, width = (rows * size, columns * size) if shape is None else _two_sides("shape", shape)
    if height > rows * size or width > columns * size:
        raise ValueError(f"unpatch: shape is {(height, width)}; the grid holds {(rows * size, columns * size)} pixels")
    channels = D // size**2
    image = np.empty((B, rows, size, columns, size, channels), array.dtype)
    image.swapaxes(2, 3)[...] = array.reshape(B, rows, columns, size, size, channels)
    return image.reshape(B, rows * size, columns * size, channels)[:, :height, :width]


def frames(
    signals: Any, length: int, hop: int, *, window: Any = "hann", lengths: Any = None, spectrum: bool = False
) -> Tokens:
    """Return signals cut into overlapping windowed frames, as sequences of tokens.

    Parameters
    ----------
    signals : array (B, samples) or (samples,); or a list
        Integers or real numbers. A list holds signals (samples,) of any lengths, with the same dtype.
    length : int
        Samples of a frame.
    hop : int
        Samples from the start of a frame to the start of the next, at most `length`, so that no sample is left out.
    window : str or tuple
        Name of the window, or name and parameters, as `scipy.signal.get_window` takes them; the periodic form.
        ``"boxcar"`` leaves the samples as they are.
    lengths : int or int array (B,), optional
        Samples of each signal, for an array; what lies behind them is not read. Without it, all of them.
    spectrum : bool
        Whether the tokens are spectra of the frames: the natural logarithm of the magnitudes of their Fourier
        transforms, magnitudes below 1e-10 counting as 1e-10.

    Returns
    -------
    Tokens
        The tokens (B, L, length), or (B, L, length // 2 + 1) as spectra, always with a B axis: float64 for float64
        and for integers of 32 bits and more, else float32; and the mask. Tokens that the mask excludes are zeros.

    Raises
    ------
    TypeError
        If `signals` is not of numbers, the signals of a list differ in dtype, an integer is none, `window` is neither
        a name nor a tuple, `spectrum` is not a truth value, or `lengths` is given with a list.
    ValueError
        If `signals` has another number of axes, a list is empty, `length` is below 1, `hop` not from 1 to `length`,
        `lengths` not from 0 to the samples or not one for each signal, or SciPy does not know `window`.

    Notes
    -----
    Frame n of a signal holds its samples from ``n * hop`` on, times the window. A signal of S samples has
    ``1 + ceil(max(S - length, 0) / hop)`` frames, none if it is empty; zeros fill the last one up. Spectrum bin m is
    the frequency ``m / length`` in cycles per sample.

    References
    ----------
    Frames: J. B. Allen and L. R. Rabiner (1977), "A unified approach to short-time Fourier analysis and synthesis",
    section II. Windows: F. J. Harris (1978), "On the use of windows for harmonic analysis with the discrete Fourier
    transform", section V.

    Examples
    --------
    >>> import numpy as np
    >>> tokens, mask = frames([np.arange(7.0), np.arange(3.0)], 4, 2, window="boxcar")
    >>> tokens
    array([[[0., 1., 2., 3.],
            [2., 3., 4., 5.],
            [4., 5., 6., 0.]],
    <BLANKLINE>
           [[0., 1., 2., 0.],
            [0., 0., 0., 0.],
            [0., 0., 0., 0.]]])
    >>> mask.key_lengths
    array([3, 1], dtype=int32)

    The tone of 440 Hz in one second at 16 kHz, in frames of 25 ms every 10 ms:

    >>> tone = np.sin(2 * np.pi * 440 * np.arange(16000) / 16000)
    >>> spectra = frames(tone, 400, 160, spectrum=True).tokens
    >>> spectra.shape, int(spectra[0, 0].argmax()) * 16000 // 400
    ((1, 99, 201), 440)
    """
    length = _positive("frames", "length", length)
    hop = _positive("frames", "hop", hop)
    if hop > length:
        raise ValueError(f"frames: hop is {hop}; needed at most {length}, the length, or samples are left out")
    if not isinstance(window, (str, tuple)):
        raise TypeError(f"frames: window is {type(window).__name__}; needed a name, or a tuple of name and parameters")
    if not isinstance(spectrum, (bool, np.bool_)):
        raise TypeError(f"frames: spectrum is {type(spectrum).__name__}; needed a truth value")
    samples, ends = _signals(signals, lengths)
    B, S = samples.shape
    dtype = np.result_type(samples.dtype, np.float32)
    weights = _window(window, length).astype(dtype)

    L = int(_frame_counts(S, length, hop))
    filled = np.zeros((B, max(L - 1, 0) * hop + length), dtype)
    np.copyto(filled[:, :S], samples, where=np.arange(S) < ends[:, None])
    tokens = np.lib.stride_tricks.sliding_window_view(filled, length, axis=1)[:, ::hop][:, :L] * weights
    counts = _frame_counts(ends, length, hop)
    if spectrum:
        tokens = _log_magnitudes(tokens)
    tokens[np.arange(L) >= counts[:, None]] = 0  # the end of a signal lies in frames that it does not need, too
    return Tokens(tokens, Padding(counts))


def pad(sequences: Sequence[Any], value: float = 0) -> Tokens:
    """Return sequences of unequal length in one array, filled up at their ends.

    Parameters
    ----------
    sequences : list of arrays (L_n, D), or of ids (L_n,)
        Integers or real numbers, of the same D and dtype; lists of ids are fine too, and a sequence may be empty.
    value : int or float
        What the filling holds, such as a tokenizer's id for it; an integer for sequences of integers.

    Returns
    -------
    Tokens
        The tokens (B, L, D) or (B, L), L the greatest length, in the dtype of the sequences; and the mask.

    Raises
    ------
    TypeError
        If `sequences` is no list, one is not of numbers or differs in dtype, or `value` is of another kind.
    ValueError
        If the list is empty, a sequence has other axes than these, one differs in D, or `value` does not fit the
        dtype.

    Examples
    --------
    >>> tokens, mask = pad([[5, 6, 7], [8]], value=1)
    >>> tokens
    array([[5, 6, 7],
           [8, 1, 1]])
    >>> mask.key_lengths
    array([3, 1], dtype=int32)
    """
    tokens, sizes = _stacked(
        "pad", "sequences", sequences, "all (L_n, D), D the same, or all (L_n,)", axes=(1, 2), value=value
    )
    return Tokens(tokens, Padding(sizes[:, 0]))


def bucket(lengths: Any, limit: int) -> list[Batch]:
    """Return sequences of similar length grouped into batches whose padded size is bounded.

    Parameters
    ----------
    lengths : int array (sequences,)
        How long each sequence is.
    limit : int
        Most tokens of a batch, filling included: ``B * L <= limit``, L the length of its longest sequence.

    Returns
    -------
    list of Batch
        Every sequence in one batch, the longest first, equal ones in the order given; no grouping of these lengths
        within the limit has fewer batches.

    Raises
    ------
    TypeError
        If `lengths` are not integers or `limit` is none.
    ValueError
        If `lengths` does not have one axis, one is negative or above `limit`, or `limit` is below 1.

    References
    ----------
    Batches by length, bounded in tokens: A. Vaswani et al. (2017), "Attention is all you need", section 5.1.

    Examples
    --------
    >>> texts = [[1], [2, 3, 4, 5], [6, 7, 8], [9, 10]]
    >>> for indices, mask in bucket([len(text) for text in texts], limit=6):
    ...     print(indices, pad([texts[n] for n in indices]).tokens.tolist())
    [1] [[2, 3, 4, 5]]
    [2 3] [[6, 7, 8], [9, 10, 0]]
    [0] [[1]]
    """
    limit = _positive("bucket", "limit", limit)
    array = as_array(lengths, "bucket", "lengths")
    sizes = integers("bucket", "lengths", array if array.size else array.astype(np.int32), 1)
    if sizes.ndim != 1:
        raise ValueError("bucket: lengths is one number; needed one axis, (sequences,)")
    for what, wrong in (("needed at least 0", sizes < 0), (f"needed at most the limit, {limit}", sizes > limit)):
        if wrong.any():
            n = int(wrong.argmax())
            raise ValueError(f"bucket: lengths[{n}] is {sizes[n]}; {what}")
    order = np.argsort(-sizes, kind="stable")
    batches = []
    while order.size:
        longest = int(sizes[order[0]])
        count = limit // longest if longest else order.size
        batches.append(Batch(order[:count], Padding(sizes[order[:count]])))
        order = order[count:]
    return batches


def _positive(function: str, name: str, x: object) -> int:
    number = whole_number(function, name, x)
    if number < 1:
        raise ValueError(f"{function}: {name} is {number}; needed at least 1")
    return number


def _two_sides(name: str, x: object) -> tuple[int, int]:
    if not isinstance(x, (tuple, list, np.ndarray)):
        raise TypeError(f"unpatch: {name} is {type(x).__name__}; needed two integers")
    if len(x) != 2:
        raise ValueError(f"unpatch: {name} is {tuple(x)}; needed two integers")
    first, second = (whole_number("unpatch", name, side) for side in x)
    if min(first, second) < 0:
        raise ValueError(f"unpatch: {name} is {(first, second)}; needed at least 0")
    return first, second


def _numbers(function: str, name: str, x: object) -> AnyArray:
    """Return an array of integers or real numbers, in native byte order."""
    array = as_array(x, function, name)
    if array.dtype.kind not in "iuf" and array.dtype.name != "bfloat16":
        raise TypeError(f"{function}: {name} has dtype {array.dtype}; needed integers or real numbers")
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def _stacked(
    function: str, name: str, items: Any, needed: str, axes: tuple[int, ...], value: Any = 0
) -> tuple[AnyArray, AnyArray]:
    """Return the arrays of a list in one that is filled up at the ends, and the sizes of each.

    They have one of the counts of axes given; the smallest of these is how many axes may differ in size, and the
    sizes returned are of these axes. The dtype is that of the first that holds anything: ``[]`` alone has none.
    """
    if not isinstance(items, (list, tuple)):
        raise TypeError(f"{function}: {name} is {type(items).__name__}; needed a list of arrays")
    if not items:
        raise ValueError(f"{function}: {name} is empty; needed at least one")
    arrays = [_numbers(function, f"{name}[{n}]", item) for n, item in enumerate(items)]
    first = next((n for n, array in enumerate(arrays) if array.size), 0)
    shape, dtype, free = arrays[0].shape, arrays[first].dtype, axes[0]
    for n, array in enumerate(arrays):
        label = f"{function}: {name}[{n}]"
        if array.size and array.dtype != dtype:
            raise TypeError(f"{label} has dtype {array.dtype}; {name}[{first}] has {dtype}")
        if array.ndim not in axes:
            raise ValueError(f"{label} has shape {array.shape}; needed {needed}")
        if (array.ndim, array.shape[free:]) != (len(shape), shape[free:]):
            raise ValueError(f"{label} has shape {array.shape}, {name}[0] {shape}; needed {needed}")
    sizes = np.array([array.shape[:free] for array in arrays])
    stacked = np.full((len(arrays), *sizes.max(0), *shape[free:]), _filling(function, value, dtype), dtype)
    for place, array in zip(stacked, arrays, strict=True):
        place[tuple(slice(size) for size in array.shape)] = array
    return stacked, sizes


def _filling(function: str, value: object, dtype: np.dtype) -> float:
    """Return the value that padding holds, as a number that the dtype can hold."""
    if dtype.kind not in "iu":
        return real_number(function, "value", value)
    number = whole_number(function, "value", value)
    low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
    if not low <= number <= high:
        raise ValueError(f"{function}: value is {number}; needed {low} to {high}, as the sequences are {dtype}")
    return number


def _images(images: Any) -> tuple[AnyArray, AnyArray]:
    """Return images as (B, height, width, channels), and height and width of each, (B, 2)."""
    if isinstance(images, (list, tuple)):
        needed = "all (height, width, channels), channels the same, or all (height, width)"
        pixels, sizes = _stacked("patches", "images", images, needed, axes=(2, 3))
        return (pixels if pixels.ndim == 4 else pixels[..., None]), sizes
    pixels = _numbers("patches", "images", images)
    if pixels.ndim not in (2, 3, 4):
        raise ValueError(
            f"patches: images has shape {pixels.shape}; "
            "needed (B, height, width, channels), (height, width, channels) or (height, width)"
        )
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.ndim == 3:
        pixels = pixels[None]
    return pixels, np.broadcast_to(pixels.shape[1:3], (len(pixels), 2))


def _signals(signals: Any, lengths: Any) -> tuple[AnyArray, AnyArray]:
    """Return signals as (B, samples), and how many samples each has, (B,)."""
    if isinstance(signals, (list, tuple)):
        if lengths is not None:
            raise TypeError("frames: lengths is given, but signals is a list, whose signals have their own")
        samples, sizes = _stacked("frames", "signals", signals, "(samples,)", axes=(1,))
        return samples, sizes[:, 0]
    samples = _numbers("frames", "signals", signals)
    if samples.ndim not in (1, 2):
        raise ValueError(f"frames: signals has shape {samples.shape}; needed (B, samples) or (samples,)")
    samples = np.atleast_2d(samples)
    B, S = samples.shape
    ends = integers("frames", "lengths", S if lengths is None else lengths, 1)
    if ends.shape not in ((), (B,)):
        raise ValueError(f"frames: lengths has shape {ends.shape}; needed one number, or ({B},): one for each signal")
    if ends.size and not 0 <= ends.min() <= ends.max() <= S:
        raise ValueError(f"frames: lengths go from {ends.min()} to {ends.max()}; needed 0 to {S}, the samples")
    return samples, np.broadcast_to(ends, (B,))


def _frame_counts(samples: Any, length: int, hop: int) -> Any:
    """Return how many frames signals of so many samples have; the last one may be part full."""
    return np.where(np.asarray(samples) > 0, 1 - np.minimum(length - np.asarray(samples), 0) // hop, 0)


def _window(window: str | tuple[Any, ...], length: int) -> AnyArray:
    from scipy.signal import get_window

    try:
        return get_window(window, length, fftbins=True)
    except (LookupError, TypeError, ValueError) as error:
        raise ValueError(
            f"frames: window is {window!r}; needed one that scipy.signal.get_window knows: {error}"
        ) from error


def _log_magnitudes(tokens: AnyArray) -> AnyArray:
    from scipy.fft import rfft

    return np.log(np.maximum(np.abs(rfft(tokens, axis=-1)), FLOOR))
