"""Text to token windows: files, tokenizers, the hold-out split, and batches as functions of what they are for."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from loopmdm import random
from loopmdm.errors import InputError
from loopmdm.lab import data

STRANGE = "Héllo,\n\r\n wörld 🎉👩‍👩‍👧 [MASK] <unk>\ttab\u2028e\u0301 日本 ▒ \x1b[31m  two  spaces\n\n"
CORPUS = STRANGE * 3 + "the quick brown fox jumps over the lazy dog. " * 40


@pytest.fixture(scope="module")
def tokenizers():
    return {kind: data.build_tokenizer(kind, CORPUS, 300) for kind in data.TOKENIZERS}


@pytest.mark.parametrize("kind", data.TOKENIZERS)
def test_round_trip(tokenizers, kind):
    tokenizer = tokenizers[kind]
    ids = data.encode(tokenizer, STRANGE)
    assert data.decode(tokenizer, ids) == STRANGE
    assert max(ids) < tokenizer.get_vocab_size()
    again = Tokenizer.from_str(tokenizer.to_str())  # what tokenizer.json gives back
    assert again.encode(STRANGE).ids == ids
    assert data.decode(again, ids) == STRANGE


@given(text=st.text(st.characters(exclude_categories=("Cs",)), max_size=40))
def test_bytes_spell_any_text(text):
    tokenizer = data.build_tokenizer("byte", "")
    ids = data.encode(tokenizer, text)
    assert len(ids) == len(text.encode())
    assert data.decode(tokenizer, ids) == text


def test_vocabulary_sizes(tokenizers):
    assert tokenizers["char"].get_vocab_size() == len(set(CORPUS))
    assert tokenizers["byte"].get_vocab_size() == 256
    assert tokenizers["bpe"].get_vocab_size() == 300
    # all merges that a text has may be fewer than asked for
    assert data.build_tokenizer("bpe", "aaaa", 1000).get_vocab_size() < 260


def test_characters_are_ids_in_order(tokenizers):
    symbols = sorted(set(CORPUS))
    assert data.encode(tokenizers["char"], CORPUS) == [symbols.index(c) for c in CORPUS]


def test_bpe_shortens_what_it_has_seen_and_is_reproducible(tokenizers):
    text = "the quick brown fox"
    assert len(data.encode(tokenizers["bpe"], text)) < len(text) / 2
    assert data.build_tokenizer("bpe", CORPUS, 300).to_str() == tokenizers["bpe"].to_str()


@pytest.mark.parametrize("kind", data.TOKENIZERS)
def test_the_mask_s_spelling_is_ordinary_text(tokenizers, kind):
    """The mask is an id past the vocabulary: no text encodes to it, and it decodes to the shaded box."""
    tokenizer = tokenizers[kind]
    mask = tokenizer.get_vocab_size()
    ids = data.encode(tokenizer, "[MASK] ▒")
    assert len(ids) > 1 and mask not in ids
    assert data.decode(tokenizer, [mask, *ids, mask, mask]) == "▒[MASK] ▒▒▒"


def test_ends_of_documents_have_a_symbol(tokenizers):
    tokenizer = tokenizers["char"]
    size, ids = tokenizer.get_vocab_size(), data.encode(tokenizer, "fox")
    assert data.decode(tokenizer, [*ids, size, *ids, size + 1], size) == "fox␃fox▒"


def test_several_texts_make_one_tokenizer():
    texts = ["the fox\n", "jumps"]
    for kind in data.TOKENIZERS:
        assert (
            data.build_tokenizer(kind, iter(texts), 270).to_str()
            == data.build_tokenizer(kind, "".join(texts), 270).to_str()
        )


def test_load_tokenizer(tokenizers, tmp_path):
    file = tmp_path / "tokenizer.json"
    for tokenizer in tokenizers.values():
        file.write_text(tokenizer.to_str(), encoding="utf-8")
        for where in (file, tmp_path, str(file), tokenizer):
            loaded = data.load_tokenizer(where)
            assert loaded is not tokenizer and data.encode(loaded, STRANGE) == data.encode(tokenizer, STRANGE)
    file.write_text("{}")
    with pytest.raises(InputError, match=r"tokenizer\.json is not a tokenizer"):
        data.load_tokenizer(file)
    with pytest.raises(InputError, match=r"there is no tokenizer .*nowhere; give one of char, byte, bpe or"):
        data.load_tokenizer(tmp_path / "nowhere")
    words = data.Tokenizer(data.models.WordLevel({"a": 0, "fox": 5}, unk_token="a"))
    with pytest.raises(InputError, match=r"has 2 ids but its highest is 5; ids must be .* without holes"):
        data.load_tokenizer(words)
    words = data.Tokenizer(data.models.WordLevel({"?": 0, "fox": 1}, unk_token="?"))
    words.pre_tokenizer = data.pre_tokenizers.Whitespace()
    assert data.encode(data.load_tokenizer(words), "fox ox") == [1, 0]  # somebody's words are no characters


def test_what_a_tokenizer_cannot_spell(tokenizers):
    with pytest.raises(InputError, match=r"'Ω' is not in this model's vocabulary"):
        data.encode(tokenizers["char"], "the Ω")
    for tokenizer in tokenizers.values():
        with pytest.raises(InputError, match=r"not UTF-8: it holds '.udc80' at position 1"):
            data.encode(tokenizer, "t\udc80")  # a byte of the command line that is no UTF-8


def test_bad_tokenizers():
    with pytest.raises(InputError, match="did you mean 'char'"):
        data.build_tokenizer("chars", "abc")
    with pytest.raises(InputError, match="starts from 256 bytes"):
        data.build_tokenizer("bpe", "abc", 100)


def test_read_text(tmp_path):
    (tmp_path / "a").write_bytes("é\r\n".encode())
    (tmp_path / "b").write_text("two")
    assert data.read_text([tmp_path / "a", tmp_path / "b"]) == "é\r\n\n\ntwo"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read .*No such file"),
        (b"", "is empty"),
        (b" \n\t\n", "is empty"),
        (b"abc\0def", "NUL bytes"),
        (b"abc\xff\xfe", r"not UTF-8 text \(byte 3\)"),
    ],
)
def test_unreadable_files(tmp_path, content, message):
    path = tmp_path / "text"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        data.read_text([path])


def test_a_folder_and_nothing_are_no_text(tmp_path):
    with pytest.raises(InputError, match="cannot read"):
        data.read_text([tmp_path])
    with pytest.raises(InputError, match="no text file"):
        data.read_text([])


@given(size=st.integers(200, 1000), share=st.floats(0.02, 0.5))
def test_hold_out_is_disjoint_and_covers_the_text(size, share):
    text = "".join(chr(0x4E00 + i) for i in range(size))  # every character once
    train, valid = data._hold_out(text, share)
    assert not set(train) & set(valid)
    assert sorted(train + valid) == sorted(text)
    assert list(train) == sorted(train) and list(valid) == sorted(valid)
    assert abs(len(valid) - size * share) <= 20
    # spread: each tenth of the text gives some to validation
    assert {text.index(c) * 10 // size for c in valid} == set(range(10))


def corpus(kind="char", length=16, text=CORPUS * 4):
    return data.TextData.from_text(text, data.build_tokenizer(kind, text, 300), length)


def test_parts_are_the_split_s_tokens():
    held = corpus("bpe")
    train, valid = data._hold_out(CORPUS * 4, 0.05)
    assert data.decode(held.tokenizer, held.train.tolist()) == train
    assert data.decode(held.tokenizer, held.valid.tolist()) == valid
    assert held.train.dtype == held.valid.dtype == torch.int64
    assert held.mask_id == 300
    assert held.characters_per_token == len(valid) / len(held.valid) > 1.5
    assert held.unigram_bits == data.cross_entropy_bits(train, valid)


def test_too_short_a_text():
    with pytest.raises(InputError, match="validation part has 20 tokens, a window takes 21; give more text"):
        corpus(text="ab" * 200, length=21)
    assert len(corpus(text="ab" * 200, length=20).valid_windows()) == 1
    with pytest.raises(InputError, match="length is 0"):
        corpus(length=0)


def test_batches_are_functions_of_seed_step_and_index():
    held = corpus()
    whole = held.batch(3, 7, torch.arange(8))
    assert whole.shape == (8, 16) and whole.dtype == torch.int64
    parts = [held.batch(3, 7, torch.arange(8)[i::3]) for i in range(3)]
    for i, part in enumerate(parts):
        assert torch.equal(part, whole[i::3])
    assert torch.equal(held.batch(3, 7, torch.tensor([5])), whole[5:6])
    for other in (held.batch(4, 7, torch.arange(8)), held.batch(3, 8, torch.arange(8)), whole.roll(1, 0)):
        assert not torch.equal(other, whole)


def test_windows_are_runs_of_the_training_text_and_reach_both_ends():
    held = corpus(text="".join(chr(0x4E00 + i) for i in range(400)))
    batch = held.batch(0, 0, torch.arange(4000))
    starts = (held.train[None] == batch[:, :1]).nonzero()[:, 1]
    assert torch.equal(batch, torch.stack([held.train[s : s + 16] for s in starts.tolist()]))
    assert int(starts.min()) == 0 and int(starts.max()) == len(held.train) - 16


def test_the_last_place_is_inside_the_text(monkeypatch):
    held = corpus()
    for u, window in ((2.0**-24, held.train[:16]), (1 - 2.0**-24, held.train[-16:])):
        monkeypatch.setattr(random, "uniform", lambda *a, u=u: torch.full((1, 2), u))
        assert torch.equal(held.batch(0, 0, torch.zeros(1, dtype=torch.int64))[0], window)


def test_validation_windows_lie_side_by_side():
    held = corpus()
    windows = held.valid_windows()
    assert torch.equal(windows.flatten(), held.valid[: windows.numel()])
    assert len(held.valid) - windows.numel() < 16
    few = held.valid_windows(3)
    assert torch.equal(few[[0, -1]], windows[[0, -1]]) and len(few) == 3
    assert len(held.valid_windows(10**6)) == len(windows)


def test_unigram_bits_against_the_definition():
    train, valid = "aaab" * 5, "abcc"
    total = 20 + 3  # add-one over a, b, c
    p = {"a": 16 / total, "b": 6 / total, "c": 1 / total}
    assert sum(p.values()) == pytest.approx(1)
    assert data.cross_entropy_bits(train, valid) == pytest.approx(-sum(math.log2(p[c]) for c in valid) / 4)
    # on its own text and without smoothing to speak of, it is the entropy
    long = "aaab" * 10**5
    share = {c: n / len(long) for c, n in Counter(long).items()}
    entropy = -sum(q * math.log2(q) for q in share.values())
    assert data.cross_entropy_bits(long, long) == pytest.approx(entropy, abs=1e-5)
