"""Tokenizers of both Phi-3 kinds, opened by transformers and by edgetune."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from edgetune.data.encode import IGNORED, Encoder, load_encoder
from edgetune.data.rows import Message
from edgetune.formats.manifest import RowEncoding
from edgetune.formats.manifest import Tokenizer as TokenizerManifest

EOS = "<|endoftext|>"
TURNS = ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
CORPUS = [
    "the answer is yes, and the lamp in the kitchen is on now",
    "turn the lamp off. what is the answer? hello there, hello world",
    # Two lines are one token where nothing follows, and two tokens where something does.
    "yes\n\n",
] * 4


def llama_kind() -> Tokenizer:
    """As Phi-3 has it: `▁` for spaces, bytes for what is unknown, specials that swallow the white space after them."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    bytes_ = [f"<0x{value:02X}>" for value in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=["<unk>", "<s>", *bytes_], show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    record = json.loads(tokenizer.to_str())
    record["added_tokens"] = [token for token in record["added_tokens"] if token["content"] not in bytes_]
    tokenizer = Tokenizer.from_str(json.dumps(record))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens([AddedToken(EOS, normalized=False)])
    tokenizer.add_special_tokens([AddedToken(turn, rstrip=True, normalized=False) for turn in TURNS])
    return tokenizer


def bytes_kind() -> Tokenizer:
    """As Phi-4-mini has it: bytes from the start, no token in front."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=380, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in ["<s>", EOS, *TURNS]])
    return tokenizer


KINDS: dict[str, Callable[[], Tokenizer]] = {"llama": llama_kind, "bytes": bytes_kind}
MANIFEST = TokenizerManifest(sha256="", chat_template_sha256=None, bos_token="<s>", eos_token=EOS, pad_token_id=0)


class Model:
    """A tokenizer folder as transformers writes it, opened by transformers and by edgetune."""

    def __init__(self, folder: Path, kind: str, template: str | None) -> None:
        transformers = pytest.importorskip("transformers")
        self.folder = folder
        oracle = transformers.PreTrainedTokenizerFast(
            tokenizer_object=KINDS[kind](), bos_token="<s>", eos_token=EOS, pad_token=EOS, chat_template=template
        )
        oracle.save_pretrained(folder)
        self.oracle = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
        self.encoder: Encoder = self.encodes(RowEncoding())

    def encodes(self, encoding: RowEncoding) -> Encoder:
        """An encoder that encodes rows so."""
        return load_encoder(self.folder, MANIFEST, encoding)


_folders: list[TemporaryDirectory[str]] = []


@cache
def tokenizer_model(kind: str, template: str | None) -> Model:
    """A model of one of the `KINDS`, made once."""
    _folders.append(TemporaryDirectory(prefix="edgetune-tests-"))
    return Model(Path(_folders[-1].name), kind, template)


def turns(*contents: str, system: str | None = None) -> tuple[Message, ...]:
    first = () if system is None else (Message("system", system),)
    return first + tuple(
        Message("user" if index % 2 == 0 else "assistant", content) for index, content in enumerate(contents)
    )


def dicts(messages: tuple[Message, ...]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]


def trained_runs(ids: list[int], labels: list[int]) -> list[list[int]]:
    runs: list[list[int]] = [[]]
    for token, label in zip(ids, labels, strict=True):
        assert label in (token, IGNORED)
        if label != IGNORED:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]
