"""Saving and loading: what comes back is what went in, and what cannot be read says so in one sentence."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import PyTorchModelHubMixin
from safetensors.torch import load_file, save_file

import loopmdm
from loopmdm.errors import InputError
from loopmdm.model import checkpoint
from loopmdm.model.checkpoint import load_weights, read_config
from loopmdm.model.lm import LoopMDM

from .helpers import BACKBONES, ids, live, randomize_, tiny

CONFIGS = {
    "dit": tiny("dit", dropout=0.1),
    "llama": tiny("llama", boundary="anchored"),
    "tied": tiny("llama", tie_word_embeddings=True, head_bias=True),
    "learned": tiny("dit", positions="both", time_conditioning=True, qk_norm="after_rope"),
}


def snapshot(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture
def saved(tmp_path):
    """A model and the folder that holds it."""
    model = live(CONFIGS["llama"])
    model.save_pretrained(tmp_path / "model")
    return model, tmp_path / "model"


@pytest.mark.parametrize("name", CONFIGS)
def test_round_trip(name, tmp_path):
    model = live(CONFIGS[name])
    model.save_pretrained(tmp_path / "deep" / "er")
    again = LoopMDM.from_pretrained(tmp_path / "deep" / "er")
    assert again.config == model.config and same(model, again)
    assert not again.training
    sigma = torch.full((2,), 0.5)
    with torch.no_grad():
        tokens = ids(2, 9)
        assert torch.equal(model(tokens, sigma=sigma).logits, again(tokens, sigma=sigma).logits)
    assert sorted(os.listdir(tmp_path / "deep" / "er")) == ["README.md", "config.json", "model.safetensors"]


def test_tied_embeddings_are_stored_once_and_stay_tied(tmp_path):
    model = live(CONFIGS["tied"])
    assert model.lm_head.weight is model.embed.weight
    assert sum(p is model.embed.weight for p in model.parameters()) == 1
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    again = LoopMDM.from_pretrained(tmp_path)
    assert again.lm_head.weight is again.embed.weight and same(model, again)


class Damped(torch.nn.Module):
    """A boundary with a weight."""

    def __init__(self, weight=1.0):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([weight]))

    def forward(self, x, x0, k):
        return self.weight * x + x0


@pytest.mark.parametrize("also", [(), ((3, 1),)])
def test_a_boundary_with_weights_comes_back(also, tmp_path):
    """Stored once where several looped blocks share it; without the module its weights have no place."""
    model = randomize_(LoopMDM(tiny().replace(also=also), Damped(0.7))).eval()
    model.save_pretrained(tmp_path)
    assert [name for name in load_file(tmp_path / "model.safetensors") if "boundary" in name] == [
        "loop.boundary.weight"
    ]
    again = LoopMDM.from_pretrained(tmp_path, boundary=Damped())
    assert len({id(block.boundary) for block in again.looped_blocks}) == 1 and same(model, again)
    with torch.no_grad():
        assert torch.equal(model.hidden(ids(2, 9)), again.hidden(ids(2, 9)))
    with pytest.raises(InputError, match=r"1 unknown \['loop.boundary.weight'\]"):
        LoopMDM.from_pretrained(tmp_path)


def test_config_json_is_readable_and_complete(saved):
    model, folder = saved
    text = (folder / "config.json").read_text()
    data = json.loads(text)
    assert data.pop("model_type") == "loopmdm" and text.count("\n") > 20
    assert data == model.config.to_dict() and data["loop"]["boundary"] == "anchored"
    assert read_config(folder / "config.json") == model.config


def test_saving_over_a_former_checkpoint(saved):
    model, folder = saved
    (folder / "README.md").write_text("mine")
    randomize_(model, seed=9)
    model.save_pretrained(folder)
    assert same(model, LoopMDM.from_pretrained(str(folder)))
    assert (folder / "README.md").read_text() == "mine"
    assert len(list(folder.iterdir())) == 3


def test_bf16_weights_load_as_they_are(tmp_path):
    model = live(CONFIGS["llama"]).bfloat16()
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors")["embed.weight"].dtype == torch.bfloat16
    again = LoopMDM.from_pretrained(tmp_path)
    assert torch.equal(again.embed.weight, model.embed.weight.float())


@pytest.mark.parametrize("failing", ["save_file", "fsync", "replace", "write_text"])
def test_a_failed_save_leaves_the_former_one(saved, monkeypatch, failing):
    model, folder = saved
    before = snapshot(folder)
    old = {k: v.clone() for k, v in model.state_dict().items()}
    randomize_(model, seed=9)

    def fail(*args, **kwargs):
        if failing == "save_file":  # a partial file is on the disk when it fails
            with open(args[1], "wb") as file:
                file.write(b"half")
        raise OSError("no space left")

    target = {"save_file": checkpoint, "write_text": Path}.get(failing, os)
    monkeypatch.setattr(target, failing, fail)
    with pytest.raises(OSError, match="no space"):
        model.save_pretrained(folder)
    monkeypatch.undo()
    assert snapshot(folder) == before
    again = LoopMDM.from_pretrained(folder).state_dict()
    assert all(torch.equal(again[k], v) for k, v in old.items())


def damaged(folder, how):
    """Break a checkpoint in one way; returns words of the message it must give."""
    weights, config = folder / "model.safetensors", folder / "config.json"
    state = {k: v.clone() for k, v in load_file(weights).items()}  # load_file maps the file that is overwritten here
    if how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
        return "model.safetensors is truncated or not a safetensors file"
    if how == "cut in the header":
        weights.write_bytes(weights.read_bytes()[:20])
        return "truncated or not a safetensors file"
    if how == "empty":
        weights.write_bytes(b"")
        return "truncated or not a safetensors file"
    if how == "pickle":
        torch.save(state, weights)
        return "truncated or not a safetensors file"
    if how == "no weights":
        weights.unlink()
        return "has no model.safetensors; it is not a LoopMDM checkpoint"
    if how == "no config":
        config.unlink()
        return "has no config.json; it is not a LoopMDM checkpoint"
    if how == "foreign config":
        config.write_text('{"model_type": "llama", "hidden_size": 32}')
        return "is not a LoopMDM configuration"
    if how == "nameless config":
        config.write_text('{"hidden_size": 32}')
        return "is not a LoopMDM configuration"
    if how == "list config":
        config.write_text("[1, 2]")
        return "is not a LoopMDM configuration"
    if how == "broken config":
        config.write_text('{"model_type": ')
        return "config.json cannot be read as JSON"
    if how == "binary config":
        config.write_bytes(b"\xff\xfe\x00\x01")
        return "config.json cannot be read as JSON"
    if how == "unknown key":
        config.write_text(json.dumps({**json.loads(config.read_text()), "num_loop": 3}))
        return "unknown configuration key 'num_loop'"
    if how == "wrong type":
        config.write_text(json.dumps({**json.loads(config.read_text()), "dropout": "a lot"}))
        return "dropout is 'a lot'; it must be a number"
    if how == "wrong shape":
        state["embed.weight"] = state["embed.weight"][:, :-1].contiguous()
        save_file(state, weights)
        return r"embed.weight is \[11, 31\], the configuration says \[11, 32\]"
    if how == "missing key":
        del state["coda.0.mlp.up.weight"]
        save_file(state, weights)
        return r"1 tensors missing \W+coda\.0\.mlp\.up\.weight\W+ 0 unknown"
    state["loop.layers.7.mlp.up.weight"] = torch.zeros(3)
    save_file(state, weights)
    return r"0 tensors missing\W+ 1 unknown \W+loop\.layers\.7\.mlp\.up\.weight"


DAMAGE = [
    "truncated",
    "cut in the header",
    "empty",
    "pickle",
    "no weights",
    "no config",
    "foreign config",
    "nameless config",
    "list config",
    "broken config",
    "binary config",
    "unknown key",
    "wrong type",
    "wrong shape",
    "missing key",
    "extra key",
]


@pytest.mark.parametrize("how", DAMAGE)
def test_damage_is_one_sentence(how, saved):
    _, folder = saved
    words = damaged(folder, how)
    with pytest.raises(InputError, match=words) as caught:
        LoopMDM.from_pretrained(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("how", ["truncated", "wrong shape", "missing key", "extra key"])
def test_a_file_that_does_not_fit_changes_nothing(how, saved):
    _, folder = saved
    damaged(folder, how)
    other = live(CONFIGS["llama"], seed=5)
    before = {k: v.clone() for k, v in other.state_dict().items()}
    with pytest.raises(InputError):
        load_weights(other, folder / "model.safetensors")
    assert all(torch.equal(before[k], v) for k, v in other.state_dict().items())


def test_weights_of_another_architecture(saved, tmp_path):
    _, folder = saved
    live(CONFIGS["dit"]).save_pretrained(tmp_path / "dit")
    shutil.copy(tmp_path / "dit" / "model.safetensors", folder)
    with pytest.raises(InputError, match="does not fit its configuration: 1 tensors missing"):
        LoopMDM.from_pretrained(folder)


@pytest.mark.parametrize("where", ["nothing here", "./nothing/at/all", "someone/some-model"])
def test_nothing_there(where):
    with pytest.raises(InputError, match=r"is not a folder, and config\.json could not be had from the Hub") as caught:
        LoopMDM.from_pretrained(where, local_files_only=True)
    assert "\n" not in str(caught.value)


def test_push_to_hub(saved, monkeypatch):
    """The mixin's own, and save_pretrained passes on what it is given."""
    model, folder = saved
    assert isinstance(model, PyTorchModelHubMixin) and LoopMDM.push_to_hub is PyTorchModelHubMixin.push_to_hub
    calls = []
    monkeypatch.setattr(LoopMDM, "push_to_hub", lambda self, *args, **kwargs: calls.append((args, kwargs)) or "url")
    assert model.save_pretrained(folder) is None and not calls
    assert model.save_pretrained(folder, push_to_hub=True, private=True) == "url"
    assert model.save_pretrained(folder, push_to_hub=True, repo_id="me/it") == "url"
    assert calls == [(("model",), {"private": True}), (("me/it",), {})]


def test_push_to_hub_uploads_the_checkpoint(saved, monkeypatch):
    model, _ = saved
    seen = {}

    class Api:
        def __init__(self, **_):
            pass

        def create_repo(self, repo_id, **_):
            return type("Repo", (), {"repo_id": repo_id})

        def upload_folder(self, folder_path, **_):
            seen.update(snapshot(folder_path))

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Api)
    model.push_to_hub("me/it")
    assert json.loads(seen["config.json"])["model_type"] == "loopmdm" and "README.md" in seen
    assert len(seen["model.safetensors"]) > 4 * sum(p.numel() for p in model.parameters())


def test_from_preset():
    model = loopmdm.LoopMDM.from_preset("tiny-dit", max_loops=2, vocab_size=9)
    assert model.max_loops == 2 and model.mask_id == 8 and model.vocab_size == 9
    assert model.suppressed_ids == (8,) and model.logit_shift == 0 and model.max_length == 256


@pytest.mark.parametrize("config", [CONFIGS["dit"], CONFIGS["llama"].replace(also=((3, 1),))], ids=["dit", "llama"])
def test_hidden_is_one_graph(config):
    torch._dynamo.reset()
    model, tokens = live(config), ids(2, 9)
    compiled = torch.compile(model.hidden, backend="eager", fullgraph=True)
    for S, mask in ((1, None), (2, torch.arange(9) < torch.tensor([9, 6])[:, None])):
        torch.testing.assert_close(compiled(tokens, mask, S), model.hidden(tokens, mask, S), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("how", ["hidden", "layers"])
def test_compiled_code_is_what_losses_and_sampling_run(how):
    torch._dynamo.reset()
    model, tokens, ran, made = live(tiny(length=1)), ids(2, 9, masks=0), [], []

    def backend(graph, _):
        made.append(graph)
        return lambda *inputs: ran.append(1) or graph.forward(*inputs)

    uses = (
        lambda: loopmdm.nelbo(model, tokens, num_loops=2).nelbo,
        lambda: loopmdm.generate(model, max_new_tokens=6, steps=1, num_loops=2).tokens,
    )
    want = [use() for use in uses]
    if how == "hidden":
        model.hidden = torch.compile(model.hidden, backend=backend)
    else:
        for layer in model.layers:
            layer.compile(backend=backend)
    for use, result in zip(uses, want, strict=True):
        ran.clear()
        torch.testing.assert_close(use(), result, rtol=1e-5, atol=1e-5)
        assert ran
    if how == "layers":
        graphs = len(made)
        with torch.no_grad():
            for S in range(3, 13):
                model.hidden(tokens, num_loops=S)
        assert len(made) <= graphs + 1, "a graph of each S"


@pytest.mark.parametrize("backbone", BACKBONES)
def test_logits_are_computed_once_when_read(backbone):
    model = live(tiny(backbone))
    calls = []
    original = model.head
    model.head = lambda: calls.append(1) or original()
    out = model(ids(1, 5))
    assert not calls
    assert out.logits is out.logits and len(calls) == 1


@pytest.mark.parametrize("padding", ["none", "padded", "documents"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"backbone": "dit"}, {"qk_norm": "after_rope"}, {"positions": "learned"}, {"start": 1, "length": 3}],
    ids=str,
)
def test_rows_are_what_the_whole_pass_gives(changes, padding):
    """hidden(rows=) is hidden() there, whatever lies elsewhere; the last layer works on these positions alone."""
    model = live(tiny(**changes))
    tokens, rng = ids(3, 12), torch.Generator().manual_seed(2)
    more = {}
    if padding == "padded":
        more["attention_mask"] = torch.arange(12) >= torch.tensor([0, 3, 7])[:, None]
    elif padding == "documents":
        more["document_ids"] = torch.tensor([[0] * 5 + [1] * 7, [0] * 12, [4] * 2 + [9] * 10])
    rows = torch.zeros(3, 12, dtype=torch.bool)
    rows[0, [2, 7, 8, 11]], rows[2, 9] = True, True
    seen = []
    handle = model.layers[-1].mlp.register_forward_hook(lambda m, args, out: seen.append(out.shape[1]))
    with torch.no_grad():
        want, got = model.hidden(tokens, num_loops=2, **more), model.hidden(tokens, num_loops=2, rows=rows, **more)
        full = model.hidden(tokens, num_loops=2, rows=torch.rand(3, 12, generator=rng) < 0.9, **more)
    handle.remove()
    torch.testing.assert_close(got[rows], want[rows], rtol=1e-5, atol=1e-5)
    assert torch.equal(full, want)
    assert seen == ([12, 4, 12] if len(model.coda) else [12] * 6)


def test_rows_that_are_none_or_no_rows():
    model, tokens = live(tiny()), ids(2, 6)
    nowhere = torch.zeros_like(tokens, dtype=torch.bool)
    with torch.no_grad():
        assert model.hidden(tokens[:0], rows=nowhere[:0]).shape == (0, 6, 32)
        assert model.hidden(tokens, rows=nowhere).shape == (2, 6, 32)
        for wrong in (nowhere[:, :4], torch.zeros_like(tokens)):
            with pytest.raises(InputError, match="rows is"):
                model.hidden(tokens, rows=wrong)


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("policy", ["ancestral", "confidence"])
def test_generate_with_a_last_layer_of_few_rows(policy, shift):
    """The tokens are those of whole passes, with guidance and prompts of unlike length too."""
    model = live(tiny(logit_shift=shift))
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8, 9]]
    calls, hidden = [], model.hidden

    def watched(*args, **more):
        calls.append(more.get("rows"))
        return hidden(*args, **more)

    model.hidden = watched
    runs = []
    for takes in (True, False):
        model.takes_rows = takes
        options = {"max_new_tokens": 12, "steps": 6, "num_loops": 2, "policy": policy, "seed": 3, "cfg_scale": 0.5}
        runs.append(loopmdm.generate(model, prompts, **options).tokens)
    assert torch.equal(*runs)
    some = [rows for rows in calls if rows is not None]
    assert len(some) == len(calls) / 2 and min(int(rows.sum(-1).max()) for rows in some) < 6
