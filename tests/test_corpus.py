"""Corpora on disk: what is written, what is held out, windows and their order, and everything that can go wrong."""

import bz2
import errno
import fcntl
import gzip
import json
import lzma
import os
import signal
import sys
import threading
import tracemalloc
import types

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loopmdm.errors import InputError
from loopmdm.lab import corpus as corpora
from loopmdm.lab import data, prepare, sources
from loopmdm.lab.corpus import Corpus
from loopmdm.lab.run import RunFolder
from loopmdm.lab.sft import SFTData

WORDS = [
    "looped",
    "depth",
    "token,",
    "then",
    "",
    "reads\n\nthem",
    "again:",
    "12",
    "é",
    "日本",
    "🎉",
    "don't",
    "stop\r\n",
]


def prose(size, seed=0):
    rng = np.random.default_rng(seed)
    return " ".join(WORDS[i] for i in rng.integers(0, len(WORDS), size))


def write_jsonl(path, texts, key="text"):
    path.write_text("".join(json.dumps({"id": i, key: t}) + "\n" for i, t in enumerate(texts)))
    return path


@pytest.fixture
def many(tmp_path):
    """40 documents, every one of characters of its own."""
    texts = [chr(0x4E00 + i) * (20 + i) for i in range(40)]
    return texts, write_jsonl(tmp_path / "many.jsonl", texts)


def spelt(built, part):
    return data.decode(built.tokenizer, np.asarray(part.tokens).tolist(), built.eos_id)


# --- what is written ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["char", "byte", "bpe"])
def test_tokens_are_the_documents_with_an_end_after_each(many, tmp_path, kind):
    texts, path = many
    built = Corpus.build([path], tmp_path / "c", kind, vocab_size=300, valid_share=0.1)
    train, valid = (spelt(built, part).split("␃") for part in (built.train, built.valid))
    assert train.pop() == valid.pop() == ""  # every document is ended
    assert sorted(train + valid) == sorted(texts) and len(valid) == 4
    assert train == [t for t in texts if t in train] and valid == [t for t in texts if t in valid]
    size = built.tokenizer.get_vocab_size()
    assert (built.eos_id, built.mask_id, built.vocab_size) == (size, size + 1, size + 2)
    assert built.train.tokens.max() == built.eos_id
    for part in (built.train, built.valid):
        ends = np.flatnonzero(part.tokens == built.eos_id)
        assert part.starts.tolist() == [0, *(ends[:-1] + 1)]
    assert built.characters_per_token == sum(map(len, valid)) / len(built.valid)
    assert built.unigram_bits == pytest.approx(data.cross_entropy_bits("".join(train), "".join(valid)))
    assert Corpus.open(tmp_path / "c", verify=True).meta == built.meta


def test_ids_take_two_bytes_until_they_need_four(tmp_path):
    for count, dtype in ((65534, np.uint16), (65535, np.uint32)):
        symbols = [chr(c) for c in range(0x20, 0x20 + 0xD000)] + [chr(0x10000 + c) for c in range(count - 0xD000)]
        (tmp_path / "text.txt").write_text("".join(symbols) * 2, newline="")
        built = Corpus.build([tmp_path / "text.txt"], tmp_path / "c", "char")
        assert built.vocab_size == count + 2 and built.train.tokens.dtype == dtype
        assert sorted(spelt(built, built.train)[:-1] + spelt(built, built.valid)) == sorted(symbols * 2)


def test_one_text_is_held_out_in_spread_places_that_do_not_overlap(tmp_path):
    text = "".join(chr(0x4E00 + i) for i in range(3003))
    (tmp_path / "t.txt").write_text(text)
    built = Corpus.build([tmp_path / "t.txt"], tmp_path / "c", "char", valid_share=0.1)
    train, valid = spelt(built, built.train), spelt(built, built.valid)
    assert train[-1] == "␃" and "␃" not in valid  # its end is training text
    assert sorted(train[:-1] + valid) == sorted(text)
    assert len(valid) == 300 and len(built.valid.starts) == 20 and len(built.train.starts) == 21
    assert {text.index(c) * 20 // 3003 for c in valid} == set(range(20))
    for part, said in ((built.train, train), (built.valid, valid)):  # a new start wherever the text jumps
        jumps = [i for i in range(1, len(said)) if said[i] != "␃" and ord(said[i]) != ord(said[i - 1]) + 1]
        assert part.starts.tolist() == [0, *jumps]


@settings(deadline=None, derandomize=True, max_examples=30)
@given(lengths=st.lists(st.integers(1, 300), min_size=1, max_size=5), share=st.floats(0.01, 0.9))
def test_few_documents_lose_nothing(lengths, share):
    texts = [chr(0x4E00 + i) + "".join(chr(0x3400 + j) for j in range(n - 1)) for i, n in enumerate(lengths)]

    class Source:
        def pieces(self):  # in pieces of 7 characters
            for text in texts:
                cuts = range(0, len(text), 7)
                yield from (sources.Piece(text[i : i + 7], i == cuts[-1]) for i in cuts)

    split = prepare.plan([Source()], share)
    runs = list(prepare.split_runs([Source()], split))
    assert "".join(r.text for r in runs) == "".join(texts)
    assert sum(r.end for r in runs) == len(texts) and all(r.part == "train" for r in runs if r.end)
    for before, run in zip([None, *runs], runs, strict=False):
        assert run.first == (before is None or before.end or before.part != run.part)
    held = sum(len(r.text) for r in runs if r.part == "valid")
    assert abs(held - share * sum(lengths)) <= sum(20 + share * 20 + 20 for _ in lengths)


def test_the_split_follows_the_text_and_not_its_place(tmp_path):
    texts = [prose(5, seed) for seed in range(400)]
    built = {}
    for name, order in (("a", texts), ("b", texts[::-1] + texts[:50])):
        path = write_jsonl(tmp_path / f"{name}.jsonl", order)
        done = Corpus.build([path], tmp_path / name, "byte")
        built[name] = [set(spelt(done, part).split("␃")) - {""} for part in (done.train, done.valid)]
    (train, valid), (train_b, valid_b) = built["a"], built["b"]
    assert not train & valid and not train_b & valid_b  # the 50 copies fall to their originals' side
    assert valid == valid_b and 5 <= len(valid) <= 40


def test_merges_are_learnt_from_the_training_text_alone(tmp_path):
    common = [f"document {i} says the same as all others do" for i in range(39)]
    odd = "xylophonexylophone" * 40
    best = min(common, key=prepare.text_hash)
    texts = [*(c for c in common if c != best), odd]
    seed = next(i for i in range(1000) if prepare.text_hash(f"{odd}{i}") < min(map(prepare.text_hash, texts)))
    path = write_jsonl(tmp_path / "t.jsonl", [*texts[:-1], f"{odd}{seed}"])
    built = Corpus.build([path], tmp_path / "c", "bpe", vocab_size=330, valid_share=0.02)
    assert spelt(built, built.valid) == f"{odd}{seed}␃"
    tokens = set(built.tokenizer.get_vocab())
    assert "document" in tokens and not any("xy" in t for t in tokens)


def test_the_sample_for_merges_is_bounded_and_spread(monkeypatch):
    monkeypatch.setattr(prepare, "SAMPLE_BYTES", 1000)
    texts = [f"{i:010}" for i in range(5000)]
    kept = prepare.sample(texts)
    assert 50 <= len(kept) <= 100 and kept == sorted(kept)
    tenths = np.bincount([int(k) // 500 for k in kept], minlength=10)
    assert tenths.min() >= 1
    assert prepare.sample(texts[:90]) == texts[:90]


def test_pieces_of_a_long_text_are_tokenised_as_the_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "PIECE", 64)
    monkeypatch.setattr(prepare, "BATCH", 200)
    text = prose(3000)
    (tmp_path / "t.txt").write_text(text, newline="")
    (tmp_path / "v.txt").write_text("v")
    for kind in ("bpe", "char", "byte"):
        tokenizer = data.build_tokenizer(kind, text + "v", 400)
        built = Corpus.build([tmp_path / "t.txt"], tmp_path / "c", tokenizer, valid_sources=[tmp_path / "v.txt"])
        assert built.train.tokens.tolist() == [*data.encode(tokenizer, text), built.eos_id]
        assert built.valid.tokens.tolist() == [*data.encode(tokenizer, "v"), built.eos_id]
        assert built.meta["train"] == {"tokens": len(built.train), "documents": 1, "characters": len(text)}


def test_every_cut_leaves_the_same_text(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "PIECE", 16)
    for text in ("日本" * 100, "a b" * 50, "x" * 1000, "ab" * 31 + " " * 40 + "c"):
        raw = text.encode()
        (tmp_path / "t.txt").write_bytes(raw)
        pieces = list(sources.FileSource(tmp_path / "t.txt").pieces())
        assert "".join(p.text for p in pieces) == text and [p.last for p in pieces][:-1] == [False] * (len(pieces) - 1)
        assert pieces[-1].last and max(len(p.text) for p in pieces) <= 32


def test_memory_stays_small(tmp_path):
    """33 MB of text, one document, in less than 12 MB of Python memory."""
    with open(tmp_path / "big.txt", "w", newline="") as file:
        block = prose(18000)
        while file.tell() < 33e6:
            file.write(block)
    tracemalloc.start()
    built = Corpus.build([tmp_path / "big.txt"], tmp_path / "c", data.build_tokenizer("byte", ""))
    built.batch(0, 0, torch.arange(4), batch_size=4, length=64)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(built.train) + len(built.valid) == (tmp_path / "big.txt").stat().st_size + 1
    assert peak < 12e6


# --- sources -----------------------------------------------------------------------------------------------------


def read(spec):
    text, found = "", []
    for piece in (p for source in sources.expand([spec]) for p in source.pieces()):
        text += piece.text
        if piece.last:
            found.append(text)
            text = ""
    return found


def test_files_compressed_files_and_folders(tmp_path):
    texts, folder = ["one\n\ntwo", "three é"], tmp_path / "f"
    (folder / "deep").mkdir(parents=True)
    lines = "".join(json.dumps({"text": t}) + "\n\n" for t in texts).encode()
    for suffix, pack in (("", bytes), (".xz", lzma.compress), (".gz", gzip.compress), (".bz2", bz2.compress)):
        (folder / f"a.jsonl{suffix}").write_bytes(pack(lines))
        (folder / "deep" / f"b.txt{suffix}").write_bytes(pack(texts[1].encode()))
        assert read(folder / f"a.jsonl{suffix}") == texts
        assert read(folder / "deep" / f"b.txt{suffix}") == texts[1:]
    (folder / "skipped.py").write_text("x")
    (folder / ".hidden.txt").write_text("x")
    assert read(folder) == texts * 4 + texts[1:] * 4
    assert read(folder / "skipped.py") == ["x"]  # a file by name is text
    write_jsonl(tmp_path / "k.jsonl", texts, "body")
    assert read(f"{tmp_path / 'k.jsonl'}#body") == texts
    (tmp_path / "odd#name.txt").write_text("odd")
    assert read(tmp_path / "odd#name.txt") == ["odd"]


BAD = [
    ("a.txt", b"", "a.txt is empty$"),
    ("a.txt", b" \n\t ", "a.txt is empty$"),
    ("a.txt", b"abc\0", "NUL bytes"),
    ("a.txt", b"abcd\xff", r"not UTF-8 text \(byte 4\)"),
    ("a.txt", b"x" * 65535 + "é".encode()[:1], r"not UTF-8 text \(byte 65535\)"),
    ("a.txt", b"x" * 65535 + b"\xc3x", r"not UTF-8 text \(byte 65535\)"),
    ("a.jsonl", b"", "a.jsonl is empty$"),
    ("a.jsonl", b'{"text": "x"}\n{"text": \n', "a.jsonl line 2 is not JSON"),
    ("a.jsonl", b'\n{"text": "x"}\n[1]\n', "a.jsonl line 3 is not a JSON object but list"),
    ("a.jsonl", b'{"texts": "x"}', "line 1 has no key 'text'; did you mean 'texts'"),
    ("a.jsonl", b'{"text": 5}', "line 1: 'text' is not text but int"),
    ("a.jsonl", b'{"text": "\xff"}', "line 1 is not UTF-8"),
    ("a.jsonl", b'{"text": "a\\ud800"}', r"line 1: 'text' is not UTF-8 text \(character 1\)"),
    ("a.jsonl", b'{"text": " "}\n{"text": ""}', "no text in what was given, only blank documents"),
    ("a.txt.xz", b"plain", "a.txt.xz is damaged, or no .xz file"),
    ("a.txt.gz", b"plain", "a.txt.gz is damaged, or no .gz file"),
    ("a.txt.gz", gzip.compress(b"x")[:10] + b"\xff" * 99, "a.txt.gz is damaged, or no .gz file .*invalid block type"),
    ("a.txt.bz2", b"plain", "cannot read .*a.txt.bz2: Invalid data stream"),
    ("a.jsonl.xz", lzma.compress(b'{"text": "x"}' * 999)[:-30], "a.jsonl.xz is damaged"),
    ("a.jsonl.gz", gzip.compress(b'{"text": "x"}' * 999)[:-12], "a.jsonl.gz is damaged"),
    ("a.txt", None, "cannot read .*a.txt: No such file"),
    ("a.txt", b"x", "leaves nothing for validation"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD, ids=[f"{name}: {said}" for name, _, said in BAD])
def test_bad_sources_are_one_sentence_and_leave_nothing(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        Corpus.build([tmp_path / name], tmp_path / "c", "byte")
    assert "\n" not in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != name) in ([], [".c.lock"])


def test_bad_calls(tmp_path):
    (tmp_path / "a.txt").write_text("abc" * 100)
    for wrong, message in (
        ({"tokenizer": "chars"}, "no tokenizer chars; give one of char, byte, bpe or the path"),
        ({"valid_share": 0.0}, "valid_share is 0.0"),
        ({"sources": []}, "no text file was given"),
        ({"tokenizer": "bpe", "vocab_size": 9}, "starts from 256 bytes"),
        ({"tokenizer": data.build_tokenizer("char", "ab")}, "character 'c' is not among the tokenizer's 2"),
        ({"tokenizer": tmp_path / "a.txt"}, "a.txt is not a tokenizer"),
    ):
        given = {"sources": [tmp_path / "a.txt"], "folder": tmp_path / "c", "tokenizer": "byte", **wrong}
        with pytest.raises(InputError, match=message):
            Corpus.build(given.pop("sources"), given.pop("folder"), given.pop("tokenizer"), **given)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"folder .*empty has no file that ends in .txt"):
        Corpus.build([tmp_path / "empty"], tmp_path / "c", "byte")


def test_text_to_validate_on_is_not_trained_on(tmp_path):
    folder = tmp_path / "f"
    folder.mkdir()
    (folder / "train.txt").write_text("abc" * 100)
    (folder / "valid.txt").write_text("abd" * 50)
    (tmp_path / "link.txt").symlink_to(folder / "valid.txt")
    for valid in (folder / "valid.txt", folder / ".." / "f" / "valid.txt", tmp_path / "link.txt"):
        with pytest.raises(InputError, match=r"f/valid.txt is among the text to train on, so it cannot be validated"):
            Corpus.build([folder], tmp_path / "c", "byte", valid_sources=[valid])
    with pytest.raises(InputError, match="hf:a/b is among the text to train on"):
        Corpus.build([folder, "hf:a/b"], tmp_path / "c", "byte", valid_sources=["hf:a/b"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["f", "link.txt"]
    built = Corpus.build([folder / "train.txt"], tmp_path / "c", "byte", valid_sources=[folder / "valid.txt"])
    assert len(built.valid) == 151


def test_blank_documents_are_counted(tmp_path):
    texts = ["", *(f"text {i}" for i in range(30)), " \n"]
    built = Corpus.build([write_jsonl(tmp_path / "a.jsonl", texts)], tmp_path / "c", "byte")
    assert built.meta["blank_documents"] == 2
    assert built.meta["train"]["documents"] + built.meta["valid"]["documents"] == 30


def test_a_file_that_changes_while_it_is_read(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [f"text {i}" for i in range(30)])
    with pytest.raises(InputError, match="changed while it was read"):
        Corpus.build([path], tmp_path / "c", "byte", progress=lambda line: os.utime(path, (1, 1)))
    assert not (tmp_path / "c").exists()


def test_hub_data_sets(tmp_path, monkeypatch):
    asked = []

    def load_dataset(name, config, *, split, streaming):
        asked.append((name, config, split))
        assert streaming
        if name == "no/such":
            raise ConnectionError("Couldn't reach the Hub\nlong story")
        return iter([{"text": f"hub {i}", "body": f"body {i}"} for i in range(30)])

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    built = Corpus.build(["hf:a/b:train#body"], tmp_path / "c", "char")
    said = spelt(built, built.train) + spelt(built, built.valid)
    assert sorted(said.split("␃")[:-1]) == sorted(f"body {i}" for i in range(30))
    assert asked == [("a/b", None, "train")]  # once, though the text is read three times
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == sorted(prepare.FILES)
    Corpus.build(["hf:a/b:train#body"], tmp_path / "c", "char")
    assert len(asked) == 1
    for spec in ("hf:a/b", "hf:a/b:sub", "hf:a/b:sub:test", "hf:a/b:validation"):
        Corpus.build([spec], tmp_path / "d", "byte")
    splits = [(None, "train"), ("sub", "train"), ("sub", "test"), (None, "validation")]
    assert asked[1:] == [("a/b", *rest) for rest in splits]
    for spec, message in (
        ("hf:no/such", "cannot read hf:no/such: Couldn't reach the Hub$"),
        ("hf:a/b#nothing", "hf:a/b#nothing row 1 has no key 'nothing'"),
        ("hf:a/b:x:y:z", "not of the form hf:owner/name"),
    ):
        with pytest.raises(InputError, match=message):
            Corpus.build([spec], tmp_path / "e", "byte")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match="takes the `datasets` package; install it"):
        Corpus.build(["hf:a/b"], tmp_path / "e", "byte")


def test_a_tokenizer_from_a_file_keeps_its_ids(tmp_path):
    text = prose(2000)
    (tmp_path / "t.txt").write_text(text, newline="")
    tokenizer = data.build_tokenizer("bpe", text, 300)
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=9)
    (tmp_path / "tok").mkdir()
    (tmp_path / "tok" / "tokenizer.json").write_text(tokenizer.to_str())
    for given_ in (tmp_path / "tok", str(tmp_path / "tok" / "tokenizer.json"), tokenizer):
        built = Corpus.build([tmp_path / "t.txt"], tmp_path / "c", given_)
        assert len(spelt(built, built.train)) + len(spelt(built, built.valid)) == len(text) + 1
        assert built.eos_id == 300 and built.tokenizer.get_vocab() == tokenizer.get_vocab()


# --- built once --------------------------------------------------------------------------------------------------


@pytest.fixture
def plain(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [f"text number {i}" for i in range(60)])
    return path, Corpus.build([path], tmp_path / "c", "char"), tmp_path / "c"


def test_reused_until_something_changes(plain, tmp_path):
    path, first, folder = plain
    born = (folder / "meta.json").stat().st_mtime_ns

    def again(*a, **k):
        said = []
        built = Corpus.build([path], folder, *(a or ("char",)), progress=said.append, **k)
        return said, built

    said, built = again()
    assert said == [f"reusing {folder}: {len(first.train):,} training tokens"]
    assert (folder / "meta.json").stat().st_mtime_ns == born and built.meta == first.meta
    for a, k in (((), {"valid_share": 0.2}), (("byte",), {}), (("bpe",), {"vocab_size": 270})):
        said, built = again(*a, **k)
        assert "tokenising" in said and built.meta != first.meta
        assert len(again(*a, **k)[0]) == 1
    assert again("bpe", vocab_size=271)[1].eos_id == 271
    again()
    os.utime(path, (5, 5))
    assert len(again()[0]) > 1
    (folder / "train.bin").write_bytes(b"short")  # what cannot be opened is built again
    assert len(again()[0]) > 1 and Corpus.open(folder, verify=True)


@pytest.mark.parametrize("name", prepare.FILES)
def test_damage_is_found(plain, name):
    _, _, folder = plain
    whole = (folder / name).read_bytes()
    for place in (0, len(whole) // 2, len(whole) - 1):
        flipped = bytearray(whole)
        flipped[place] ^= 1
        (folder / name).write_bytes(flipped)
        with pytest.raises(InputError, match=f"damaged: {name} is not what was written; remove|is not a corpus"):
            Corpus.open(folder, verify=True)
    (folder / name).write_bytes(whole[:-1])
    with pytest.raises(InputError, match=rf"damaged: {name} has \d+ bytes instead of|not a corpus"):
        Corpus.open(folder)
    (folder / name).unlink()
    with pytest.raises(InputError, match=f"{name} is missing|is not a corpus"):
        Corpus.open(folder)


def test_foreign_folders(plain, tmp_path):
    path, _, folder = plain
    meta = json.loads((folder / "meta.json").read_text())
    del meta["sha256"]
    meta["format"] = 99
    (folder / "meta.json").write_text(json.dumps({**meta, "sha256": prepare.digest(meta)}))
    with pytest.raises(InputError, match="is of format 99, not 1"):
        Corpus.open(folder)
    other = tmp_path / "photos"
    other.mkdir()
    with pytest.raises(InputError, match="photos is not a corpus"):
        Corpus.open(other)
    (other / "cat.jpg").write_bytes(b"precious")
    with pytest.raises(InputError, match=r"holds 'cat.jpg', which is no part of a corpus"):
        Corpus.build([path], other, "char")
    with pytest.raises(InputError, match=r"holds 'a.jsonl'"):
        Corpus.build([path], path, "char")
    assert (other / "cat.jpg").read_bytes() == b"precious" and path.read_text()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.parametrize("older", [False, True])
def test_a_killed_build_leaves_what_was_there(plain, tmp_path, older):
    path, first, folder = plain
    if not older:
        folder = tmp_path / "new"
    before = os.getpid()
    child = os.fork()
    if child == 0:
        try:
            original = prepare._Writer.close
            prepare._Writer.close = lambda self: (original(self), os.kill(os.getpid(), signal.SIGKILL))
            Corpus.build([path], folder, "byte")
        finally:
            os._exit(0)
    assert os.getpid() == before and os.waitpid(child, 0)[1] == signal.SIGKILL
    assert (tmp_path / f".{folder.name}.partial" / "train.bin").stat().st_size > 0
    if older:
        assert Corpus.open(folder, verify=True).meta == first.meta
    else:
        with pytest.raises(InputError, match="not a corpus"):
            Corpus.open(folder)
    assert Corpus.build([path], folder, "byte").eos_id == 256  # the lock went with the process
    assert not (tmp_path / f".{folder.name}.partial").exists()


def test_two_builders_take_turns(plain, monkeypatch):
    path, _, folder = plain
    original, inside, most, built = prepare.prepare, [0], [0], []

    def slow(*a):
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        built.append(a)
        threading.Event().wait(0.1)
        original(*a)
        inside[0] -= 1

    monkeypatch.setattr(corpora, "prepare", slow)
    said, done = [], []
    workers = [
        threading.Thread(target=lambda: done.append(Corpus.build([path], folder, "byte", progress=said.append)))
        for _ in range(3)
    ]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    assert most == [1] and len(built) == 1 and len(done) == 3
    assert sum(line.startswith("waiting for another process") for line in said) == 2
    assert sum(line.startswith("reusing") for line in said) == 2


def test_a_file_system_without_locks(plain, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert Corpus.build([plain[0]], tmp_path / "new", "byte").eos_id == 256
    with RunFolder(tmp_path / "run", {}):
        assert (tmp_path / "run" / "lock").read_text() == f"{os.getpid()}\n"


def test_a_full_disk(plain, tmp_path, monkeypatch):
    path, _, _ = plain

    def full(*a):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prepare._Writer, "add", full)
    with pytest.raises(InputError, match=r"cannot write to .*new: No space left on device"):
        Corpus.build([path], tmp_path / "new", "byte")
    assert not list(tmp_path.glob("*new*/")) and not list(tmp_path.glob(".new.partial"))


# --- windows and their order -------------------------------------------------------------------------------------


@pytest.fixture
def counted(tmp_path):
    """A corpus whose training ids can be told apart: 1003 tokens, one document."""
    (tmp_path / "t.txt").write_text("".join(chr(0x4E00 + i) for i in range(1002)))
    (tmp_path / "v.txt").write_text("".join(chr(0x4E00 + i) for i in range(55)))
    return Corpus.build([tmp_path / "t.txt"], tmp_path / "c", "char", valid_sources=[tmp_path / "v.txt"])


def test_every_window_once_an_epoch_and_other_windows_in_the_next(counted):
    length, batch_size = 10, 7
    count, orders, phases = 1003 // length, [], []
    rows = torch.cat(
        [counted.batch(5, s, torch.arange(7), batch_size=batch_size, length=length).tokens for s in range(43)]
    )
    place = {int(t): i for i, t in enumerate(counted.train.tokens)}
    starts = [place[int(t)] for t in rows[:, 0]]
    for row, start in zip(rows, starts, strict=True):
        assert row.tolist() == [int(counted.train.tokens[(start + j) % 1003]) for j in range(length)]
    for epoch in range(3):
        part = starts[epoch * count : (epoch + 1) * count]
        tokens = [(s + j) % 1003 for s in part for j in range(length)]
        assert len(set(tokens)) == count * length  # no token twice, all but three once
        phase = next(p for p in range(1003) if {(p + i * length) % 1003 for i in range(count)} == set(part))
        phases.append(phase)
        orders.append([(s - phase) % 1003 for s in part])
        assert orders[-1] != sorted(orders[-1])
    assert len(set(phases)) == 3 and orders[0] != orders[1] != orders[2]
    ahead = [b - a for a, b in zip(orders[0], orders[0][1:], strict=False)]
    assert len(set(ahead)) > 50  # a shuffle, not a stride


def test_batches_are_functions_of_seed_step_and_index(counted):
    def batch(seed, step, index, size=8):
        return counted.batch(seed, step, index, batch_size=size, length=16).tokens

    whole = batch(3, 7, torch.arange(8))
    assert whole.dtype == torch.int64 and whole.shape == (8, 16)
    for i in range(3):
        assert torch.equal(batch(3, 7, torch.arange(8)[i::3]), whole[i::3])
    assert torch.equal(batch(3, 28, torch.arange(2), 2), whole[:2])  # the sample's number is what counts
    for other in (batch(4, 7, torch.arange(8)), batch(3, 8, torch.arange(8)), whole.roll(1, 0)):
        assert not torch.equal(other, whole)


def test_document_ids_follow_the_ends(many, tmp_path):
    built = Corpus.build([many[1]], tmp_path / "c", "char")
    got = [
        built.batch(1, s, torch.arange(16), batch_size=16, length=50, packing=p)
        for s in range(6)
        for p in ("documents", "stream")
    ]
    seam = False
    for with_ids, without in zip(got[::2], got[1::2], strict=True):
        assert torch.equal(with_ids.tokens, without.tokens) and without.document_ids is None
        for tokens, ids in zip(with_ids.tokens.tolist(), with_ids.document_ids.tolist(), strict=True):
            after_end = [0, *(t == built.eos_id for t in tokens[:-1])]
            steps = [b - a for a, b in zip([ids[0], *ids], ids, strict=False)]
            assert steps[1:] == after_end[1:]
            first = tokens[0] == built.train.tokens[0]
            seam |= bool(int(built.train.tokens[0]) in tokens and not first)
    assert seam  # some window reads from the last document into the first
    held = built.valid_windows(10, packing="documents")
    assert held.document_ids.shape == held.tokens.shape
    with pytest.raises(InputError, match="packing is 'document'; did you mean 'documents'"):
        built.valid_windows(10, packing="document")


def test_validation_windows(counted):
    whole = counted.valid_windows(10).tokens
    assert whole.flatten().tolist() == counted.valid.tokens[:50].tolist()
    few = counted.valid_windows(10, 3).tokens
    assert torch.equal(few, whole[[0, 2, 4]])
    assert len(counted.valid_windows(10, 99).tokens) == 5 and len(counted.valid_windows(56).tokens) == 1


def test_too_short(counted):
    with pytest.raises(InputError, match="validation part has 56 tokens, a window takes 57; give more text"):
        counted.valid_windows(57)
    with pytest.raises(InputError, match="training part has 1003 tokens, a window takes 1004"):
        counted.batch(0, 0, torch.arange(1), batch_size=1, length=1004)
    assert counted.batch(0, 0, torch.arange(3), batch_size=3, length=1003).tokens.shape == (3, 1003)
    with pytest.raises(InputError, match="length is 0"):
        counted.valid_windows(0)


# --- prompts and answers -----------------------------------------------------------------------------------------


@pytest.fixture
def pairs(tmp_path):
    rows = [{"prompt": f"question {i}? ", "answer": f"answer {i * i}"} for i in range(40)]
    path = tmp_path / "sft.jsonl"
    path.write_text("\n".join(json.dumps(r) for r in rows))
    return rows, path


def test_answers_and_their_filling_are_learnt(pairs):
    rows, path = pairs
    held = SFTData.from_jsonl(path, "byte", 32, valid_share=0.1)
    assert (len(held.train), len(held.valid), held.dropped) == (36, 4, 0)
    assert (held.eos_id, held.mask_id, held.vocab_size) == (256, 257, 258)
    got = held.rows(torch.cat((held.train, held.valid)))
    assert got.tokens.shape == got.maskable.shape == (40, 32) and got.maskable.dtype == torch.bool
    seen = []
    for tokens, maskable in zip(got.tokens, got.maskable, strict=True):
        prompt, rest = data.decode(held.tokenizer, tokens[~maskable].tolist()), tokens[maskable].tolist()
        answer, filling = data.decode(held.tokenizer, [t for t in rest if t != 256]), rest.count(256)
        assert rest[-filling:] == [256] * filling and filling >= 1
        assert len(prompt) + len(answer) + filling == 32 and not maskable[: len(prompt)].any()
        seen.append({"prompt": prompt, "answer": answer})
    assert sorted(map(str, seen)) == sorted(map(str, rows))
    kept = held.valid_windows().tokens
    assert len(kept) == 4 and torch.equal(held.valid_windows(3).tokens, kept[[0, 1, 3]])


def test_pairs_come_once_an_epoch(pairs):
    held = SFTData.from_jsonl(pairs[1], "byte", 32, valid_share=0.1)
    rows = torch.cat([held.batch(2, s, torch.arange(8), batch_size=8).tokens for s in range(9)])
    epochs = [[tuple(r) for r in part.tolist()] for part in rows.split(36)]
    want = sorted(tuple(r) for r in held.rows(held.train).tokens.tolist())
    assert sorted(epochs[0]) == sorted(epochs[1]) == want and epochs[0] != epochs[1]
    assert torch.equal(held.batch(2, 4, torch.tensor([3]), batch_size=8).tokens, rows[35:36])


def test_too_long_pairs_are_counted(pairs):
    rows, path = pairs
    said = []
    longest = max(len(r["prompt"] + r["answer"]) for r in rows)  # and one end
    fits = sum(len(r["prompt"] + r["answer"]) < longest for r in rows)
    held = SFTData.from_jsonl(path, "byte", longest, valid_share=0.3, progress=said.append)
    assert held.dropped == 40 - fits > 0 and len(held.train) + len(held.valid) == fits
    assert said == [f"left out {held.dropped} of 40 pairs that do not fit in {longest} tokens"]
    assert SFTData.from_jsonl(path.parent, "byte", longest + 1).dropped == 0  # a folder of such files
    with pytest.raises(InputError, match="of 40 pairs 0 fit in 5 tokens"):
        SFTData.from_jsonl(path, "byte", 5)


def test_equal_prompts_are_on_one_side(tmp_path):
    path = tmp_path / "s.jsonl"
    path.write_text("\n".join(json.dumps({"q": f"q{i % 20}", "a": str(i)}) for i in range(200)))
    held = SFTData.from_jsonl(path, "char", 16, "q", "a", valid_share=0.2)
    prompts = [
        {tuple(t[~m].tolist()) for t, m in zip(got.tokens, got.maskable, strict=True)}
        for got in (held.rows(held.train), held.rows(held.valid))
    ]
    assert not prompts[0] & prompts[1] and [len(p) for p in prompts] == [16, 4] and len(held.valid) == 40


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a", "answer": ""}', "line 1: 'answer' is empty"),
        ('{"prompt": "a", "answers": "b"}', "line 1 has no key 'answer'; did you mean 'answers'"),
        ('{"prompt": 3, "answer": "b"}', "line 1: 'prompt' is not text but int"),
        ('{"prompt": "a", "answer": "b"}', "of 1 pairs 1 fit in 9 tokens, 1 of them held out"),
    ],
)
def test_bad_pairs(tmp_path, line, message):
    (tmp_path / "s.jsonl").write_text(line)
    with pytest.raises(InputError, match=message):
        SFTData.from_jsonl(tmp_path / "s.jsonl", "byte", 9)
    (tmp_path / "s.txt").write_text("a")
    with pytest.raises(InputError, match=r"not a .jsonl file"):
        SFTData.from_jsonl(tmp_path / "s.txt", "byte", 9)
    with pytest.raises(InputError, match=r"hf:a/b is not a .jsonl file"):
        SFTData.from_jsonl("hf:a/b", "byte", 9)
