"""Decoder layers in numpy: where the epsilon of their norms comes from; test_fpga_hls has what they compute."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgetune.errors import VerificationError
from edgetune.formats.bundle import Bundle, load_bundle
from edgetune.runtimes.fpga_hls.decoder import DecoderLayers
from support.bundle_copy import copy_of_bundle
from support.golden import BUNDLE


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return load_bundle(copy_of_bundle(BUNDLE, tmp_path / "bundle"))


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ("[]", "expected a JSON object, found list; prepare the bundle again"),
        ("{", "not valid JSON"),
        ('{"rms_norm_eps": "small"}', "rms_norm_eps is 'small', expected a number from 0 to 1"),
        ('{"rms_norm_eps": -1e-5}', "rms_norm_eps is -1e-05"),
        ('{"rms_norm_eps": NaN}', "rms_norm_eps is nan"),
        ('{"rms_norm_eps": 1%s}' % ("0" * 400), "rms_norm_eps is 1000"),
    ],
    ids=["a list", "half", "text", "negative", "not a number", "large"],
)
def test_a_configuration_that_nobody_wrote_is_refused(bundle: Bundle, config: str, reason: str) -> None:
    (bundle.path / "config.json").write_text(config)
    with pytest.raises(VerificationError, match=f"{bundle.path / 'config.json'}: {reason}"):
        DecoderLayers(bundle, 1, {})


@pytest.mark.parametrize("config", ["{}", '{"rms_norm_eps": null}', '{"rms_norm_eps": 1e-6}'])
def test_other_configurations_do(bundle: Bundle, config: str) -> None:
    (bundle.path / "config.json").write_text(config)
    assert DecoderLayers(bundle, 1, {}).layers == 1
