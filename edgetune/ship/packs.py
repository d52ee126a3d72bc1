"""Android's asset packs: which file lies in which, and the Gradle file that makes a folder one.

Source: https://developer.android.com/guide/playcore/asset-delivery/integrate-java.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

from edgetune.formats.storage import write_file
from edgetune.ship.budget import SizedFile
from edgetune.ship.platforms import SMALL_PACK, Delivery

MODEL_PACK = "edgetune_model"
"""Holds everything but the weights, and these too where they are small."""
ASSETS = "src/main/assets"
"""Where a pack's files lie in it."""


def assign_packs(files: Sequence[SizedFile]) -> list[SizedFile]:
    """Give every file its pack and the way in which that is delivered."""
    small = sum(file.size for file in files) <= SMALL_PACK
    return [
        replace(file, pack=MODEL_PACK, delivery="install-time")
        if small or file.content != "weights"
        else replace(file, pack="edgetune_" + PurePosixPath(file.path).stem.replace("-", "_"), delivery="fast-follow")
        for file in files
    ]


def move_into_packs(folder: Path, files: Iterable[SizedFile]) -> None:
    """Turn a plain folder of files into one of asset packs, each a Gradle module."""
    deliveries: dict[str, Delivery] = {}
    for file in files:
        if file.pack is not None and file.delivery is not None:
            path = folder / file.pack / ASSETS / file.path
            path.parent.mkdir(parents=True, exist_ok=True)
            (folder / file.path).rename(path)
            deliveries[file.pack] = file.delivery
    for parent in {PurePosixPath(file.path).parts[0] for file in files if "/" in file.path}:
        (folder / parent).rmdir()
    for pack, delivery in deliveries.items():
        write_file(folder / pack / "build.gradle.kts", _gradle(pack, delivery).encode())


def _gradle(pack: str, delivery: Delivery) -> str:
    return f"""plugins {{ id("com.android.asset-pack") }}

assetPack {{
    packName.set("{pack}")
    dynamicDelivery {{ deliveryType.set("{delivery}") }}
}}
"""
