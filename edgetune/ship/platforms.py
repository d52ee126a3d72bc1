"""The platforms that an app with a model goes to, and what they let through. All sizes are in bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from edgetune.config import PlatformName

GB = 10**9
"""Stores do not say whether their GB are 10⁹ or 2³⁰ bytes; the smaller is safe."""
STORE_SHARD = 1_400_000_000
"""Weights in a file: under Google Play's 1.5 GB an asset pack, with room for what else is in it."""

_PLAY = "https://support.google.com/googleplay/android-developer/answer/9859372"
_APP_STORE = "https://developer.apple.com/help/app-store-connect/reference/maximum-build-file-sizes"
_ORT_WEB = "https://onnxruntime.ai/docs/tutorials/web/large-models.html"

Delivery = Literal["install-time", "fast-follow"]
Content = Literal["graphs", "weights", "adapter", "text"]
CONTENTS: tuple[Content, ...] = get_args(Content)


@dataclass(frozen=True)
class Limit:
    """How much of something a store or a runtime takes."""

    what: str
    """What is counted, as tables say it."""
    bytes: int
    source: str
    """Who says so."""
    delivery: Delivery | None = None
    """Only packs that are delivered this way count; None: every file."""
    contents: tuple[Content, ...] = CONTENTS
    """What counts."""


@dataclass(frozen=True)
class Platform:
    """One `--target`."""

    shard: int
    """Weights are cut into files of at most this size; a larger tensor has a file of its own."""
    largest_file: int
    """No file may be larger."""
    largest_file_source: str
    limits: tuple[Limit, ...]
    packs: bool = False
    """Whether files lie in asset packs, one for each file of weights; otherwise in one folder."""


PLATFORMS: Mapping[PlatformName, Platform] = {
    "android": Platform(
        shard=STORE_SHARD,
        largest_file=STORE_SHARD,
        largest_file_source=f"an asset pack has at most 1.5 GB, {_PLAY}",
        limits=(
            Limit("install-time asset packs, with the app's modules", 4 * GB, _PLAY, "install-time"),
            Limit("fast-follow asset packs", 4 * GB, _PLAY, "fast-follow"),
        ),
        packs=True,
    ),
    "ios": Platform(
        shard=STORE_SHARD,
        largest_file=STORE_SHARD,
        largest_file_source="the same files as for Android",
        limits=(Limit("the whole app, uncompressed", 4 * GB, _APP_STORE),),
    ),
    # A file that is fetched lies in the page as an ArrayBuffer until it is copied into the module's memory. Small files
    # keep that copy small, a broken transfer cheap, and stay under the 100 MB a file of static hosts (GitHub Pages).
    # The module has 4 GiB, and the graphs with the weights, `step` and `loss`, each have a copy in it.
    "web": Platform(
        shard=96_000_000,
        largest_file=0x7FE00000,
        largest_file_source=f"Chrome's largest ArrayBuffer, {_ORT_WEB}",
        limits=(
            Limit(
                "half the memory of a WebAssembly module, for one of the two copies of the weights in it, beside all "
                "that a step computes",
                (4 << 30) // 2,
                _ORT_WEB,
                contents=("weights",),
            ),
        ),
    ),
    "linux-arm64": Platform(
        shard=STORE_SHARD,
        largest_file=(4 << 30) - 1,
        largest_file_source="FAT32, which memory cards are formatted with",
        limits=(),
    ),
}

SMALL_PACK = 200_000_000
"""Up to here a model for Android is one install-time pack: above, Play asks before it downloads over a mobile network.
ONNX Runtime wants files; assets of an install-time pack lie inside the APK and have to be copied out once, those of a
fast-follow pack are unpacked by Play (https://developer.android.com/guide/playcore/asset-delivery)."""
