"""The cases that every backend is held to: a plain one, one axis varied at a time, then pairs that interact.

A case is small and deterministic. ``case.build(dtype)`` gives ``q, k, v`` and the keyword arguments of `attention`.
Where the reference is not finite (the case is marked `spoiled`) a backend must not be finite either; which of NaN and
infinity is not promised.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from attn_numba.rules import (
    AdaptiveSpan,
    Additive,
    ALiBi,
    AllOf,
    AnyOf,
    Bias,
    Bilinear,
    BlockSparse,
    Causal,
    Cosine,
    CustomMask,
    CustomModifier,
    Dense,
    Dot,
    DoubleSoftmax,
    Dropout,
    Entmax15,
    Neighborhood,
    Not,
    Padding,
    PrefixLM,
    ReplaceExcluded,
    SameDocument,
    Sizes,
    SlidingWindow,
    SoftCap,
    Softmax,
    Sparsemax,
    Temperature,
    as_mask,
    as_modifiers,
    places_of,
)
from attn_numba.rules.dropout import DropoutPart


def no_rules(rng: np.random.Generator, z: Sizes) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Case:
    """One call to compare: sizes, rules, and how its arrays lie in memory.

    Attributes
    ----------
    name : str
        Says what is special about it.
    sizes : Sizes
        B, H, Hk, M, N, D, E.
    rules : function (rng, sizes) -> dict
        Keyword arguments of `attention`.
    layout : str
        ``plain``, ``swapped`` (made as (B, M, H, D)), ``reversed`` (negative strides), ``spaced`` (every second
        element), ``columns`` (the head size is not the last axis in memory), ``shared`` (one sequence and head,
        stride 0).
    rank : int
        Axes of q, k and v; those left out have size 1.
    poison : str
        ``""``; ``"hidden"`` puts NaN, infinity and huge numbers where no query looks; ``"seen"`` puts NaN and
        infinity in a few keys and values that some queries see.
    amplitude : float
        Standard deviation of q and k.
    """

    name: str
    sizes: Sizes
    rules: Callable[[np.random.Generator, Sizes], dict[str, Any]] = no_rules
    layout: str = "plain"
    rank: int = 4
    poison: str = ""
    amplitude: float = 1.0

    @property
    def spoiled(self) -> bool:
        """Whether some results are not finite."""
        return self.poison == "seen"

    def kwargs(self) -> dict[str, Any]:
        """Return the keyword arguments of `attention`: rules, scale, offsets."""
        return self.rules(self._rng("rules"), self.sizes)

    def build(self, dtype: Any = np.float64) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Return q, k, v in the given dtype (bfloat16 by name) and the keyword arguments of `attention`."""
        z = self.sizes
        if dtype == "bfloat16":
            import ml_dtypes

            dtype = ml_dtypes.bfloat16
        rng = self._rng("arrays")
        q = rng.standard_normal((z.B, z.H, z.M, z.D)) * self.amplitude
        k = rng.standard_normal((z.B, z.Hk, z.N, z.D)) * self.amplitude
        v = rng.standard_normal((z.B, z.Hk, z.N, z.E))
        kwargs = self.kwargs()
        if self.poison:
            self._poison(k, v, kwargs)
        with np.errstate(over="ignore", invalid="ignore"):
            arrays = [x.astype(dtype) for x in (q, k, v)]
        q, k, v = (_laid_out(x.reshape(x.shape[4 - self.rank :]), self.layout) for x in arrays)
        return q, k, v, kwargs

    def _rng(self, purpose: str) -> np.random.Generator:
        return np.random.default_rng(zlib.crc32(f"{self.name} {purpose}".encode()))

    def _poison(self, k: np.ndarray, v: np.ndarray, kwargs: dict[str, Any]) -> None:
        z = self.sizes
        seen = allowed(z, kwargs).reshape(z.B, z.Hk, -1, z.N).any(axis=2)
        bad = [np.nan, np.inf, -np.inf, 3e38]
        if self.poison == "seen":
            for b, h, j in np.argwhere(seen)[:: max(1, int(seen.sum()) // 7)]:
                (k if (h + j) % 2 else v)[b, h, j, (b + j) % 3 :: 5] = bad[j % 3]
            return
        assert not seen.all(), f"{self.name}: every key is seen"
        for n, (b, h, j) in enumerate(np.argwhere(~seen)):
            k[b, h, j], v[b, h, j, n % v.shape[-1] :] = bad[n % 4], bad[(n // 4 + 1) % 4]


def allowed(z: Sizes, kwargs: dict[str, Any]) -> np.ndarray:
    """Return which keys each query sees, (B, H, M, N), before any score is known."""
    key_offset = kwargs.get("key_offset", 0)
    query_offset = kwargs.get("query_offset")
    places = places_of(z, key_offset if query_offset is None else query_offset, key_offset)
    result = np.ones((z.B, z.H, z.M, z.N), bool)
    mask = as_mask(kwargs.get("mask"))
    if mask is not None:
        result &= mask.evaluate(places, z)
    for modifier in as_modifiers(kwargs.get("modifiers")):
        excluded = modifier.excluded(places, z)
        if excluded is not None:
            result &= ~excluded
    return result


def _laid_out(x: np.ndarray, layout: str) -> np.ndarray:
    """Return an array equal to `x` that lies in memory as asked."""
    if layout == "plain":
        return np.ascontiguousarray(x)
    if layout == "swapped":
        return np.ascontiguousarray(x.swapaxes(-2, -3)).swapaxes(-2, -3)
    if layout == "reversed":
        return np.ascontiguousarray(x[..., ::-1, ::-1])[..., ::-1, ::-1]
    if layout == "spaced":
        wide = np.zeros((*x.shape[:-2], 2 * x.shape[-2], 2 * x.shape[-1] + 3), x.dtype)
        wide[..., ::2, 1 : 1 + 2 * x.shape[-1] : 2] = x
        return wide[..., ::2, 1 : 1 + 2 * x.shape[-1] : 2]
    if layout == "columns":
        return np.ascontiguousarray(x.swapaxes(-1, -2)).swapaxes(-1, -2)
    assert layout == "shared", layout
    return np.broadcast_to(x[:1, :1], x.shape)


def sized(**sizes: int) -> Sizes:
    """Return the plain case's sizes with some changed; `Hk` follows `H`, `E` follows `D`."""
    z = {"B": 2, "H": 3, "M": 45, "N": 70, "D": 32, **sizes}
    return Sizes(z["B"], z["H"], z.get("Hk", z["H"]), z["M"], z["N"], z["D"], z.get("E", z["D"]))


def square(length: int = 100, **sizes: int) -> Sizes:
    return sized(M=length, N=length, **sizes)


def with_(**kwargs: Any) -> Callable[[np.random.Generator, Sizes], dict[str, Any]]:
    """Return a rules builder of fixed arguments; functions among them are called with (rng, sizes)."""

    def build(rng: np.random.Generator, z: Sizes) -> dict[str, Any]:
        return {name: x(rng, z) if callable(x) else x for name, x in kwargs.items()}

    return build


def together(rng: np.random.Generator, z: Sizes) -> int:
    """Queries and keys end together."""
    return z.N - z.M


# --- rules that need the sizes ---


def lengths(rng, z):
    return rng.integers(1, z.N + 1, z.B)


def documents(count, length):
    return np.sort(np.arange(length) * count // max(length, 1))


def random_blocks(tile, share=0.4):
    def build(rng, z):
        shape = (z.B, z.H, -(-z.M // tile[0]), -(-z.N // tile[1]))
        return BlockSparse(rng.random(shape) < share, tile)

    return build


def dense(share=0.5, axes="BHMN"):
    def build(rng, z):
        return Dense(rng.random([getattr(z, a) if a in axes else 1 for a in "BHMN"]) < share)

    return build


def bias(axes="BHMN", dtype=np.float32, excluded=0.0):
    def build(rng, z):
        shape = [getattr(z, a) if a in axes else 1 for a in "BHMN"]
        array = rng.standard_normal(shape).astype(dtype)
        array[rng.random(shape) < excluded] = -np.inf
        return Bias(array)

    return build


def empty_rows(rng, z):
    array = rng.random((z.B, z.H, z.M, z.N)) < 0.3
    array[:, :, ::3] = False
    return Dense(array)


def slopes(rng, z):
    return ALiBi(2.0 ** -np.linspace(1, 8, z.H))


def span(largest, axes="BHM", ramp=9.5):
    """Return spans from below -ramp, which see nothing, to `largest`."""

    def build(rng, z):
        shape = [getattr(z, a) if a in axes else 1 for a in "BHM"]
        return AdaptiveSpan(rng.uniform(-1.2 * ramp, largest, shape), ramp)

    return build


def bilinear(*heads):
    def build(rng, z):
        return Bilinear(rng.standard_normal((*(getattr(z, a) for a in heads), z.D, z.D)) / z.D)

    return build


def additive(rng, z, hidden=5):
    wq, wk = (rng.standard_normal((hidden, z.D)) / z.D for _ in range(2))
    return Additive(wq, wk, rng.standard_normal(hidden) / np.sqrt(hidden))


def additive_by_head(rng, z):
    wq, wk = (rng.standard_normal((heads, 7, z.D)) / z.D for heads in (z.H, z.Hk))
    return Additive(wq, wk, rng.standard_normal((z.H, 7)))


def custom_table(rng, z):
    return CustomMask(lambda b, h, i, j, p: (p[0][b, j] < 3) | (i == j), params=(rng.integers(0, 6, (z.B, z.N)),))


def custom_relative(rng, z):
    table = rng.standard_normal((z.H, z.M + z.N)).astype(np.float32)
    return CustomModifier(lambda s, b, h, i, j, p: s + p[0][h, i - j + p[1]], params=(table, z.N))


DECAY = CustomModifier(
    lambda s, b, h, i, j, p: s * np.exp(-p[0] * abs(i - j)) + np.log(1.0 + abs(j)) - np.sqrt(abs(i) * p[1]),
    params=(0.02, 0.5),
)
BLOCK_DIAGONAL = CustomMask(lambda b, h, i, j, p: i // p[0] == j // p[0], params=(24,))
STRIDED = CustomMask(lambda b, h, i, j, p: ((i - j) % p[0] == 0) & (j <= i), params=(7,))
WITH_TILE = CustomMask(
    lambda b, h, i, j, p: j < p[0] + (i - i),
    params=(37,),
    tile=lambda b, h, i0, i1, j0, j1, p: (j0 < p[0]) * 1 + (j1 <= p[0]) * 1,
)


def cases() -> Iterator[Case]:
    yield Case("plain", sized())
    yield from sizes_and_layouts()
    yield from masks()
    yield from modifiers()
    yield from options()
    yield from scores()
    yield from normalizers()
    yield from pairs()


def sizes_and_layouts() -> Iterator[Case]:
    for d in (1, 3, 5, 8, 16, 17, 40, 64, 80, 96, 128, 256):
        yield Case(f"head size {d}", sized(D=d))
    for d, e in ((64, 32), (32, 64), (5, 17), (40, 1), (1, 40), (128, 96), (17, 256)):
        yield Case(f"head size {d}, value size {e}", sized(D=d, E=e))
    for m in (0, 1, 2, 7, 8, 9, 16, 24, 25, 97, 300):
        yield Case(f"{m} queries", sized(M=m))
    for n in (0, 1, 2, 15, 16, 17, 31, 33, 48, 49, 127, 128, 300, 1000, 1601):
        yield Case(f"{n} keys", sized(N=n))
    yield Case("1 query, 1 key", sized(M=1, N=1))
    yield Case("nothing at all", sized(M=0, N=0))
    yield Case("no sequence", sized(B=0))
    yield Case("5 sequences, 1 head", sized(B=5, H=1))
    yield Case("grouped heads", sized(H=6, Hk=2))
    yield Case("one key head", sized(H=5, Hk=1))
    for layout in ("swapped", "reversed", "spaced", "columns", "shared"):
        yield Case(f"layout {layout}", sized(D=40, E=24), layout=layout)
    yield Case("layout swapped, grouped heads", sized(H=6, Hk=3, D=64), layout="swapped")
    yield Case("rank 2", sized(B=1, H=1), rank=2)
    yield Case("rank 3", sized(B=1, H=4, Hk=2), rank=3)


def masks() -> Iterator[Case]:
    yield Case("Causal", square(), with_(mask=Causal()))
    yield Case("Causal, long", square(1000, B=1, H=2), with_(mask=Causal()))
    yield Case("Causal, ends together", sized(), with_(mask=Causal(), query_offset=together))
    yield Case("Causal, starts together", sized(), with_(mask=Causal(), query_offset=0))
    yield Case("Causal, more queries than keys", sized(M=90, N=40), with_(mask=Causal(), query_offset=together))
    yield Case(
        "Causal, offsets by sequence",
        sized(),
        with_(mask=Causal(), query_offset=np.array([3, -20]), key_offset=np.array([-5, 1])),
    )
    yield Case("Causal, everything in the past", sized(), with_(mask=Causal(), query_offset=1000))
    yield Case("Causal, everything in the future", sized(), with_(mask=Causal(), query_offset=-1000))
    yield Case("SlidingWindow to the left", square(300, B=1), with_(mask=SlidingWindow(40, 0)))
    yield Case("SlidingWindow both sides", square(130), with_(mask=SlidingWindow(9, 17)))
    yield Case("SlidingWindow open left", square(), with_(mask=SlidingWindow(-1, 5)))
    yield Case("SlidingWindow open right", square(), with_(mask=SlidingWindow(5, -1)))
    yield Case("SlidingWindow, diagonal only", square(), with_(mask=SlidingWindow(0, 0)))
    yield Case("SlidingWindow, long", square(1200, B=1, H=1), with_(mask=SlidingWindow(100, 0)))
    yield Case("Padding", sized(B=4), with_(mask=lambda rng, z: Padding(lengths(rng, z))))
    yield Case("Padding on the left", sized(B=3), with_(mask=Padding(70, key_starts=[0, 13, 69])))
    yield Case("Padding of queries", sized(B=3), with_(mask=Padding([70, 33, 16], query_lengths=[45, 0, 17])))
    yield Case("Padding, an empty sequence", sized(B=3), with_(mask=Padding([0, 70, 1])))
    yield Case("SameDocument", square(150), with_(mask=lambda rng, z: SameDocument(documents(5, z.M))))
    yield Case(
        "SameDocument, unordered",
        sized(),
        with_(mask=lambda rng, z: SameDocument(rng.integers(0, 4, (z.B, z.M)), rng.integers(0, 5, (z.B, z.N)))),
    )
    yield Case("PrefixLM", square(), with_(mask=PrefixLM([17, 60])))
    yield Case("PrefixLM, offsets", sized(), with_(mask=PrefixLM(20), query_offset=together))
    yield Case("BlockSparse", square(160), with_(mask=random_blocks((32, 16))))
    yield Case("BlockSparse, odd tile", sized(M=133, N=141), with_(mask=random_blocks((20, 7))))
    yield Case(
        "BlockSparse, broadcast",
        sized(),
        with_(mask=lambda rng, z: BlockSparse(rng.random((1, 3, 1, 5)) < 0.5, (45, 14))),
    )
    yield Case("BlockSparse, long", square(1024, B=1, H=2), with_(mask=random_blocks((64, 64), 0.15)))
    yield Case("Neighborhood 1-D", square(96), with_(mask=Neighborhood(96, 7)))
    yield Case("Neighborhood 2-D", square(192, B=1), with_(mask=Neighborhood((12, 16), (5, 3))))
    yield Case("Neighborhood 2-D dilated", square(192, B=1), with_(mask=Neighborhood((12, 16), (4, 3), (2, 5))))
    yield Case("Neighborhood 3-D", square(120, B=1), with_(mask=Neighborhood((4, 5, 6), 3)))
    yield Case(
        "Neighborhood, a part of the queries",
        sized(M=40, N=192),
        with_(mask=Neighborhood((12, 16), 5), query_offset=70),
    )
    yield Case("Dense", sized(), with_(mask=dense()))
    for axes in ("MN", "BN", "HM", "N", "HMN", ""):
        yield Case(f"Dense ({axes})", sized(), with_(mask=dense(0.7, axes)))
    yield Case("boolean array", sized(), with_(mask=lambda rng, z: rng.random((z.M, z.N)) < 0.5))
    yield Case(
        "boolean array, strided",
        sized(),
        with_(mask=lambda rng, z: (rng.random((z.B, 1, z.N, z.M)) < 0.5).swapaxes(2, 3)),
    )
    yield Case("CustomMask, blocks", square(), with_(mask=BLOCK_DIAGONAL))
    yield Case("CustomMask, strides", square(), with_(mask=STRIDED, query_offset=-30, key_offset=-40))
    yield Case("CustomMask, table", square(70), with_(mask=custom_table))
    yield Case("CustomMask, own tile", sized(), with_(mask=WITH_TILE, query_offset=0))
    yield Case(
        "CustomMask, floats",
        square(),
        with_(mask=CustomMask(lambda b, h, i, j, p: np.sqrt(abs(i - j)) * 0.5 < p[0], params=(2.25,))),
    )
    yield Case("mask & mask", square(), with_(mask=Causal() & SlidingWindow(30, 30) & Padding([100, 55])))
    yield Case("mask | mask", square(), with_(mask=SlidingWindow(4, 4) | Padding([10, 30])))
    yield Case("~mask", square(), with_(mask=~SlidingWindow(20, 20)))
    yield Case("array & mask", square(), with_(mask=lambda rng, z: (rng.random((z.M, z.N)) < 0.8) & Causal()))
    yield Case("mask | array", square(), with_(mask=lambda rng, z: Causal() | (rng.random((z.H, 1, z.N)) < 0.1)))
    yield Case(
        "nested masks", square(), with_(mask=~(Causal() & ~Padding([50, 9])) & (SlidingWindow(-1, 40) | BLOCK_DIAGONAL))
    )


def modifiers() -> Iterator[Case]:
    yield Case("SoftCap", sized(), with_(modifiers=SoftCap(2.0)), amplitude=2.0)
    yield Case("SoftCap, far from the cap", sized(), with_(modifiers=SoftCap(1000.0)))
    for axes in ("BHMN", "HMN", "MN", "N", "BHM", ""):
        yield Case(f"Bias ({axes})", sized(), with_(modifiers=bias(axes)))
    yield Case("Bias, float64", sized(), with_(modifiers=bias("HMN", np.float64)))
    yield Case("Bias, float16", sized(), with_(modifiers=bias("HMN", np.float16)))
    yield Case("Bias, some minus infinity", sized(), with_(modifiers=bias("HMN", excluded=0.3)))
    yield Case("Bias, whole rows minus infinity", sized(), with_(modifiers=bias("HM", excluded=0.3)))
    yield Case(
        "Bias, strided",
        sized(),
        with_(modifiers=lambda rng, z: Bias(rng.standard_normal((z.H, z.N, z.M)).swapaxes(1, 2))),
    )
    yield Case("ALiBi", square(), with_(modifiers=slopes))
    yield Case("ALiBi, offsets", sized(), with_(modifiers=slopes, query_offset=np.array([25, -7]), key_offset=3))
    yield Case("Temperature", sized(), with_(modifiers=lambda rng, z: Temperature(rng.random((z.B, z.H, z.M)) + 0.2)))
    yield Case("Temperature, one number", sized(), with_(modifiers=Temperature(0.3)))
    yield Case("AdaptiveSpan", square(), with_(modifiers=AdaptiveSpan(20, 10)))
    for axes in ("BHM", "HM", "BH", "H", "M", "B"):
        yield Case(f"AdaptiveSpan ({axes})", square(), with_(modifiers=span(60, axes)))
    yield Case("AdaptiveSpan, long", square(1000, B=1, H=2), with_(modifiers=span(250, "H", ramp=32)))
    yield Case(
        "AdaptiveSpan, long and by query",
        square(900, B=1, H=1),
        with_(modifiers=lambda rng, z: AdaptiveSpan(100 + 90 * np.sin(np.arange(z.M) / 50), 16)),
    )
    yield Case("AdaptiveSpan, ends together", sized(D=17), with_(modifiers=span(30), query_offset=together))
    yield Case(
        "AdaptiveSpan, offsets by sequence",
        sized(),
        with_(modifiers=span(30), query_offset=np.array([25, -60]), key_offset=np.array([-5, 1])),
    )
    yield Case("AdaptiveSpan, nothing near", sized(), with_(modifiers=span(30), query_offset=1000))
    yield Case("AdaptiveSpan, short ramp", square(), with_(modifiers=AdaptiveSpan(12.25, 0.5)))
    yield Case("AdaptiveSpan, long ramp", square(), with_(modifiers=AdaptiveSpan(-3, 300.0)))
    yield Case("AdaptiveSpan, wider than all", square(), with_(modifiers=AdaptiveSpan(1e12, 1.0)))
    yield Case("ReplaceExcluded", square(), with_(modifiers=ReplaceExcluded(SlidingWindow(10, 3), -2.5)))
    yield Case(
        "ReplaceExcluded, large", sized(), with_(modifiers=lambda rng, z: ReplaceExcluded(empty_rows(rng, z), -1e4))
    )
    yield Case(
        "ReplaceExcluded, array or mask",
        square(),
        with_(modifiers=lambda rng, z: ReplaceExcluded((rng.random((z.M, z.N)) < 0.3) | ~Causal(), 0.0)),
    )
    yield Case("CustomModifier", square(), with_(modifiers=DECAY))
    yield Case("CustomModifier, table", sized(), with_(modifiers=custom_relative, query_offset=0))
    yield Case(
        "CustomModifier, constant", sized(), with_(modifiers=CustomModifier(lambda s, b, h, i, j, p: 0), query_offset=0)
    )
    yield Case(
        "modifiers in order",
        square(),
        with_(modifiers=lambda rng, z: [SoftCap(3.0), bias()(rng, z), Temperature(2.0), slopes(rng, z)]),
    )
    yield Case(
        "modifiers in another order",
        square(),
        with_(modifiers=lambda rng, z: (slopes(rng, z), bias()(rng, z), SoftCap(3.0))),
    )
    yield Case(
        "Bias minus infinity, then SoftCap",
        sized(),
        with_(modifiers=lambda rng, z: [bias("HMN", excluded=0.4)(rng, z), SoftCap(5.0)]),
    )


def options() -> Iterator[Case]:
    yield Case("scale 0", sized(), with_(scale=0.0))
    yield Case("scale negative", sized(), with_(scale=-0.3))
    yield Case("scale 1", sized(), with_(scale=1.0))
    yield Case("scale tiny", sized(), with_(scale=1e-6))
    yield Case("sharp", sized(), with_(scale=4.0), amplitude=1.5)
    yield Case("Dot and Softmax by name", sized(), with_(score=Dot(), normalizer=Softmax()))
    yield Case("sink", sized(), with_(normalizer=Softmax(sink=0.5)))
    yield Case("sink by head", sized(), with_(normalizer=lambda rng, z: Softmax(rng.standard_normal(z.H))))
    yield Case(
        "sink by sequence and head", sized(), with_(normalizer=lambda rng, z: Softmax(rng.standard_normal((z.B, z.H))))
    )
    yield Case("sink above all", sized(), with_(normalizer=Softmax(60.0)))
    yield Case("sink below all", sized(), with_(normalizer=Softmax(-60.0)))
    yield Case("sink minus infinity", sized(), with_(normalizer=Softmax(-np.inf)))
    yield Case("sink without keys", sized(N=0), with_(normalizer=Softmax(0.25)))
    yield Case("empty rows", sized(), with_(mask=empty_rows))
    yield Case("empty rows with a sink", sized(), with_(mask=empty_rows, normalizer=Softmax([0.1, -2.0, 3.0])))
    yield Case("no key allowed", sized(), with_(mask=Padding(0)))
    yield Case("dropout", sized(), with_(dropout=Dropout(0.3, 1234), query_offset=0))
    yield Case("dropout, rate 0", sized(), with_(dropout=Dropout(0.0, 5), query_offset=0))
    yield Case("dropout, seed by sequence", square(), with_(dropout=Dropout(0.5, [2**40 + 7, 3])))
    yield Case("dropout, wide seed", square(), with_(dropout=Dropout(0.9, 2**64 - 1)))
    yield Case("dropout, part of a call", square(), with_(dropout=DropoutPart(0.4, 99, first_sequence=5, first_head=3)))
    yield Case(
        "dropout, offsets",
        sized(),
        with_(dropout=Dropout(0.25, 99), query_offset=np.array([-3, 41]), key_offset=np.array([-6, 5])),
    )


def scores() -> Iterator[Case]:
    yield Case("Cosine", sized(), with_(score=Cosine()))
    yield Case("Cosine, sharp", sized(), with_(score=Cosine(), scale=20.0))
    yield Case("Cosine and causal and grouped heads", square(H=6, Hk=2, D=17), with_(score=Cosine(), mask=Causal()))
    yield Case("Cosine, layout columns", sized(D=40), with_(score=Cosine()), layout="columns")
    yield Case("Bilinear", sized(), with_(score=bilinear()))
    yield Case("Bilinear by head, grouped heads", sized(H=6, Hk=3, E=9), with_(score=bilinear("H"), scale=-0.7))
    yield Case("Bilinear and modifiers", square(), with_(score=bilinear(), modifiers=SoftCap(2.0), mask=Causal()))
    yield Case("hidden NaN and Cosine", sized(B=3), with_(score=Cosine(), mask=Padding([70, 33, 0])), poison="hidden")


def normalizers() -> Iterator[Case]:
    yield Case("Additive", sized(), with_(score=additive))
    yield Case("Additive by head, grouped heads", sized(H=6, Hk=2, E=33), with_(score=additive_by_head))
    yield Case("Additive, many hidden units", sized(M=17, N=41), with_(score=lambda rng, z: additive(rng, z, 700)))
    yield Case(
        "Additive and Sparsemax and causal", square(), with_(score=additive, normalizer=Sparsemax(), mask=Causal())
    )
    for normalizer in (Sparsemax(), Entmax15(), DoubleSoftmax()):
        name = type(normalizer).__name__
        yield Case(name, sized(), with_(normalizer=normalizer))
        yield Case(f"{name}, sharp", sized(), with_(normalizer=normalizer, scale=3.0), amplitude=1.5)
        yield Case(f"{name}, flat", sized(), with_(normalizer=normalizer, scale=1e-3))
        yield Case(f"{name}, negative scale", sized(), with_(normalizer=normalizer, scale=-0.3))
        yield Case(f"{name}, many keys", sized(B=1, H=2, Hk=1, M=20, N=1777), with_(normalizer=normalizer))
        yield Case(f"{name}, one query", sized(M=1, N=900), with_(normalizer=normalizer))
        yield Case(f"{name}, one key", sized(N=1), with_(normalizer=normalizer))
        yield Case(f"{name}, no key", sized(N=0), with_(normalizer=normalizer))
        yield Case(
            f"{name}, dropout and empty rows",
            sized(),
            with_(normalizer=normalizer, dropout=Dropout(0.3, 77), mask=empty_rows, query_offset=0),
        )
        yield Case(
            f"{name}, modifiers",
            square(),
            with_(normalizer=normalizer, modifiers=lambda rng, z: [SoftCap(2.0), slopes(rng, z)]),
        )
        yield Case(f"{name} and Cosine", sized(), with_(normalizer=normalizer, score=Cosine(), scale=5.0))


def pairs() -> Iterator[Case]:
    yield Case(
        "window and decode", sized(B=3, H=6, Hk=2, M=1, N=300), with_(mask=SlidingWindow(63, 0), query_offset=299)
    )
    yield Case("causal and chunk of a prompt", sized(M=32, N=300), with_(mask=Causal(), query_offset=200))
    yield Case("causal and grouped heads", square(H=6, Hk=2, D=64), with_(mask=Causal()), layout="swapped")
    yield Case(
        "causal and documents", square(200, B=1), with_(mask=lambda rng, z: Causal() & SameDocument(documents(6, z.M)))
    )
    yield Case(
        "causal and padding on the left", square(B=3), with_(mask=Causal() & Padding(100, key_starts=[0, 40, 100]))
    )
    yield Case(
        "causal and sinks",
        square(D=64),
        with_(mask=Causal() & SlidingWindow(20, 0), normalizer=Softmax([0.3, -1.0, 2.0])),
    )
    yield Case(
        "window, first keys kept",
        square(300, B=1),
        with_(mask=Causal() & (SlidingWindow(32, 0) | CustomMask(lambda b, h, i, j, p: j < 4))),
    )
    yield Case("grouped heads and head biases", sized(H=6, Hk=2), with_(modifiers=bias("HMN"), mask=dense(0.5, "HMN")))
    yield Case(
        "soft cap and causal and grouped heads", square(H=4, Hk=2, D=64), with_(mask=Causal(), modifiers=SoftCap(5.0))
    )
    yield Case("ALiBi and causal", square(200, B=1, H=4), with_(mask=Causal(), modifiers=slopes))
    yield Case("span and causal and grouped heads", square(200, H=6, Hk=2), with_(mask=Causal(), modifiers=span(40)))
    yield Case(
        "span and causal and rows before all keys",
        sized(),
        with_(mask=Causal(), modifiers=span(30), query_offset=-20, normalizer=Softmax(0.5)),
    )
    yield Case("span and random mask", square(), with_(mask=dense(0.5), modifiers=span(40)))
    yield Case("span and neighborhood", square(96), with_(mask=Neighborhood(96, 7), modifiers=AdaptiveSpan(1, 3)))
    yield Case("span and sink", square(), with_(modifiers=span(40), normalizer=Softmax([0.3, -1.0, 2.0])))
    yield Case("span and dropout", square(), with_(modifiers=span(40), dropout=Dropout(0.3, 8)))
    yield Case("span and Cosine", square(), with_(modifiers=span(40), score=Cosine(), scale=9.0))
    yield Case("span, then soft cap", square(), with_(modifiers=lambda rng, z: [span(40)(rng, z), SoftCap(3.0)]))
    yield Case("soft cap, then span", square(), with_(modifiers=lambda rng, z: [SoftCap(3.0), span(40)(rng, z)]))
    yield Case("span and ALiBi", square(), with_(modifiers=lambda rng, z: [slopes(rng, z), span(40)(rng, z)]))
    yield Case("span of a span", square(), with_(modifiers=lambda rng, z: [span(60, "H")(rng, z), span(40)(rng, z)]))
    for scale in (0.0, -0.3, 1e-25, 1e-6, 3.7):
        yield Case(f"span, scale {scale}", square(D=17), with_(modifiers=span(40), scale=scale))
    yield Case(
        "dropout and causal and grouped heads", square(H=4, Hk=1), with_(mask=Causal(), dropout=Dropout(0.4, 17))
    )
    yield Case(
        "dropout and empty rows and sink",
        sized(),
        with_(mask=empty_rows, dropout=Dropout(0.4, 17), query_offset=0, normalizer=Softmax(0.0)),
    )
    yield Case(
        "old fill, divided by the size",
        square(40, H=1),
        with_(modifiers=lambda rng, z: [ReplaceExcluded(empty_rows(rng, z), -1e9), Temperature(float(z.D))], scale=1.0),
    )
    yield Case(
        "bias minus infinity and empty rows", sized(), with_(modifiers=bias("HMN", excluded=0.2), mask=empty_rows)
    )
    yield Case("hidden NaN behind a mask", sized(B=3), with_(mask=Padding([70, 33, 0])), poison="hidden")
    yield Case(
        "hidden NaN between keys",
        sized(),
        with_(mask=lambda rng, z: rng.random((z.B, 1, 1, z.N)) < 0.6),
        poison="hidden",
    )
    yield Case(
        "hidden NaN and causal",
        sized(M=60, N=90),
        with_(mask=Causal() & dense(0.8, "BN")(np.random.default_rng(3), sized(M=60, N=90)), query_offset=0),
        poison="hidden",
    )
    yield Case(
        "hidden NaN and bias",
        sized(),
        with_(modifiers=lambda rng, z: [bias("BN", excluded=0.4)(rng, z), SoftCap(4.0)]),
        poison="hidden",
    )
    yield Case(
        "hidden NaN and span",
        sized(M=40, N=300),
        with_(modifiers=span(30, "BH"), query_offset=np.array([20, 200])),
        poison="hidden",
    )
    yield Case(
        "hidden NaN and span and soft cap",
        sized(M=40, N=300),
        with_(modifiers=lambda rng, z: [span(30)(rng, z), SoftCap(3.0)], query_offset=130),
        poison="hidden",
    )
    yield Case(
        "hidden NaN and replaced scores",
        sized(),
        with_(mask=dense(0.6, "BN"), modifiers=ReplaceExcluded(Padding(30), 1.5)),
        poison="hidden",
    )
    yield Case(
        "hidden NaN and blocks, grouped heads",
        sized(H=4, Hk=2, M=64, N=96),
        with_(mask=lambda rng, z: BlockSparse(rng.random((z.B, 1, 4, 6)) < 0.3, 16) & Padding([70, 96])),
        poison="hidden",
    )
    yield Case("seen NaN", sized(), poison="seen")
    yield Case("seen NaN and causal", square(), with_(mask=Causal()), poison="seen")
    yield Case("seen NaN and window", square(300, B=1), with_(mask=SlidingWindow(20, 20)), poison="seen")
    yield Case("seen NaN and span", square(300, B=1), with_(modifiers=span(60)), poison="seen")
    yield Case("seen NaN and random mask", sized(E=17), with_(mask=dense(0.1)), poison="seen")


CASES = tuple(cases())
BY_NAME = {case.name: case for case in CASES}


def rules_of(kwargs: dict[str, Any]) -> Iterator[Any]:
    """Yield every rule in the arguments of a call, those inside other rules included."""

    def inside(mask: Any) -> Iterator[Any]:
        yield mask
        for part in mask.masks if isinstance(mask, (AllOf, AnyOf)) else (mask.mask,) if isinstance(mask, Not) else ():
            yield from inside(part)

    if kwargs.get("mask") is not None:
        yield from inside(as_mask(kwargs["mask"]))
    for modifier in as_modifiers(kwargs.get("modifiers")):
        yield modifier
        if isinstance(modifier, ReplaceExcluded):
            yield from inside(modifier.mask)
    yield from (kwargs[name] for name in ("score", "normalizer", "dropout") if name in kwargs)
