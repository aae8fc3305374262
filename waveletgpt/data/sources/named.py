"""Data sets known by name. They have their own licences and are not part of this project."""

from __future__ import annotations

import sysconfig
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from waveletgpt.data.modalities.listops import Generated
from waveletgpt.data.settings import DataSettings
from waveletgpt.data.sources.download import download, verify
from waveletgpt.data.sources.files import Files, Source
from waveletgpt.errors import UserError


@dataclass(frozen=True)
class NamedSet:
    """A data set: its address, how to verify it, and how to prepare it."""

    name: str
    description: str
    modality: str
    """Its default modality."""
    licence: str
    url: str | None
    """Its address; None if it is on every machine."""
    file: str = ""
    """The file name of a copy in the cache or in `data_dir`."""
    size: int | None = None
    """Size of that file in bytes."""
    sha256: str | None = None
    """Its hash. None if none is published: the hash of the first download is then recorded and checked later."""
    include: str | None = None
    exclude: str | None = None
    made: Callable[[DataSettings], Source] | None = None
    """The function that generates it, for a set without files."""
    splits: dict[str, str] = field(default_factory=dict)
    """The set's own splits: file name -> split. If empty, it is divided like any other data."""

    def path(self, settings: DataSettings) -> Path:
        """Where a download of it lies, or will lie."""
        return settings.cache / "downloads" / self.name / self.file


def _python_source() -> Path:
    return Path(sysconfig.get_path("stdlib"))


# Sizes and hashes: text8 and enwik8 as in the Hugging Face hub's and many others' records of the originals, WikiText as
# in Salesforce's original archive (of which the address is its author's copy), Shakespeare as in the repository,
# CIFAR-10 as in many others' records of the original (its site gives the MD5 only), LibriSpeech as in torchaudio's and
# TensorFlow Datasets' records, spoken digits as in those of TensorFlow Datasets, MAESTRO's hash as on its page and its
# size as in MusPy's record. For YouTube-Mix, which stands behind a login, none is published.
NAMED = {
    named.name: named
    for named in (
        NamedSet(
            "python-stdlib", "source of the Python standard library, 10 MB, on every machine", "bytes", "PSF-2.0", None,
            include="*.py",
            exclude="site-packages/*,dist-packages/*,test/*,*/test/*,tests/*,*/tests/*,idlelib/*,lib2to3/*,turtledemo/*,"
            "_sysconfigdata*",
        ),
        NamedSet(
            "text8", "Wikipedia of 2006 as a-z and space, 100 MB", "text8", "CC BY-SA 3.0",
            "http://mattmahoney.net/dc/text8.zip", "text8.zip", 31_344_016,
            "a6640522afe85d1963ad56c05b0ede0a0c000dddc9671758a6cc09b7a38e5232",
        ),
        NamedSet(
            "enwik8", "Wikipedia of 2006 with its markup, 100 MB", "bytes", "CC BY-SA 3.0",
            "http://mattmahoney.net/dc/enwik8.zip", "enwik8.zip", 36_445_475,
            "547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc",
        ),
        NamedSet(
            "wikitext-103", "good and featured articles of Wikipedia, raw, 540 MB, in its own splits", "bpe",
            "CC BY-SA 3.0", "https://wikitext.smerity.com/wikitext-103-raw-v1.zip", "wikitext-103-raw-v1.zip",
            191_984_949, "91c00ae287f0d699e18605c84afc9e45c192bc6b7797ff8837e5474655a33794",
            splits={"wiki.train.raw": "train", "wiki.valid.raw": "validation", "wiki.test.raw": "test"},
        ),
        NamedSet(
            "tiny-shakespeare", "40,000 lines of Shakespeare, 1 MB", "chars", "public domain",
            "https://raw.githubusercontent.com/karpathy/char-rnn/6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e/data/"
            "tinyshakespeare/input.txt", "input.txt", 1_115_394,
            "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
        ),
        NamedSet(
            "imdb", "50,000 film reviews, 65 MB (Maas et al. 2011)", "bytes", "for research; cite the paper",
            "https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz", "aclImdb_v1.tar.gz", 84_125_825,
            "c40f74a18d3b61f90feba1e17730e0d38e8b97c05fde7008942e91923d1658fe",
            include="*/pos/*.txt,*/neg/*.txt",
        ),
        NamedSet(
            "youtube-mix", "4 hours of piano as 241 clips of a minute, 16 kHz, in SaShiMi's splits", "audio",
            "academic research only; log in and accept the terms at huggingface.co/datasets/krandiash/youtubemix",
            "https://huggingface.co/datasets/krandiash/youtubemix/resolve/main/youtubemix.zip", "youtubemix.zip",
            include="*.wav",
            splits={
                f"out{clip:03}.wav": "train" if clip < 212 else "validation" if clip < 226 else "test"
                for clip in range(241)
            },
        ),
        *(
            NamedSet(
                f"librispeech-{part}", f"LibriSpeech {part}: {about} (Panayotov et al. 2015)", "audio",
                "CC BY 4.0", f"https://www.openslr.org/resources/12/{part}.tar.gz", f"{part}.tar.gz", size, sha,
                include="*.flac",
            )
            for part, about, size, sha in (
                ("dev-clean", "5 hours of read books", 337_926_286,
                 "76f87d090650617fca0cac8f88b9416e0ebf80350acb97b343a85fa903728ab3"),
                ("train-clean-100", "100 hours of read books", 6_387_309_499,
                 "d4ddd1d5a6ab303066f14971d768ee43278a5f2a0aa43dc716b0e64ecbbbf6e2"),
                ("train-clean-360", "364 hours of read books", 23_049_477_885,
                 "146a56496217e96c14334a160df97fffedd6e0a04e66b9c5af0d40be3c792ecf"),
                ("train-other-500", "497 hours of read books, harder to understand", 30_593_501_606,
                 "ddb22f27f96ec163645d53215559df6aa36515f26e01dd70798188350adcb6d2"),
            )
        ),
        NamedSet(
            "fsdd", "Free Spoken Digit Dataset 1.0.9: 2,500 digits at 8 kHz (Jackson et al.)", "audio", "CC BY-SA 4.0",
            "https://github.com/Jakobovski/free-spoken-digit-dataset/archive/v1.0.9.tar.gz",
            "free-spoken-digit-dataset-1.0.9.tar.gz", 11_975_353,
            "8bc44cde129d505cbbb6b365c09f80c663f2aa77578afc634e6141a2f87100c0",
            include="*.wav",
        ),
        NamedSet(
            "cifar10", "60,000 pictures of 32 x 32 in 10 classes, official test split (Krizhevsky 2009)", "images",
            "none stated; cite the report", "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
            "cifar-10-binary.tar.gz", 170_052_171, "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
            include="*.bin",
            splits={f"data_batch_{i}.bin": "train" for i in range(1, 6)} | {"test_batch.bin": "test"},
        ),
        NamedSet(
            "maestro", "1,276 piano performances, the MIDI files of MAESTRO v3, in its own splits", "music",
            "CC BY-NC-SA 4.0",
            "https://storage.googleapis.com/magentadata/datasets/maestro/v3.0.0/maestro-v3.0.0-midi.zip",
            "maestro-v3.0.0-midi.zip", 58_416_533, "70470ee253295c8d2c71e6d9d4a815189e35c89624b76d22fce5a019d5dde12c",
            include="*.mid,*.midi,*.csv",
        ),
        NamedSet(
            "listops", "nested operations on digits, generated: `listops_count`, `listops_length`, `listops_seed`",
            "listops", "generated here", None, made=Generated,
        ),
    )
}  # fmt: skip


def fetch(named: NamedSet, settings: DataSettings, progress: bool = True) -> Source:
    """The set's files, from this machine or downloaded, and verified.

    Raises UserError if the address cannot be reached, a copy is not the expected file, or `data_dir` has no copy.
    """
    globs = replace(
        settings,
        include=settings.include or named.include,
        exclude=",".join(filter(None, (settings.exclude, named.exclude))) or None,
    )
    if named.made:
        return named.made(settings)
    if named.url is None:
        return Files(_python_source(), globs, named.name)
    if settings.data_dir:
        path = Path(settings.data_dir).expanduser() / named.file
        if not path.is_file():
            mend = f"get it from {named.url}, or leave `data_dir` out"
            raise UserError(f"no {named.file} in {settings.data_dir}: {mend}")
        verify(path, size=named.size, sha=named.sha256, name=str(path), cache=settings.cache)
    else:
        path = download(
            named.url, named.path(settings), size=named.size, sha=named.sha256, progress=progress, cache=settings.cache
        )
    return Files(path, globs, named.name, named.splits)
