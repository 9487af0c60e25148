"""loopmdm eval and loopmdm schedule: what they print and write, and a sentence for everything that is wrong."""

import dataclasses
import json
import math
import shutil
import sys
from pathlib import Path

import pytest
import torch

from loopmdm import cli
from loopmdm.diffusion.bounds import likelihood
from loopmdm.lab.sample import load
from loopmdm.sampling.depth import DepthTable

from .commands import QUICK, TEXT, lines, refused, run
from .helpers import live, tiny

FEW = ["--length", "16", "--windows", "6", "--samples", "2", "--loops", "1,3"]


@pytest.fixture(scope="module")
def words(checkpoint, text):
    return ["eval", checkpoint, "--data", text, *FEW]


def rows_of(out, heading):
    """Lines of the table whose head begins with `heading`, split at two spaces."""
    lines = out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(heading))
    table = lines[start + 1 :]
    return [[cell for cell in line.split("  ") if cell] for line in table[: ([*table, ""]).index("")]]


def test_eval_measures_what_it_says(capsys, checkpoint, words, tmp_path):
    status, out, err = run(capsys, *words, "--json", tmp_path / "out.json", "--seed", "5")
    assert status == 0, err
    assert "Measured on" in out and "6 of 147 windows of 16 tokens, spread evenly" in out
    report = json.loads((tmp_path / "out.json").read_text(), parse_constant=pytest.fail)
    model, tokenizer = load(checkpoint)
    ids = torch.tensor(tokenizer.encode(TEXT).ids)[: 147 * 16].view(147, 16)
    windows = ids[torch.linspace(0, 146, 6).long()]
    want = likelihood(model, windows, num_loops=[1, 3], bound="count", samples=2, seed=5)
    assert [r["nats"] for r in report["rows"]] == pytest.approx(want.nats_per_token.tolist())
    shown = rows_of(out, "S  layers")
    assert [row[0] for row in shown] == ["1", "3"]
    assert shown[1][3].strip().startswith(f"{report['rows'][1]['nats']:.4f} ± {report['rows'][1]['error']:.4f}")
    assert report["settings"] == {"bound": "count", "samples": 2, "seed": 5, "device": report["settings"]["device"]}
    assert report["measured_on"]["windows"] == 6 and report["measured_on"]["trained_on"] is None
    again = run(capsys, *words, "--json", tmp_path / "again.json", "--seed", "5")[1]
    assert again.replace("again.json", "out.json") == out
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "out.json").read_bytes()


def test_eval_by_the_other_bound(capsys, words, tmp_path):
    run(capsys, *words, "--json", tmp_path / "a.json")
    _, out, _ = run(capsys, *words, "--bound", "time", "--json", tmp_path / "b.json")
    a, b = (json.loads((tmp_path / f"{n}.json").read_text())["rows"] for n in "ab")
    assert a[0]["nats"] != b[0]["nats"] and "Likelihood bound (time)" in out


def test_eval_with_everything(capsys, checkpoint, text, tmp_path):
    pytest.importorskip("matplotlib")
    other = tmp_path / "other"
    shutil.copytree(checkpoint / "model", other)
    model, _ = load(other)
    live(model.config, seed=1).save_pretrained(other)
    words = ["eval", checkpoint, "--data", text, *FEW, "--by-time", "--bins", "3", "--compare", other, "--steps", "3"]
    words += ["--generate", "2", "--scorer", other, "--json", tmp_path / "out.json", "--plot", tmp_path / "out.png"]
    status, out, err = run(capsys, *words)
    assert status == 0, err
    report = json.loads((tmp_path / "out.json").read_text(), parse_constant=pytest.fail)
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    assert [r["other_loops"] for r in report["compare"]["rows"]] == [1, 3]
    for mine, row in zip(report["rows"], report["compare"]["rows"], strict=True):
        assert row["difference"] == pytest.approx(mine["nats"] - row["other_nats"])
    assert len(report["by_time"]["nats"]) == 3 and len(rows_of(out, "t ")) == 3
    assert report["generated"]["samples"] == 2 and "upper bound" in report["generated"]["scorer"]
    judged = [line.split()[0:3] for line in out.splitlines() if line.startswith(("the text", "S = "))]
    assert [j[0] for j in judged] == ["the", "S", "S"]
    assert "with less entropy than the text's own is repetition" in out


def test_eval_of_the_whole_text(capsys, checkpoint, tmp_path):
    file = tmp_path / "short.txt"
    file.write_text(TEXT[:100])
    words = ["eval", checkpoint, "--data", file, "--loops", "2", "--samples", "1", "--rolling", "--context", "10"]
    status, out, _ = run(capsys, *words, "--json", tmp_path / "out.json")
    assert status == 0 and "all of it, in windows of 40 tokens, each after the first given the 10" in out
    row = json.loads((tmp_path / "out.json").read_text())["rows"][0]
    assert row["perplexity"] == pytest.approx(math.exp(row["nats"]))


def test_one_window_has_no_error(capsys, checkpoint, text, tmp_path):
    words = ["eval", checkpoint, "--data", text, "--windows", "1", "--loops", "1", "--json", tmp_path / "out.json"]
    _, out, _ = run(capsys, *words)
    assert "± ?" in out and json.loads((tmp_path / "out.json").read_text())["rows"][0]["error"] is None


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--loops", "0"], "--loops is 0"),
        (["--loops", "x"], "--loops is 'x'"),
        (["--loops", ""], "--loops is ''"),
        (["--bound", "counts"], "bound is 'counts'"),
        (["--samples", "0"], "samples is 0"),
        (["--windows", "0"], "windows is 0"),
        (["--length", "41"], "at most the model's 40"),
        (["--by-time", "--bins", "0"], "bins is 0"),
        (["--context", "3"], "--context goes with --rolling"),
        (["--bins", "8"], "--bins goes with --by-time"),
        (["--steps", "64"], "--steps goes with --generate N"),
        (["--rolling", "--context", "16"], "context is 16"),
        (["--generate", "1"], "--generate is 1"),
        (["--generate", "2", "--steps", "0"], "steps is 0"),
        (["--scorer", "gpt2"], "say how many with --generate"),
        (["--compare", "nowhere"], "there is no folder nowhere"),
        (["--json", "no/where.json"], "there is no folder no to write where.json into"),
        (["--plot", "."], ". is a folder"),
        (["--seed", str(2**64)], "seed is"),
        (["--data", "nowhere.txt"], "nowhere.txt"),
    ],
)
def test_eval_refuses_before_it_measures(capsys, words, extra, message):
    status, out, err = run(capsys, *words, *extra)
    assert status == 2 and message in err and err.count("\n") == 1 and out == ""


def test_eval_refuses_other_tokenizers_and_missing_packages(capsys, words, tmp_path, monkeypatch):
    from loopmdm.lab.data import build_tokenizer

    live(tiny(vocab_size=4, mask_token_id=3, max_position_embeddings=40)).save_pretrained(tmp_path)
    build_tokenizer("char", "abc").save(str(tmp_path / "tokenizer.json"))
    status, out, err = run(capsys, *words, "--compare", tmp_path)
    assert status == 2 and "have different tokenizers" in err and out == ""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert refused(capsys, *words, "--plot", tmp_path / "a.png") == (
        'this needs matplotlib; pip install "loopmdm[plot]"'
    )
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert refused(capsys, *words, "--generate", "2", "--scorer", "gpt2") == (
        'this needs transformers; pip install "loopmdm[hf]"'
    )


def test_a_picture_that_cannot_be_drawn(capsys, words, tmp_path):
    assert "--plot ends in" in refused(capsys, *words, "--plot", tmp_path / "a.xyz")


# what a run's own recipe says of how it reads


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A run on documents that are shorter than a window, attention within each."""
    folder = tmp_path_factory.mktemp("packed")
    docs = [{"text": f"{i}{'abcdef'[i % 6]}" * (1 + i % 3)} for i in range(400)]
    (folder / "docs.jsonl").write_text("".join(json.dumps(d) + "\n" for d in docs))
    words = ["train", "--data", folder / "docs.jsonl", "--out", folder / "run", "--packing", "documents", *QUICK]
    words += ["--steps", "30", "--lr", "0.01", "--ema", "0", "--eval-every", "30", "--eval-loops", "1,3"]
    assert cli.main([str(word) for word in words]) == 0
    return folder / "run"


AS_TRAINING = ["--bound", "time", "--samples", "1", "--windows", "128", "--loops", "1,3"]


def test_eval_of_packed_documents_is_what_training_measured(capsys, packed, tmp_path):
    held = lines(packed / "metrics.jsonl")[-1]["valid_bits"]
    status, out, err = run(capsys, "eval", packed, *AS_TRAINING, "--json", tmp_path / "a.json")
    assert status == 0, err
    report = json.loads((tmp_path / "a.json").read_text())
    assert [r["bits_per_character"] for r in report["rows"]] == pytest.approx([held["1"], held["3"]], rel=1e-5)
    assert "attention within each document" in out and report["measured_on"]["packing"] == "documents"
    assert report["measured_on"]["trained_on"] is False
    assert "--rolling reads across documents" in refused(capsys, "eval", packed, "--rolling")


def test_compare_reads_each_model_as_it_was_trained(capsys, packed, tmp_path):
    other = Path(shutil.copytree(packed, tmp_path / "other"))
    words = ["eval", packed, *AS_TRAINING, "--compare", other, "--json", tmp_path / "a.json"]

    def compared():
        status, out, err = run(capsys, *words)
        assert status == 0, err
        return out, json.loads((tmp_path / "a.json").read_text())["compare"]

    out, found = compared()
    assert all(r["difference"] == 0 for r in found["rows"]) and found["trained_on"] is False
    recipe = json.loads((other / "recipe.json").read_text())
    (other / "recipe.json").write_text(json.dumps({**recipe, "packing": "stream", "data_sha256": "another"}))
    out, found = compared()
    assert all(abs(r["difference"]) > 1e-4 for r in found["rows"])
    assert (found["packing"], found["trained_on"]) == ("stream", True)
    assert "which reads them with packing stream" in out and f"The recipe of {other} names that text" in out


def test_eval_of_a_run_on_answers(capsys, tmp_path):
    data, out_json = tmp_path / "qa.jsonl", tmp_path / "out.json"
    rows = [{"q": f"ask {i}", "a": "yes" if i % 2 else "not so"} for i in range(100, 180)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--sft", "--prompt-key", "q", "--answer-key", "a", "--ema", "0", *QUICK]
    assert run(capsys, "train", "--data", data, "--out", tmp_path / "run", *words)[0] == 0
    held = lines(tmp_path / "run" / "metrics.jsonl")[-1]["valid_bits"]
    words = ["eval", tmp_path / "run", "--bound", "time", "--samples", "1", "--loops", "1,2,3", "--json", out_json]
    status, out, err = run(capsys, *words)
    assert status == 0, err
    report = json.loads(out_json.read_text())
    # prompts are of one length, so that the mean over answers is the mean over tokens
    assert [r["bits"] for r in report["rows"]] == pytest.approx([held["1"], held["2"], held["3"]], rel=1e-5)
    assert report["rows"][0]["bits_per_character"] is None and report["measured_on"]["trained_on"] is False
    assert "4 answers, 36 tokens" in out and "prompts are given" in out

    status, out, err = run(capsys, *words, "--data", data, "--by-time", "--windows", "20")
    assert status == 0 and "20 answers of 80, spread evenly" in out and "names that text to train on" in out, err
    few = ["--windows", "8", "--samples", "1", "--bins", "2", "--data", data]
    assert run(capsys, "schedule", tmp_path / "run", *few, "--budget", "1")[0] == 0
    plain = tmp_path / "plain.txt"
    plain.write_text("ask yes not so " * 20)
    assert "windows of 16 tokens" in run(capsys, *words, "--data", plain)[1]
    assert "draws text from nothing" in refused(capsys, *words, "--generate", "2")
    assert "was fine-tuned on answers" in refused(capsys, *words, "--rolling")
    assert "has no key 'q'" in refused(capsys, *words, "--data", _written(tmp_path / "b.jsonl", '{"x": "y"}'))
    _written(data, data.read_text().replace("yes", "no"))
    assert "so what it held out is not known" in refused(capsys, *words)


def _written(path, text):
    path.write_text(text)
    return path


# schedule


def test_schedule_writes_a_table_that_sample_uses(capsys, copy, text):
    words = ["schedule", copy, "--data", text, "--length", "16", "--windows", "12", "--samples", "2", "--bins", "4"]
    status, out, err = run(capsys, *words, "--loops", "1,2,3", "--budget", "0.7")
    assert status == 0, err
    table = DepthTable.load(copy / "depth.json")
    found = json.loads((copy / "depth.json").read_text(), parse_constant=pytest.fail)
    assert len(table.loops) == 4 and set(table.loops) <= {1, 2, 3} and found["budget"] == 0.7
    assert [row[-1].strip() for row in rows_of(out, "t ")] == [str(S) for S in table.loops]
    model, _ = load(copy)
    spent = sum(model.forward_flops(16, S) for S in table.loops) / 4 / model.forward_flops(16, 3)
    assert spent <= 0.7 and found["held_out"]["flops_share"] == pytest.approx(spent, rel=0.01)
    assert found["held_out"]["constant_of_the_same_cost"]["loops"] in out
    sure = found["held_out"]["constant_of_the_same_cost"]
    assert ("Warning: the table's gain" in out) == (sure["gain"] <= 2 * sure["gain_error"])
    assert run(capsys, "sample", copy, "--loops", "auto", "--steps", "4", "--max-new-tokens", "8")[0] == 0


def test_schedule_elsewhere(capsys, copy, text, tmp_path):
    words = ["schedule", copy, "--data", text, "--length", "16", "--windows", "4", "--samples", "1", "--bins", "2"]
    status, out, _ = run(capsys, *words, "--out", tmp_path / "table.json", "--budget", "1")
    assert status == 0 and not (copy / "depth.json").exists() and f"Wrote {tmp_path / 'table.json'}" in out
    assert DepthTable.load(tmp_path / "table.json").edges == (0.0, pytest.approx(0.5005), 1.0)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--budget", "0"], "--budget is 0.0"),
        (["--budget", "1.5"], "--budget is 1.5"),
        (["--budget", "0.1"], "the smallest S alone takes"),
        (["--loops", "2"], "only S = 2 to choose from"),
        (["--loops", "0,2"], "--loops is 0"),
        (["--samples", "0"], "samples is 0"),
        (["--bins", "0"], "bins is 0"),
        (["--windows", "3"], "3 windows cannot be split"),
        (["--out", "no/where.json"], "there is no folder no"),
        (["--data", "nowhere.txt"], "nowhere.txt"),
    ],
)
def test_schedule_refuses(capsys, copy, text, extra, message):
    before = sorted(p.name for p in copy.iterdir())
    words = ["schedule", copy, "--data", text, "--length", "16", "--windows", "6", "--samples", "1", "--bins", "2"]
    status, out, err = run(capsys, *words, *extra)
    assert status == 2 and message in err and err.count("\n") == 1 and out == ""
    assert sorted(p.name for p in copy.iterdir()) == before


def test_a_shorter_model_is_compared_in_shorter_windows(capsys, words, copy):
    model, _ = load(copy)
    live(dataclasses.replace(model.config, max_position_embeddings=12)).save_pretrained(copy)
    status, out, err = run(capsys, *words, "--compare", copy)
    assert status == 2 and "more than the 12 of" in err and out == ""
    assert run(capsys, *words, "--compare", copy, "--length", "12")[0] == 0


def test_schedule_of_an_unlooped_model(capsys, tmp_path, text):
    from loopmdm.lab.data import build_tokenizer

    tokenizer = build_tokenizer("char", TEXT)
    size = tokenizer.get_vocab_size()
    live(tiny(vocab_size=size + 1, mask_token_id=size, max_loops=1)).save_pretrained(tmp_path)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert "only S = 1 to choose from" in refused(capsys, "schedule", tmp_path, "--data", text)
