"""Files as people have them: nothing of them is lost, changed or read in another way without a word."""

from __future__ import annotations

import bz2
import codecs
import functools
import gzip
import io
import json
import lzma
import zipfile
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
import zstandard
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from tests.data.sources.test_files import tar
from waveletgpt.data import MODALITIES, DataSettings, find, prepare
from waveletgpt.data.modalities.text import TextModality
from waveletgpt.data.sources.archives import Stream, broken, expand
from waveletgpt.data.sources.hub import Hub
from waveletgpt.data.sources.tables import rows
from waveletgpt.errors import UserError

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstandard.ZstdCompressor().compress,
}  # fmt: skip


def texts(data: Path, **settings: str) -> list[bytes]:
    return [document.read() for document in find(str(data), DataSettings(**settings)).documents(binary=False)]


def read(name: str, content: bytes) -> list[bytes]:
    found = []
    for stream in expand(Stream(name, io.BytesIO(content))):
        with broken(stream.name):
            found.append(stream.file.read())
    return found


def zipped(members: list[bytes], comment: bytes = b"") -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.comment = comment
        for i, content in enumerate(members):
            archive.writestr(f"{i}.txt", content)
    return buffer.getvalue()


@given(parts=st.lists(st.binary(max_size=300), min_size=1, max_size=4), suffix=st.sampled_from([*COMPRESS]))
@hypothesis_settings(max_examples=200, deadline=None)
def test_joined_streams_are_read_to_the_end(parts: list[bytes], suffix: str) -> None:
    assert read(f"x{suffix}", b"".join(map(COMPRESS[suffix], parts))) == [b"".join(parts)]


@given(
    parts=st.lists(st.binary(min_size=1, max_size=300), min_size=1, max_size=3),
    suffix=st.sampled_from([*COMPRESS]),
    cut=st.integers(1, 10_000),
)
@hypothesis_settings(max_examples=200, deadline=None)
def test_streams_that_are_cut_off_are_called_truncated(parts: list[bytes], suffix: str, cut: int) -> None:
    whole = [COMPRESS[suffix](part) for part in parts]
    last = whole[-1]
    content = b"".join(whole[:-1]) + last[: 1 + cut % (len(last) - 1)]
    with pytest.raises(UserError, match=r"x\S* is truncated"):
        read(f"x{suffix}", content)


@given(parts=st.lists(st.lists(st.binary(max_size=600), max_size=3), min_size=1, max_size=3))
@hypothesis_settings(max_examples=200, deadline=None)
def test_joined_tars_give_all_their_members(parts: list[list[bytes]]) -> None:
    content = b"".join(tar({f"{i}.txt": member for i, member in enumerate(part)}) for part in parts)
    assert read("x.tar", content) == [member for part in parts for member in part]


MEMBERS = st.lists(st.binary(max_size=200), max_size=3)


@given(parts=st.lists(MEMBERS, min_size=2, max_size=3), comment=st.binary(max_size=30), before=st.binary(max_size=99))
@hypothesis_settings(max_examples=200, deadline=None)
def test_joined_zips_lose_nothing_silently(parts: list[list[bytes]], comment: bytes, before: bytes) -> None:
    content = before + b"".join(zipped(part, comment) for part in parts)
    filled = [i for i, part in enumerate(parts) if part]
    if filled in ([], [len(parts) - 1]):
        assert read("x.zip", content) == parts[-1]
    else:
        with pytest.raises(UserError, match="several ZIPs joined"):
            read("x.zip", content)


@given(members=MEMBERS, comment=st.binary(max_size=30), cut=st.integers(1, 10_000), whole=st.booleans())
@hypothesis_settings(max_examples=200, deadline=None)
def test_zips_that_are_cut_off_or_go_on_are_named(members: list[bytes], comment: bytes, cut: int, whole: bool) -> None:
    content = zipped([*members, b"one more"])
    part = content[: 4 + cut % (len(content) - 4)]
    if whole:  # one archive, and the beginning of another behind it
        with pytest.raises(UserError, match=r"several ZIPs joined|after its end|truncated|broken"):
            read("x.zip", zipped(members, comment) + part)
    else:
        with pytest.raises(UserError, match=r"x\.zip is truncated"):
            read("x.zip", part)
    assert read("x.zip", content + bytes(cut % 9)) == [*members, b"one more"]


@given(
    parts=st.lists(st.lists(st.binary(max_size=600), min_size=1, max_size=3), min_size=1, max_size=3),
    suffix=st.sampled_from([*COMPRESS]),
    cut=st.integers(1, 100_000),
)
@hypothesis_settings(max_examples=200, deadline=None)
def test_compressed_tars_are_read_to_the_end_or_named(parts: list[list[bytes]], suffix: str, cut: int) -> None:
    whole = [tar({f"{i}.txt": member for i, member in enumerate(part)}) for part in parts]
    content = b"".join(map(COMPRESS[suffix], whole))
    assert read(f"x.tar{suffix}", content) == [member for part in parts for member in part]
    with pytest.raises(UserError, match="is truncated"):
        read("x.tar", whole[-1][: 1 + cut % (512 + len(parts[-1][0]) - 1)] if parts[-1][0] else whole[-1][:100])


def test_a_zip_whose_directory_points_before_its_beginning_is_broken() -> None:
    for field, more in ((12, 40), (16, 40)):  # the directory's size and its place
        content = bytearray(zipped([b"text"]))
        content[content.index(b"PK\5\6") + field] += more
        with pytest.raises(UserError, match=r"x\.zip is broken"):
            read("x.zip", bytes(content))


def test_what_is_cut_off_between_members_is_said(caplog: pytest.LogCaptureFixture) -> None:
    assert read("x.tar", tar({"a.txt": b"a" * 512, "b.txt": b"b"})[:1024]) == [b"a" * 512]
    assert "x.tar ends without the mark of its end: it may be truncated" in caplog.text


def test_one_message_per_cause(tmp_path: Path) -> None:
    text = b"some text " * 99
    flipped = bytearray(gzip.compress(text))
    flipped[-6] ^= 1
    deflate64 = bytearray(zipped([text]))
    for place in (8, deflate64.index(b"PK\1\2") + 10):
        deflate64[place] = 9
    random = Random(0)
    dictionary = zstandard.train_dictionary(2000, [random.randbytes(20) * 9 for _ in range(200)])
    for name, content, message in (
        ("x.gz", gzip.compress(text)[:20], "x is truncated|x.gz is truncated"),
        ("x.gz", bytes(flipped), "x.gz is broken|x is broken"),
        ("x.gz", b"no gzip at all", "broken .*Not a gzipped file"),
        ("x.zip", bytes(deflate64), "packed in a way that is not supported"),
        ("x.zst", zstandard.ZstdCompressor(dict_data=dictionary).compress(text), "not supported .*[Dd]ictionary"),
        ("x.zip", b"no zip at all", "x.zip is broken"),
    ):
        with pytest.raises(UserError, match=message):
            read(name, content)
    (tmp_path / "x.7z").write_bytes(b"7z\xbc\xaf\x27\x1c" + bytes(99))
    with pytest.raises(UserError, match=r"x\.7z is packed in a way that is not supported: unpack it first"):
        texts(tmp_path / "x.7z")


@pytest.mark.parametrize("slash", ["/", "\\"])
def test_zips_with_either_slash(slash: str, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for name in ("a/one.txt", "b/two.txt", ".git/three.txt"):
            archive.writestr(zipfile.ZipInfo(name.replace("/", slash)), name)
    assert texts(tmp_path / "x.zip") == [b"a/one.txt", b"b/two.txt"]
    assert texts(tmp_path / "x.zip", include="b/*") == [b"b/two.txt"]


def test_long_windows_of_zstandard(tmp_path: Path) -> None:
    chosen = zstandard.ZstdCompressionParameters(window_log=28, compression_level=1)
    compressor = zstandard.ZstdCompressor(compression_params=chosen).compressobj()  # its length is not known
    (tmp_path / "x.txt.zst").write_bytes(compressor.compress(b"some text") + compressor.flush())
    assert texts(tmp_path / "x.txt.zst") == [b"some text"]


def test_encrypted_zips_are_called_so(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("a.txt", "text")
    content = bytearray((tmp_path / "x.zip").read_bytes())
    content[content.index(b"PK\1\2") + 8] |= 1
    content[6] |= 1
    (tmp_path / "x.zip").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.txt is encrypted"):
        texts(tmp_path / "x.zip")


FIELDS = st.text(st.characters(exclude_characters="\t\r\n\0", exclude_categories=["Cs"]), min_size=1, max_size=12)


@given(st.lists(FIELDS | st.sampled_from(['"', 'say "so"', '"open', "''"]), min_size=1, max_size=8))
@hypothesis_settings(max_examples=200, deadline=None)
def test_a_quote_in_tsv_is_a_character(fields: list[str]) -> None:
    content = "id\ttext\n" + "".join(f"{i}\t{field}\n" for i, field in enumerate(fields))
    found = rows(Stream("x.tsv", io.BytesIO(content.encode())), None)
    assert found is not None
    assert [text for _, text in found] == fields


def test_a_table_without_header(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text('"3","a b c d e f"\n"4","g h"\n')
    with pytest.raises(UserError, match=r"seems to have no header.*`column=0 \.\.\. 1`"):
        texts(tmp_path / "x.csv")
    assert texts(tmp_path / "x.csv", column="1") == [b"a b c d e f", b"g h"]
    with pytest.raises(UserError, match="no column 2"):
        texts(tmp_path / "x.csv", column="2")
    (tmp_path / "x.tsv").write_text("1\tsome words are here\n2\tothers\n")  # the number is also a field
    assert texts(tmp_path / "x.tsv", column="1") == [b"some words are here", b"others"]
    (tmp_path / "z.csv").write_text("\n\n0,1\n3,a b\n")  # what tables without names are given as a header
    assert texts(tmp_path / "z.csv", column="1") == [b"a b"]
    (tmp_path / "y.csv").write_text("label,body\n3,a b\n")
    assert texts(tmp_path / "y.csv", column="1") == [b"a b"]


SHARDS = ("train-00000-of-00002", "train-00001-of-00002", "validation-00000-of-00001")


@pytest.mark.parametrize(
    "names",
    [
        ("train.txt", "valid.txt", "test.txt"),
        ("train.txt.gz", "dev.txt.gz"),
        ("c4-train.00000-of-00001.txt", "c4-validation.00000-of-00001.txt", "README.md"),
        tuple(f"{shard}.txt" for shard in SHARDS),
    ],
)
def test_files_whose_names_say_the_split(names: tuple[str, ...], tmp_path: Path) -> None:
    for name in names:
        content = name.encode()
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    source = find(str(tmp_path), DataSettings())
    found = {document.read().decode(): document.split for document in source.documents(binary=False)}
    for name, split in found.items():
        assert split in ("train", "validation", "test")
        assert split[:3] in name or (split == "validation" and "dev" in name)
    assert set(found) == {name for name in names if name != "README.md"}


WORDS = {
    "train": ["train", "Training", "trainset", "train_set", "train-clean-100", "x.train", "train1"],
    "validation": ["valid", "val", "dev", "validation", "Dev_data", "en-dev", "eval", "valid2"],
    "test": ["test", "TEST", "testing", "testset", "test-other", "wiki.test"],
}


@given(
    chosen=st.fixed_dictionaries({split: st.sampled_from(words) for split, words in WORDS.items()}),
    missing=st.sampled_from([None, "validation", "test"]),
    place=st.sampled_from(["{}.txt", "{}/a.txt", "data/{}/deep/a.txt", "{}.jsonl", "data/{}.txt"]),
    archive=st.sampled_from(["", ".zip", ".tar", ".tar.gz"]),
    about=st.sampled_from([None, "README.md", "LICENSE", ".hidden"]),
)
@hypothesis_settings(max_examples=200, deadline=None)
def test_names_that_say_splits_do_so_wherever_they_are(
    chosen: dict[str, str], missing: str | None, place: str, archive: str, about: str | None,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:  # fmt: skip
    root = tmp_path_factory.mktemp("x")
    files = {place.format(name): split for split, name in chosen.items() if split != missing}
    contents = {name: json.dumps({"text": split}) if "json" in name else split for name, split in files.items()}
    contents |= {about: "about it"} if about else {}
    if archive:
        members = {name: content.encode() for name, content in contents.items()}
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as zipped:
            for name, member in members.items():
                zipped.writestr(name, member)
        packed = tar(members)
        data = root / f"data{archive}"
        data.write_bytes({".zip": buffer.getvalue(), ".tar": packed}.get(archive, gzip.compress(packed)))
    else:
        data = root
        for name, content in contents.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(content)
    source = find(str(data), DataSettings(cache_dir=str(root / ".cache")))
    found = [(document.read().decode(), document.split) for document in source.documents(binary=False)]
    assert sorted(found) == sorted((split, split) for split in files.values())
    assert source.own_splits == set(files.values())


def test_files_of_other_names_are_no_splits_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("train.txt", "test.txt", "notes.txt"):
        (tmp_path / name).write_text(f"{name} text " * 20)
    assert not find(str(tmp_path), DataSettings()).own_splits
    prepare(tmp_path, "bytes", DataSettings(cache_dir=str(tmp_path / ".cache")))
    assert "test.txt, train.txt may be splits, but others beside them are none" in capsys.readouterr().err


def test_members_with_odd_names_are_no_splits(tmp_path: Path) -> None:
    names = ("/absolute/train.txt", "../outside/b.txt", "relative/test.txt", "//x/c.txt", "d.txt")
    (tmp_path / "x.tar").write_bytes(tar({name: name.encode() for name in names}))
    source = find(str(tmp_path / "x.tar"), DataSettings(cache_dir=str(tmp_path / "c")))
    assert not source.own_splits
    assert [document.read().decode() for document in source.documents(binary=False)] == list(names)


def test_eval_is_the_test_where_there_is_a_validation(tmp_path: Path) -> None:
    for name in ("train.txt", "dev.txt", "eval.txt"):
        (tmp_path / name).write_text(name)
    source = find(str(tmp_path), DataSettings())
    found = {document.read(): document.split for document in source.documents(binary=False)}
    assert found == {b"train.txt": "train", b"dev.txt": "validation", b"eval.txt": "test"}


def test_utf8_read_as_something_else_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.txt").write_text("über", encoding="utf-8")
    (tmp_path / "b.txt").write_text("über", encoding="cp1252")
    (tmp_path / "c.txt").write_text("uber")
    assert texts(tmp_path, encoding="cp1252")[1:] == ["über".encode(), b"uber"]
    assert "1 files seem to be UTF-8 and were read as cp1252 all the same: a.txt" in caplog.text


def test_few_letters_are_no_ground_for_a_guess(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("Привет, мир", encoding="cp1251")
    with pytest.raises(UserError, match=r"9 bytes that are not UTF-8: name its encoding with `encoding`"):
        texts(tmp_path)


def test_prepared_splits_of_files_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").mkdir()
    for split in ("train", "valid", "test"):
        (tmp_path / "in" / f"{split}.txt").write_text(f"{split} " * 50)
    store = prepare(tmp_path / "in", "bytes", DataSettings(cache_dir=str(tmp_path / "cache")))
    assert "say the splits" in capsys.readouterr().err
    assert bytes(store.split("test")[:4].astype("uint8")) == b"test"


def test_a_folder_read_in_two_ways_has_two_keys(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("text")
    cache = tmp_path / "cache"
    assert Hub(f"hf:{tmp_path}", DataSettings()).key(cache) != find(str(tmp_path), DataSettings()).key(cache)


def test_unknown_characters_of_a_prompt_are_named(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("abc def " * 50)
    tokenizer = prepare(tmp_path / "x.txt", "chars", DataSettings(cache_dir=str(tmp_path / "c"))).load_tokenizer()
    modality = MODALITIES["chars"]
    assert isinstance(modality, TextModality)
    assert modality.unknown("aXbX<|endoftext|>é", tokenizer) == ["X", "é"]
    assert modality.unknown("abc", tokenizer) == []


PROSE = "Im Winter liegt der Schnee bis in den April, die Straße wird geräumt; zwölf Euro für Bücher über Hügel.\n" * 5
CHARACTERS = st.text(st.characters(exclude_characters="\0\ufeff", exclude_categories=["Cs", "Cc"]), min_size=1)
ENCODINGS = st.sampled_from([
    ("utf-8", b""), ("utf-8", codecs.BOM_UTF8), ("utf-16-le", codecs.BOM_UTF16_LE), ("utf-16-be", codecs.BOM_UTF16_BE),
    ("utf-32-le", codecs.BOM_UTF32_LE), ("utf-32-be", codecs.BOM_UTF32_BE),
])  # fmt: skip


@given(text=CHARACTERS, encoding=ENCODINGS, form=st.sampled_from(["txt", "jsonl", "json", "csv", "tsv"]))
@hypothesis_settings(max_examples=200, deadline=None)
def test_unicode_is_read_by_its_mark(
    text: str, encoding: tuple[str, bytes], form: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    name, mark = encoding
    if form in ("jsonl", "json"):
        content = json.dumps({"text": text}, ensure_ascii=False) + "\n"
    elif form == "csv":
        content = 'id,text\n1,"' + text.replace('"', '""') + '"\n'
    else:
        content = f"id\ttext\n1\t{text}\n" if form == "tsv" else text
    path = tmp_path_factory.mktemp("x") / f"x.{form}"
    path.write_bytes(mark + content.encode(name))
    assert texts(path) == [text.encode()]


@given(data=st.binary(min_size=1, max_size=60).map(lambda data: bytes(b | 0x40 for b in data).replace(b"\x7f", b"A")))
@hypothesis_settings(max_examples=200, deadline=None)
def test_no_byte_is_replaced_without_a_word(data: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("x") / "x.txt"
    path.write_bytes(b"text " + data + b" and more of it, and more")
    content = path.read_bytes()
    if content == content.decode("utf-8", "ignore").encode():
        assert texts(path) == [content]
    else:
        with pytest.raises(UserError, match=r"bytes that are not UTF-8|binary"):
            texts(path)
    assert texts(path, encoding="latin-1") == [path.read_bytes().decode("latin-1").encode()]


@pytest.mark.parametrize("form", ["x.txt", "x.csv", "x.jsonl"])
def test_other_encodings_are_refused_by_count_and_read_by_name(form: str, tmp_path: Path) -> None:
    start, end = {"x.txt": ("", ""), "x.csv": ('text\n"', '"\n'), "x.jsonl": ('{"text": "', '"}\n')}[form]
    text = PROSE.replace("\n", " ")
    (tmp_path / form).write_bytes(f"{start}{text}{end}".encode("cp1252"))
    with pytest.raises(UserError, match=rf"{form} has 35 bytes that are not UTF-8: try `encoding=cp125"):
        texts(tmp_path / form)
    assert texts(tmp_path / form, encoding="cp1252") == [text.encode()]
    with pytest.raises(UserError, match='encoding is "cp125", which is not known'):
        DataSettings(encoding="cp125")


def test_json_with_a_record_a_line_is_records(tmp_path: Path) -> None:
    lines = b'{"text": "one", "url": "a"}\n{"text": "two", "url": "b"}\n'
    (tmp_path / "x.json.gz").write_bytes(gzip.compress(lines))
    assert texts(tmp_path / "x.json.gz") == [b"one", b"two"]
    assert texts(tmp_path / "x.json.gz", column="url") == [b"a", b"b"]
    (tmp_path / "y.json").write_text('{\n "a": 1\n}\n')
    assert texts(tmp_path / "y.json") == [b'{\n "a": 1\n}\n']
    with pytest.raises(UserError, match=r'column is "url", but .* has no table'):
        texts(tmp_path / "y.json", column="url")


RECORDS = st.lists(
    st.dictionaries(st.sampled_from(["id", "url", "more"]), st.none() | st.integers() | st.text(max_size=8)).flatmap(
        lambda rest: CHARACTERS.map(lambda text: {**rest, "text": text})
    ),
    min_size=1,
    max_size=5,
)


@given(
    records=RECORDS,
    encoding=ENCODINGS,
    indent=st.sampled_from([None, 0, 2]),
    array=st.booleans(),
    space=st.text(" \t\r\n", max_size=5),
    packed=st.sampled_from(["", *COMPRESS]),
    cut=st.integers(1, 10_000),
)
@hypothesis_settings(max_examples=200, deadline=None)
def test_records_in_json_however_they_are_written(
    records: list[dict], encoding: tuple[str, bytes], indent: int | None, array: bool, space: str, packed: str,
    cut: int, tmp_path_factory: pytest.TempPathFactory,
) -> None:  # fmt: skip
    name, mark = encoding
    dumps = functools.partial(json.dumps, ensure_ascii=False, indent=indent)
    content = space + (dumps(records) if array else (space or "\n").join(map(dumps, records))) + space
    path = tmp_path_factory.mktemp("x") / f"x.json{packed}"
    pack = COMPRESS.get(packed, bytes)
    path.write_bytes(pack(mark + content.encode(name)))
    assert texts(path) == [record["text"].encode() for record in records]
    if array:
        end = len(content.rstrip())
        part = content[: min(end - 1, content.index("{") + 1 + cut % end)]
        path.write_bytes(pack(mark + part.encode(name)))
        with pytest.raises(UserError, match="truncated"):
            texts(path)


def test_arrays_of_other_things(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('[{"text": "a"}, {"text": "b"}] {"text": "c"}')
    with pytest.raises(UserError, match=r"x\.json goes on after the end of its array"):
        texts(path)
    path.write_text('[{"text": "a"}, 3]')
    with pytest.raises(UserError, match=r"record 2 is not an object"):
        texts(path)
    path.write_text('[{"body": "a"}]')
    with pytest.raises(UserError, match=r"no column text or content but body: name one with `column`"):
        texts(path)
    assert texts(path, column="body") == [b"a"]
    for raw in ("[1, 2]", '{"a": [1]}', "[]"):
        path.write_text(raw)
        assert texts(path) == [raw.encode()]


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("form", ["txt", "csv", "tsv", "jsonl", "json"])
def test_utf16_without_a_mark_is_called_so_and_read_by_name(form: str, encoding: str, tmp_path: Path) -> None:
    content = {"txt": "some text", "csv": "id,text\n1,some text\n", "tsv": "id\ttext\n1\tsome text\n"}
    record = '{"text": "some text"}\n'
    path = tmp_path / f"x.{form}"
    path.write_bytes(content.get(form, record).encode(encoding))
    with pytest.raises(UserError, match=rf"seems to be {encoding.upper()} without a mark: try `encoding={encoding}`"):
        texts(path)
    assert texts(path, encoding=encoding) == [b"some text"]
