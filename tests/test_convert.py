"""Conversion: every codebase's checkpoints and back, bit for bit; files that lie, and files that attack."""

import builtins
import functools
import io
import json
import os
import pickle
import struct
import sys
import types
import zipfile
from collections import OrderedDict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import loopmdm
from loopmdm.adapters import convert, unpickle, weights
from loopmdm.adapters.parity import check_parity
from loopmdm.cli import main
from loopmdm.errors import InputError

from . import peer_layers
from .commands import files, refused, run
from .helpers import ids

D, F, V, L, H, G, C = 16, 24, 13, 3, 4, 2, 6
HD = D // H

MDLM_LAYER = {
    "norm1.weight": [D],
    "attn_qkv.weight": [3 * D, D],
    "attn_out.weight": [D, D],
    "norm2.weight": [D],
    "mlp.0.weight": [4 * D, D],
    "mlp.0.bias": [4 * D],
    "mlp.2.weight": [D, 4 * D],
    "mlp.2.bias": [D],
    "adaLN_modulation.weight": [6 * D, C],
    "adaLN_modulation.bias": [6 * D],
}
LLADA_LAYER = {
    "attn_norm.weight": [D],
    "q_proj.weight": [D, D],
    "k_proj.weight": [G * HD, D],
    "v_proj.weight": [G * HD, D],
    "attn_out.weight": [D, D],
    "ff_norm.weight": [D],
    "ff_proj.weight": [F, D],
    "up_proj.weight": [F, D],
    "ff_out.weight": [D, F],
}
DREAM_LAYER = {
    "self_attn.q_proj.weight": [D, D],
    "self_attn.q_proj.bias": [D],
    "self_attn.k_proj.weight": [G * HD, D],
    "self_attn.k_proj.bias": [G * HD],
    "self_attn.v_proj.weight": [G * HD, D],
    "self_attn.v_proj.bias": [G * HD],
    "self_attn.o_proj.weight": [D, D],
    "mlp.gate_proj.weight": [F, D],
    "mlp.up_proj.weight": [F, D],
    "mlp.down_proj.weight": [D, F],
    "input_layernorm.weight": [D],
    "post_attention_layernorm.weight": [D],
}
SMDM_LAYER = {
    "norm_1.weight": [D],
    "attn.attn.weight": [(H + 2 * G) * HD, D],
    "attn.proj.weight": [D, D],
    "norm_2.weight": [D],
    "mlp.swiglu.w1.weight": [F, D],
    "mlp.swiglu.w2.weight": [F, D],
    "mlp.swiglu.w3.weight": [D, F],
}
SHAPES = {
    "mdlm": {
        "backbone.vocab_embed.embedding": [V, D],
        **{f"backbone.sigma_map.mlp.{i}.weight": [C, n] for i, n in ((0, 256), (2, C))},
        **{f"backbone.sigma_map.mlp.{i}.bias": [C] for i in (0, 2)},
        "backbone.rotary_emb.inv_freq": [HD // 2],
        **{f"backbone.blocks.{i}.{k}": s for i in range(L) for k, s in MDLM_LAYER.items()},
        "backbone.output_layer.norm_final.weight": [D],
        "backbone.output_layer.linear.weight": [V, D],
        "backbone.output_layer.linear.bias": [V],
        "backbone.output_layer.adaLN_modulation.weight": [2 * D, C],
        "backbone.output_layer.adaLN_modulation.bias": [2 * D],
    },
    "llada": {
        "model.transformer.wte.weight": [V, D],
        **{f"model.transformer.blocks.{i}.{k}": s for i in range(L) for k, s in LLADA_LAYER.items()},
        "model.transformer.ln_f.weight": [D],
        "model.transformer.ff_out.weight": [V, D],
    },
    "dream": {
        "model.embed_tokens.weight": [V, D],
        **{f"model.layers.{i}.{k}": s for i in range(L) for k, s in DREAM_LAYER.items()},
        "model.norm.weight": [D],
        "lm_head.weight": [V, D],
    },
    "smdm": {
        "transformer.wte.weight": [V, D],
        **{f"transformer.h.{i}.{k}": s for i in range(L) for k, s in SMDM_LAYER.items()},
        "transformer.ln_f.weight": [D],
        "lm_head.weight": [V - 1, D],
    },
}
CONFIGS = {
    "mdlm": {
        "backbone": "dit",
        "time_conditioning": False,
        "model": {"hidden_size": D, "cond_dim": C, "length": 32, "n_blocks": L, "n_heads": H, "dropout": 0.1},
    },
    "llada": {
        "model_type": "llada",
        "d_model": D,
        "n_layers": L,
        "n_heads": H,
        "n_kv_heads": G,
        "mlp_hidden_size": F,
        "vocab_size": V,
        "embedding_size": V,
        "mask_token_id": 9,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "max_sequence_length": 32,
    },
    "dream": {
        "model_type": "Dream",
        "architectures": ["DreamModel"],
        "hidden_size": D,
        "num_hidden_layers": L,
        "num_attention_heads": H,
        "num_key_value_heads": G,
        "intermediate_size": F,
        "vocab_size": V,
        "mask_token_id": 11,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "max_position_embeddings": 32,
    },
    "smdm": {
        "n_layer": L,
        "n_head": H,
        "n_query_groups": G,
        "n_embd": D,
        "intermediate_size": F,
        "padded_vocab_size": V - 1,
        "block_size": 32,
        "norm_eps": 1e-5,
    },
}
FAMILIES = sorted(SHAPES)


def peer_state(name, seed=0, dtype=torch.float32):
    rng = torch.Generator().manual_seed(seed)
    state = {k: (torch.randn(s, generator=rng) * 0.3).to(dtype) for k, s in SHAPES[name].items()}
    if name == "mdlm":
        steps = torch.arange(0, HD, 2).float()
        state["backbone.rotary_emb.inv_freq"] = 1.0 / (10000 ** (steps / HD))
    return state


def written(folder, name, state=None):
    folder.mkdir()
    save_file(peer_state(name) if state is None else state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIGS[name]))
    return folder


def equal(a, b):
    assert list(sorted(a)) == list(sorted(b))
    for key in a:
        assert a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FAMILIES)
def test_round_trip_is_bit_for_bit(tmp_path, capsys, name, dtype):
    state = peer_state(name, dtype=dtype)
    if name == "mdlm":  # the buffer stays fp32 in a model of any dtype
        state["backbone.rotary_emb.inv_freq"] = peer_state(name)["backbone.rotary_emb.inv_freq"]
    source = written(tmp_path / "in", name, state)
    status, out, err = run(capsys, "convert", "--from", name, source, tmp_path / "ours")
    assert status == 0 and "weights of " + name in out and "read" in err
    model = loopmdm.LoopMDM.from_pretrained(tmp_path / "ours")
    assert model.max_loops == 1 and model.logit_shift == (name == "dream")
    assert model.mask_id == {"mdlm": 12, "llada": 9, "dream": 11, "smdm": 12}[name]
    assert run(capsys, "convert", "--to", name, tmp_path / "ours", tmp_path / "back")[0] == 0
    equal(load_file(tmp_path / "back/model.safetensors"), state)
    assert json.loads((tmp_path / "back/config.json").read_text()).items() >= CONFIGS[name].items()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_native_model_goes_out_and_comes_back(tmp_path, name):
    """Without a source.json the configuration is written anew; ours -> theirs -> ours changes no bit."""
    convert.to_loopmdm(written(tmp_path / "in", name), tmp_path / "a", name)
    (tmp_path / "a/source.json").unlink()
    convert.from_loopmdm(tmp_path / "a", tmp_path / "peer", name)
    convert.to_loopmdm(tmp_path / "peer", tmp_path / "b", name)
    equal(load_file(tmp_path / "b/model.safetensors"), load_file(tmp_path / "a/model.safetensors"))
    a, b = (json.loads((tmp_path / x / "config.json").read_text()) for x in "ab")
    assert a == b


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("mdlm", {"rope_theta": 500.0}),
        ("llada", {"tie_word_embeddings": False, "qk_norm": "before_rope"}),
        ("smdm", {"rope_table_dtype": "float32"}),
        ("smdm", {"qkv_bias": True}),
        ("llada", {"norm_bias": True}),
        ("dream", {"attention_out_bias": True}),
    ],
)
def test_what_a_codebase_cannot_express_is_refused(tmp_path, name, field):
    convert.to_loopmdm(written(tmp_path / "in", name), tmp_path / "a", name)
    config = tmp_path / "a/config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **field}))
    with pytest.raises(InputError, match=rf"cannot express this model's {list(field)[-1]} =|has qk_norm = 'none'"):
        convert.from_loopmdm(tmp_path / "a", tmp_path / "out", name)
    assert not (tmp_path / "out").exists()


def test_looped_layers_find_their_place(tmp_path):
    convert.to_loopmdm(written(tmp_path / "in", "llada"), tmp_path / "a", "llada")
    model = loopmdm.LoopMDM.from_pretrained(tmp_path / "a")
    model.relooped(start=0, length=1, max_loops=4, also=((2, 1),)).save_pretrained(tmp_path / "looped")
    convert.from_loopmdm(tmp_path / "looped", tmp_path / "peer", "llada")
    equal(load_file(tmp_path / "peer/model.safetensors"), peer_state("llada"))
    model.relooped(boundary="anchored", max_loops=2).save_pretrained(tmp_path / "anchored")
    with pytest.raises(InputError, match="whose gains have no place in llada"):
        convert.from_loopmdm(tmp_path / "anchored", tmp_path / "x", "llada")


def grouped(state):
    """Layers 2 g + j under the names of LLaDA's groups of two."""

    def name(key):
        head, blocks, rest = key.partition("blocks.")
        index, _, rest = rest.partition(".")
        return f"{head}block_groups.{int(index) // 2}.{int(index) % 2}.{rest}" if blocks else key

    return {name(key): tensor for key, tensor in state.items()}


def test_layers_in_groups(tmp_path):
    """block_group_size > 1: groups of two with a short last one, there and back."""
    plain = peer_layers.drawn("llada", n_layers=5)
    state = grouped(plain.state_dict())
    torch.save(state, tmp_path / "x.pt")
    settings = {**vars(plain.config), "block_group_size": 2}
    convert.to_loopmdm(tmp_path / "x.pt", tmp_path / "ours", "llada", config=settings)
    ids_ = torch.randint(0, peer_layers.VOCAB - 1, (2, 9), generator=torch.Generator().manual_seed(0))
    ours = loopmdm.LoopMDM.from_pretrained(tmp_path / "ours")(ids_).logits[..., :-1]
    torch.testing.assert_close(ours, plain(ids_)[..., :-1], atol=1e-5, rtol=0)
    convert.from_loopmdm(tmp_path / "ours", tmp_path / "back", "llada")
    equal(load_file(tmp_path / "back" / "model.safetensors"), state)
    torch.save({**state, "model.transformer.blocks.0.attn_norm.weight": torch.ones(32)}, tmp_path / "y.pt")
    with pytest.raises(InputError, match="holds a layer twice"):
        convert.to_loopmdm(tmp_path / "y.pt", tmp_path / "never", "llada", config=settings)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("llada", {"input_emb_norm": True}),
        ("llada", {"scale_logits": True}),
        ("llada", {"activation_type": "gelu"}),
        ("llada", {"layer_norm_type": "gemma_rms"}),
        ("llada", {"rope": False}),
        ("dream", {"hidden_act": "gelu"}),
        ("dream", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}),
        ("dream", {"rope_scaling": {"type": "linear", "factor": 2.0}}),
        ("dream", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0}}),
        ("dream", {"model_type": "qwen2", "use_sliding_window": True}),
        ("smdm", {"condense_ratio": 2}),
        ("smdm", {"rotary_percentage": 0.25}),
        ("smdm", {"parallel_residual": True}),
    ],
)
def test_settings_that_would_silently_change_the_numbers(tmp_path, name, change):
    plain = peer_layers.drawn(name)
    torch.save(plain.state_dict(), tmp_path / "x.pt")
    with pytest.raises(InputError, match=f"the {name} configuration has "):
        convert.to_loopmdm(tmp_path / "x.pt", tmp_path / "y", name, config={**vars(plain.config), **change})
    assert not (tmp_path / "y").exists()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("dream", {"rope_theta": None}),
        ("dream", {"num_hidden_layers": "3"}),
        ("llada", {"rope_theta": None}),
        ("llada", {"mlp_hidden_size": None, "mlp_ratio": None}),
        ("smdm", {"padded_vocab_size": "12"}),
        ("mdlm", {"model": {**CONFIGS["mdlm"]["model"], "hidden_size": None}}),
    ],
)
def test_settings_of_a_wrong_kind_get_one_sentence(tmp_path, name, change):
    source = written(tmp_path / "in", name)
    with pytest.raises(InputError) as error:
        convert.to_loopmdm(source, tmp_path / "x", name, config={**CONFIGS[name], **change})
    assert f"the {name} configuration has a setting that does not fit (TypeError: " in str(error.value)
    assert "\n" not in str(error.value) and not (tmp_path / "x").exists()
    convert.to_loopmdm(source, tmp_path / "ours", name)
    note = json.loads((tmp_path / "ours/source.json").read_text())
    (tmp_path / "ours/source.json").write_text(json.dumps({**note, "config": {**note["config"], **change}}))
    with pytest.raises(InputError, match="has a setting that does not fit"):
        convert.from_loopmdm(tmp_path / "ours", tmp_path / "x", name)


@pytest.mark.parametrize("size", [10**12, 10**30])
def test_settings_beyond_any_memory(tmp_path, size):
    source = written(tmp_path / "in", "llada")
    with pytest.raises(InputError) as error:
        convert.to_loopmdm(source, tmp_path / "x", "llada", config={**CONFIGS["llada"], "d_model": H * size})
    assert "\n" not in str(error.value) and not (tmp_path / "x").exists()


def described(config):
    """A peer's configuration as its config.json would have it."""
    return {k: described(v) if isinstance(v, types.SimpleNamespace) else v for k, v in vars(config).items()}


@pytest.mark.parametrize("name", peer_layers.FAMILIES)
def test_the_converted_model_computes_what_the_peer_does(tmp_path, name):
    peer = peer_layers.drawn(name)
    config = {**described(peer.config), **({"model_type": "qwen3"} if name == "qwen3" else {})}
    source = "dream" if name == "qwen3" else name
    (tmp_path / "in").mkdir()
    save_file({k: v.contiguous() for k, v in peer.state_dict().items()}, tmp_path / "in/model.safetensors")
    (tmp_path / "in/config.json").write_text(json.dumps(config))
    convert.to_loopmdm(tmp_path / "in", tmp_path / "ours", source)
    model = loopmdm.LoopMDM.from_pretrained(tmp_path / "ours")
    tokens = ids(2, 9, peer_layers.VOCAB)
    result = check_parity(peer, model, tokens, peer_call=lambda m, x: peer_layers.logits(m, x), show=False)
    assert result.equal and len(result.places) >= 1 + 9 * peer_layers.LAYERS + 1, str(result)
    with torch.no_grad():
        want, got = peer_layers.logits(peer, tokens), model(tokens).logits[..., : peer_layers.VOCAB - 1]
    want = getattr(want, "logits", want)[..., : peer_layers.VOCAB - 1]
    assert want.std() > 0.1 and (want - got).abs().max() < 1e-5
    assert (model.suppressed_ids, model.logit_shift) == ((peer_layers.VOCAB - 1,), int(source == "dream"))


# Lightning files


def module(name, **members):
    """A module that pickling finds and unpickling must not."""
    made = types.ModuleType(name)
    for key, value in members.items():
        value.__module__, value.__qualname__ = name, key
        setattr(made, key, value)
    return made


def lightning(path, name="mdlm", settings=None, ema=True, extra=None):
    """What MDLM's trainer writes: OmegaConf objects and a tokenizer among the hyper-parameters."""

    def node(value):
        if isinstance(value, dict):
            made = DictConfig()
            made.__dict__ = {"_metadata": Node(), "_parent": None, "_content": {k: node(v) for k, v in value.items()}}
        elif isinstance(value, list):
            made = ListConfig()
            made.__dict__ = {"_metadata": Node(), "_content": [node(v) for v in value]}
        else:
            made = Node()
            made.__dict__ = {"_metadata": None, "_val": value}
        return made

    DictConfig, ListConfig, Node, Tok = (type(n, (), {}) for n in ("DictConfig", "ListConfig", "AnyNode", "Tokenizer"))
    modules = {
        "omegaconf": module("omegaconf"),
        "omegaconf.dictconfig": module("omegaconf.dictconfig", DictConfig=DictConfig),
        "omegaconf.listconfig": module("omegaconf.listconfig", ListConfig=ListConfig),
        "omegaconf.nodes": module("omegaconf.nodes", AnyNode=Node),
        "no_such_tokenizers": module("no_such_tokenizers", Tokenizer=Tok),
    }
    state = OrderedDict(peer_state(name))
    checkpoint = {
        "epoch": 3,
        "state_dict": state,
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 1e-3}]}],
        "hyper_parameters": {"config": node(settings or {**CONFIGS[name], "betas": [0.9, 0.99]}), "tokenizer": Tok()},
        **(extra or {}),
    }
    if ema:
        shadow = [v + 1 for k, v in state.items() if not k.endswith("inv_freq")]
        checkpoint["ema"] = {"decay": 0.9999, "num_updates": 7, "shadow_params": shadow}
    sys.modules.update(modules)
    try:
        torch.save(checkpoint, path)
    finally:
        for key in modules:
            del sys.modules[key]
    return state


@pytest.mark.parametrize("which", [None, "ema", "raw"])
def test_lightning(tmp_path, which):
    state = lightning(tmp_path / "last.ckpt")
    done = convert.to_loopmdm(tmp_path / "last.ckpt", tmp_path / "ours", "mdlm", weights=which)
    assert done.weights == (which or "ema") and done.config.vocab_size == V and done.config.dropout == 0.1
    note = json.loads((tmp_path / "ours/source.json").read_text())
    assert note["config"]["betas"] == [0.9, 0.99] and note["config"]["model"] == CONFIGS["mdlm"]["model"]
    convert.from_loopmdm(tmp_path / "ours", tmp_path / "back", "mdlm")
    add = 0 if which == "raw" else 1
    want = {k: v if k.endswith("inv_freq") else v + add for k, v in state.items()}
    equal(load_file(tmp_path / "back/model.safetensors"), want)
    assert not {"omegaconf", "no_such_tokenizers", "omegaconf.dictconfig"} & set(sys.modules)


@pytest.mark.parametrize("tokenizer", ["bert-base-uncased", "google-bert/bert-base-cased", "text8"])
def test_mdlm_takes_the_mask_token_of_its_tokenizer(tmp_path, tokenizer):
    """Its id is in no file; the last id, which is right where a tokenizer has none, would be another token."""
    settings = {**CONFIGS["mdlm"], "data": {"tokenizer_name_or_path": tokenizer}}
    state = lightning(tmp_path / "last.ckpt", settings=settings, ema=False)
    with pytest.raises(InputError, match=f"is the mask token of {tokenizer.rpartition('/')[2]}, .* give it as mask_id"):
        convert.to_loopmdm(tmp_path / "last.ckpt", tmp_path / "ours", "mdlm")
    assert not (tmp_path / "ours").exists()
    done = convert.to_loopmdm(tmp_path / "last.ckpt", tmp_path / "ours", "mdlm", mask_id=4)
    assert (
        main(["convert", "--from", "mdlm", "--mask-id", "4", str(tmp_path / "last.ckpt"), str(tmp_path / "cli")]) == 0
    )
    assert loopmdm.LoopMDM.from_pretrained(tmp_path / "cli").mask_id == 4
    assert done.config.mask_token_id == loopmdm.LoopMDM.from_pretrained(tmp_path / "ours").mask_id == 4
    convert.from_loopmdm(tmp_path / "ours", tmp_path / "back", "mdlm")
    equal(load_file(tmp_path / "back/model.safetensors"), state)
    convert.to_loopmdm(tmp_path / "back", tmp_path / "again", "mdlm")
    assert loopmdm.LoopMDM.from_pretrained(tmp_path / "again").mask_id == 4
    for i, (change, mask) in enumerate([({"mask_index": 3}, 3), ({"data": {"tokenizer_name_or_path": "gpt2"}}, V - 1)]):
        done = convert.to_loopmdm(tmp_path / "last.ckpt", tmp_path / str(i), "mdlm", config={**settings, **change})
        assert done.config.mask_token_id == mask


@pytest.mark.parametrize(("name", "mask_id"), [("mdlm", 2), ("llada", 2), ("dream", 2), ("smdm", V - 1)])
def test_a_mask_id_is_taken_or_refused(tmp_path, name, mask_id):
    source = written(tmp_path / "in", name)
    assert convert.to_loopmdm(source, tmp_path / "a", name, mask_id=mask_id).config.mask_token_id == mask_id
    if name == "smdm":
        with pytest.raises(InputError, match="mask_id is 2; a smdm model of this configuration has 12"):
            convert.to_loopmdm(source, tmp_path / "b", name, mask_id=2)
    with pytest.raises(InputError, match=f"mask_id is {V}|mask_token_id is {V}, outside"):
        convert.to_loopmdm(source, tmp_path / "b", name, mask_id=V)


def test_an_average_that_does_not_fit(tmp_path):
    lightning(tmp_path / "none.ckpt", ema=False)
    with pytest.raises(InputError, match="no moving average; convert it with --weights raw"):
        convert.to_loopmdm(tmp_path / "none.ckpt", tmp_path / "x", "mdlm", weights="ema")
    lightning(tmp_path / "few.ckpt", extra={"ema": {"shadow_params": [torch.ones(3)]}}, ema=False)
    with pytest.raises(InputError, match="the moving average has 1 tensors for "):
        convert.to_loopmdm(tmp_path / "few.ckpt", tmp_path / "x", "mdlm")
    shadow = [v.T.contiguous() if v.dim() == 2 else v for k, v in peer_state("mdlm").items() if "inv_freq" not in k]
    lightning(tmp_path / "other.ckpt", extra={"ema": {"shadow_params": shadow}}, ema=False)
    with pytest.raises(InputError, match=r"the moving average has \[16, 13\] for backbone.vocab_embed"):
        convert.to_loopmdm(tmp_path / "other.ckpt", tmp_path / "x", "mdlm")
    assert convert.to_loopmdm(tmp_path / "other.ckpt", tmp_path / "raw", "mdlm", weights="raw").weights == "raw"


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"model": s, "iter_num": 3}, lambda s: {"module": s}])
def test_plain_torch_files(tmp_path, wrap):
    """Flat, under "model" (lit-gpt) and under "module"; Parameters and views that share a storage are read too."""
    state = peer_state("smdm")
    flat = torch.cat([v.flatten() for v in state.values()])
    parts = flat.split([v.numel() for v in state.values()])
    shared = {name: part.view(state[name].shape) for name, part in zip(state, parts, strict=True)}
    shared["transformer.ln_f.weight"] = torch.nn.Parameter(shared["transformer.ln_f.weight"])
    torch.save(wrap(shared), tmp_path / "iter.pth")
    convert.to_loopmdm(tmp_path / "iter.pth", tmp_path / "ours", "smdm", config=CONFIGS["smdm"])
    convert.from_loopmdm(tmp_path / "ours", tmp_path / "back", "smdm")
    equal(load_file(tmp_path / "back/model.safetensors"), state)


# What the shapes and names of a checkpoint must be


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s.pop("model.norm.weight"), "lacks what becomes final_norm.weight"),
        (lambda s: s.update({"model.extra": torch.ones(2)}), "has model.extra, which its layout does not know"),
        (
            lambda s: s.pop("model.layers.1.self_attn.k_proj.weight"),
            "has model.layers.1.self_attn.q_proj.weight but not",
        ),
        (lambda s: s.update({"model.norm.weight": torch.ones(D + 1)}), r"gives final_norm.weight the shape \[17\]"),
        (
            lambda s: s.update({"lm_head.weight": torch.ones(V, D, dtype=torch.int8)}),
            "quantised weights are not converted",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_read(tmp_path, monkeypatch, change, said):
    state = peer_state("dream")
    change(state)
    source = written(tmp_path / "in", "dream", state)
    monkeypatch.setattr(weights, "_read_safetensors", lambda *a: pytest.fail("read"))
    with pytest.raises(InputError, match=said):
        convert.to_loopmdm(source, tmp_path / "out", "dream")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]


def test_a_configuration_cannot_ask_for_a_billion_layers(tmp_path):
    source = written(tmp_path / "in", "llada")
    with pytest.raises(InputError, match="the configuration has 1000000000 layers, the file 30 tensors"):
        convert.to_loopmdm(source, tmp_path / "x", "llada", config={**CONFIGS["llada"], "n_layers": 10**9})


def test_refusals_of_the_command(tmp_path, capsys):
    source = written(tmp_path / "in", "dream")
    assert refused(capsys, "convert", source, tmp_path / "x").startswith("give --from CODEBASE or --to CODEBASE")
    assert "did you mean 'dream'?" in refused(capsys, "convert", "--from", "draem", source, tmp_path / "x")
    assert "weights is 'both'" in refused(
        capsys, "convert", "--from", "dream", "--weights", "both", source, tmp_path / "x"
    )
    assert "is already there" in refused(capsys, "convert", "--from", "dream", source, source)
    assert "no file or folder" in refused(capsys, "convert", "--from", "dream", tmp_path / "none", tmp_path / "x")
    assert "--weights goes with --from" in refused(
        capsys, "convert", "--to", "dream", "--weights", "raw", source, tmp_path / "x"
    )
    assert "--mask-id goes with --from" in refused(
        capsys, "convert", "--to", "dream", "--mask-id", 3, source, tmp_path / "x"
    )
    assert "is not a LoopMDM configuration" in refused(capsys, "convert", "--to", "dream", source, tmp_path / "x")
    (source / "config.json").unlink()
    assert "give the dream configuration with --config" in refused(
        capsys, "convert", "--from", "dream", source, tmp_path / "x"
    )
    (tmp_path / "c.json").write_text(json.dumps(CONFIGS["dream"]))
    assert run(capsys, "convert", "--from", "dream", "--config", tmp_path / "c.json", source, tmp_path / "x")[0] == 0
    said = refused(capsys, "convert", "--to", "llada", tmp_path / "x", tmp_path / "y")
    assert said == "llada reads logits shifted by 0, this model by 1"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.json", "in", "x"]


def test_a_conversion_that_dies_leaves_no_folder(tmp_path, monkeypatch):
    source = written(tmp_path / "in", "llada")
    before = files(tmp_path)
    for stop in (OSError("disk full"), KeyboardInterrupt()):

        def full(*args, stop=stop):
            raise stop

        monkeypatch.setattr(convert, "_copy_text", full)
        with pytest.raises(type(stop)):
            convert.to_loopmdm(source, tmp_path / "out", "llada")
        assert files(tmp_path) == before and not (tmp_path / "out").exists()


def test_the_tokenizer_goes_along(tmp_path):
    source = written(tmp_path / "in", "llada")
    (source / "tokenizer.json").write_text("{}")
    (source / "evil.py").write_text("")
    convert.to_loopmdm(source, tmp_path / "ours", "llada")
    names = {"README.md", "config.json", "model.safetensors", "source.json", "tokenizer.json"}
    assert {p.name for p in (tmp_path / "ours").iterdir()} == names


# Shards


def shards(folder, change=None, second=None):
    state = peer_state("llada")
    names = list(state)
    half = {"a.safetensors": names[: len(names) // 2], "b.safetensors": names[len(names) // 2 :]}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIGS["llada"]))
    for file, held in half.items():
        save_file({n: state[n] for n in held}, folder / file)
    index = {"metadata": {"total_size": 1}, "weight_map": {n: f for f, held in half.items() for n in held}}
    if change:
        change(index["weight_map"], folder)
    (folder / "model.safetensors.index.json").write_text(second(index) if second else json.dumps(index))
    return state


def test_shards(tmp_path):
    state = shards(tmp_path / "in")
    convert.to_loopmdm(tmp_path / "in", tmp_path / "ours", "llada")
    convert.from_loopmdm(tmp_path / "ours", tmp_path / "back", "llada")
    equal(load_file(tmp_path / "back/model.safetensors"), state)


FIRST = "model.transformer.wte.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m, d: m.update({FIRST: str(d / "a.safetensors")}), "a shard is a file beside it, without a path"),
        (lambda m, d: m.update({FIRST: "../in/a.safetensors"}), "a shard is a file beside it, without a path"),
        (lambda m, d: m.update({FIRST: ".."}), "a shard is a file beside it, without a path"),
        (lambda m, d: m.update({FIRST: "C:\\a.safetensors"}), "a shard is a file beside it, without a path"),
        (lambda m, d: m.update({FIRST: 3}), "a shard is a file beside it, without a path"),
        (lambda m, d: m.update({FIRST: "c.safetensors"}), "names the shard c.safetensors, which is not there"),
        (lambda m, d: m.update({FIRST: "b.safetensors"}), "into b.safetensors, which does not hold it"),
        (lambda m, d: m.update({"ghost": "a.safetensors"}), "puts ghost into a.safetensors, which does not hold it"),
        (lambda m, d: m.pop(FIRST), "holds model.transformer.wte.weight, which model.safetensors.index.json does not"),
        (lambda m, d: m.clear(), "has no weight_map"),
    ],
)
def test_a_lying_index(tmp_path, change, said):
    shards(tmp_path / "in", change)
    with pytest.raises(InputError) as error:
        convert.to_loopmdm(tmp_path / "in", tmp_path / "out", "llada")
    assert said in str(error.value) and "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_a_tensor_in_two_shards_and_twice_in_an_index(tmp_path):
    shards(tmp_path / "two", lambda m, d: save_file(peer_state("llada"), d / "b.safetensors"))
    with pytest.raises(InputError, match=r"which model\.safetensors\.index\.json puts into a\.safetensors"):
        convert.to_loopmdm(tmp_path / "two", tmp_path / "out", "llada")
    twice = f'{{"weight_map": {{"{FIRST}": "a.safetensors", "{FIRST}": "b.safetensors"}}}}'
    shards(tmp_path / "twice", second=lambda index: twice)
    with pytest.raises(InputError, match=f"names '{FIRST}' twice"):
        convert.to_loopmdm(tmp_path / "twice", tmp_path / "out", "llada")


# safetensors files that lie


def safetensors(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape, begin, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "declares a header of 0 bytes in a file of 0"),
        (safetensors({}, length=1 << 60), "declares a header of 1152921504606846976 bytes"),
        (safetensors(b"[1]"), "holds list, not a JSON object"),
        (safetensors(b"{"), "cannot be read as JSON"),
        (safetensors(b"[" * 100_000), "cannot be read as JSON"),
        (safetensors({"a": entry([1 << 40, 1 << 20], 0, 8)}, bytes(8)), "but lies in bytes 0 to 8"),
        (
            safetensors({"a": entry([1 << 40], 0, 1 << 42)}, bytes(8)),
            "declares 4398046511104 bytes of tensors and holds 8",
        ),
        (safetensors({"a": entry([2], 0, 8), "b": entry([2], 0, 8)}, bytes(8)), "overlap or leave a gap at byte 8"),
        (safetensors({"a": entry([2], 4, 12)}, bytes(12)), "overlap or leave a gap at byte 0"),
        (safetensors({"a": entry([2], 0, 8)}, bytes(9)), "declares 8 bytes of tensors and holds 9"),
        (safetensors({"a": entry([-2], 0, -8)}, bytes(8)), "but lies in bytes 0 to -8"),
        (safetensors({"a": entry([2], 0, 8, "F4")}, bytes(8)), "a is F4, which is not read here"),
        (safetensors({"a": {"dtype": "F32"}}, bytes(8)), "lacks a dtype, shape or place"),
        (safetensors(b'{"a": {}, "a": {}}'), "names 'a' twice"),
    ],
)
def test_lying_safetensors(tmp_path, content, said):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(InputError) as error:
        weights.open_weights(tmp_path / "x.safetensors")
    assert said in str(error.value) and "\n" not in str(error.value)


def test_too_many_tensors(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "MAX_TENSORS", 3)
    (tmp_path / "x.safetensors").write_bytes(safetensors({str(i): entry([0], 0, 0) for i in range(4)}))
    with pytest.raises(InputError, match="declares 4 tensors; at most 3"):
        weights.open_weights(tmp_path / "x.safetensors")


# Files that attack


class Call:
    """Pickles as a call of `function`; unpickling it with pickle runs that."""

    def __init__(self, function, *args, state=None):
        self.parts = (function, args) if state is None else (function, args, state)

    def __reduce__(self):
        return self.parts


class Armed:
    def __setstate__(self, state):
        open(state["file"], "w").close()

    def __getstate__(self):
        return self.__dict__


def attacks(target):
    armed = Armed()
    armed.file = str(target)
    return {
        "os.system": Call(os.system, f"touch {target}"),
        "open": Call(builtins.open, str(target), "w"),
        "eval": Call(builtins.eval, f"open({str(target)!r}, 'w')"),
        "exec": Call(builtins.exec, f"open({str(target)!r}, 'w')"),
        "nested": Call(map, Call(functools.partial, os.system), [f"touch {target}"]),
        "list of a map": Call(list, Call(map, os.system, [f"touch {target}"])),
        "getattr": Call(getattr, Call(__import__, "os"), "system"),
        "setstate": armed,
        "torch.load": Call(torch.load, str(target)),
        "a storage in bytes": Call(torch.storage._load_from_bytes, pickle.dumps(Call(os.system, f"touch {target}"))),
        "tensor with a call inside": Call(
            torch._utils._rebuild_tensor_v2, Call(os.system, f"touch {target}"), 0, (1,), (1,)
        ),
        "type v2": Call(torch._tensor._rebuild_from_type_v2, os.system, torch.Tensor, (f"touch {target}",), {}),
        "dictionary of calls": Call(OrderedDict, [("a", Call(os.system, f"touch {target}"))]),
    }


@pytest.mark.parametrize("kind", sorted(attacks("x")))
@pytest.mark.parametrize("place", ["hyper_parameters", "state_dict", "root"])
def test_a_hostile_checkpoint_creates_nothing(tmp_path, kind, place):
    target = tmp_path / "PWNED"
    attack = attacks(target)[kind]
    state = {**peer_state("mdlm")}
    file = {"state_dict": state, "hyper_parameters": {"config": CONFIGS["mdlm"]}}
    if place == "hyper_parameters":
        file["hyper_parameters"]["tokenizer"] = attack
    elif place == "state_dict":
        state["backbone.vocab_embed.embedding"] = attack
    else:
        file = attack
    torch.save(file, tmp_path / "x.ckpt")
    if place == "hyper_parameters":
        assert convert.to_loopmdm(tmp_path / "x.ckpt", tmp_path / "out", "mdlm").tensors > 30  # ignored
    else:
        with pytest.raises(InputError) as error:
            convert.to_loopmdm(tmp_path / "x.ckpt", tmp_path / "out", "mdlm")
        assert "\n" not in str(error.value) and not (tmp_path / "out").exists()
    assert not target.exists()
    if kind == "open":  # the attack is real: torch's own unrestricted reader falls for it
        torch.load(tmp_path / "x.ckpt", weights_only=False)
        assert target.exists()


def torch_zip(path, pickled, entries=(), compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("archive/data.pkl", pickled)
        for name, data in entries:
            file.writestr(name, data)


def storage_pickle(kind="FloatStorage", key="0", count=4, offset=0, shape=(4,), stride=(1,)):
    """{"a": tensor} as torch.save writes it, with any numbers."""

    class Type(pickle.Pickler):
        def persistent_id(self, value):
            return value.pid if isinstance(value, Pid) else None

    class Pid:
        pid = ("storage", getattr(torch, kind), key, "cpu", count)

    out = io.BytesIO()
    Type(out, 2).dump({"a": Call(torch._utils._rebuild_tensor_v2, Pid(), offset, shape, stride, False, OrderedDict())})
    return out.getvalue()


@pytest.mark.parametrize(
    ("made", "said"),
    [
        ({"count": 1 << 50, "shape": (1 << 50,)}, "archive/data/0 has 16 bytes, its tensor needs 4503599627370496"),
        ({"shape": (1 << 50,), "stride": (0,)}, "does not fit its storage of 4 numbers"),
        ({"shape": (5,)}, "does not fit its storage of 4 numbers"),
        ({"offset": 1}, "does not fit its storage of 4 numbers"),
        ({"shape": (2,), "stride": (4,)}, "does not fit its storage of 4 numbers"),
        ({"offset": -1}, "not made of natural numbers"),
        ({"shape": (-4,)}, "not made of natural numbers"),
        ({"shape": ("4",)}, "not made of natural numbers"),
        ({"shape": (4, 1)}, "not made of natural numbers"),
        ({"key": "1"}, "lacks archive/data/1"),
        ({"key": "../../etc/passwd"}, "lacks archive/data/../../etc/passwd"),
        ({"kind": "DoubleStorage"}, "has 16 bytes, its tensor needs 32"),
    ],
)
def test_lying_tensors(tmp_path, made, said):
    torch_zip(tmp_path / "x.pt", storage_pickle(**made), [("archive/data/0", bytes(16))])
    with pytest.raises(InputError) as error:
        weights.open_weights(tmp_path / "x.pt")
    assert said in str(error.value) and "\n" not in str(error.value)


def test_the_maker_of_lies_can_tell_the_truth(tmp_path):
    torch_zip(tmp_path / "x.pt", storage_pickle(), [("archive/data/0", struct.pack("<4f", 1, 2, 3, 4))])
    (lazy,) = weights.open_weights(tmp_path / "x.pt").tensors.values()
    assert lazy.read().tolist() == [1, 2, 3, 4]


def test_zip_bombs_and_bad_archives(tmp_path):
    x = tmp_path / "x.pt"

    def said():
        with pytest.raises(InputError) as error:
            weights.open_weights(x)
        return str(error.value)

    torch_zip(x, storage_pickle(), [("archive/data/0", bytes(1 << 20))], zipfile.ZIP_DEFLATED)
    assert "holds the compressed entry" in said()
    with pytest.warns(UserWarning, match="Duplicate"):
        torch_zip(x, storage_pickle(), [("archive/data/0", bytes(16))] * 2)
    assert "holds archive/data/0 twice" in said()
    torch_zip(x, storage_pickle(), [("archive/data/0", bytes(16)), ("archive/byteorder", b"big")])
    assert "not written on a little-endian machine" in said()
    torch_zip(x, storage_pickle(), [("other/data.pkl", b"")])
    assert "not one that torch.save made" in said()
    torch_zip(x, b"\x80\x02]q\x00.", [])
    assert "holds no state dict" in said()
    # one entry's bytes in many names: the directory declares more than the file has
    torch_zip(x, storage_pickle(), [(f"archive/data/{i}", bytes(1 << 16)) for i in range(3)])
    whole = bytearray(x.read_bytes())
    start = struct.unpack("<I", whole[-6:-2])[0]
    cut = 2 * (1 << 16)
    x.write_bytes(bytes(whole[: start - cut] + whole[start:-6]) + struct.pack("<IH", start - cut, 0))
    assert "declares" in said() or "damaged" in said()
    # a directory that is said to be enormous
    whole[-10:-6] = struct.pack("<I", 0xFFFFFFF0)
    x.write_bytes(whole)
    assert "declares a zip directory of 4294967280 bytes" in said()
    x.write_bytes(pickle.dumps({"a": 1}, 2))
    assert "as torch before 1.6 saved" in said()
    x.write_bytes(b"PK\3\4 nothing")
    assert "not a file that torch.save made" in said()
    torch_zip(x, storage_pickle(), [("archive/data/0", struct.pack("<4f", 1, 2, 3, 4))])
    x.write_bytes(x.read_bytes().replace(struct.pack("<f", 3), struct.pack("<f", 5)))
    with pytest.raises(InputError, match="is damaged at archive/data/0"):
        weights.open_weights(x).tensors["a"].read()


def test_a_small_file_of_many_views(tmp_path):
    big = torch.zeros(1 << 16)
    torch.save({f"t{i}": big.view(256, 256) for i in range(9)}, tmp_path / "x.pt")
    with pytest.raises(InputError, match="declares tensors of 2359296 bytes in a file of"):
        weights.open_weights(tmp_path / "x.pt")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"\x80\x02\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.", "does not read"),  # BINBYTES8 of 2^63 bytes
        (b"\x80\x02B\xff\xff\xff\xff.", "does not read"),
        (b"\x80\x02\x8b\xff\xff\xff\x7f.", "does not read"),  # LONG4 of 2^31 bytes
        (b"\x80\x02N\x82\x01.", "instruction EXT1 has no place"),
        (b"\x80\x05\x97.", "instruction NEXT_BUFFER has no place"),
        (b"\x80\x02", "does not read"),
        (b"\x80\x02.", "does not read"),
        (b"\x80\x02h\x05.", "does not read"),  # the memo has no entry 5
        (b"\x80\x02R.", "does not read"),
        (b"\x80\x02t.", "does not read"),
        (b"\x80\x02Na.", "does not read"),
        (b"\x80\x02}(K\x01u.", "does not read"),  # a key without a value
        (b"\xff\xfe", "does not read"),
    ],
)
def test_broken_pickles(data, said):
    with pytest.raises(InputError) as error:
        unpickle.unpickle(data, "file")
    assert said in str(error.value) and "\n" not in str(error.value)


def test_memory_is_not_the_pickle_s_to_ask_for():
    """An entry of the memo numbered 2^31 - 1 makes CPython's own reader allocate 32 GB."""
    assert unpickle.unpickle(b"\x80\x02Nr\xff\xff\xff\x7f.", "x") is None
    deep = b"\x80\x02)" + b"0".join([b""]) + b"\x86".join([b"2"] * 60) + b"."  # (t, t) sixty times over
    key = b"\x80\x02}" + deep[2:-1] + b"\x86N" + b"s."
    assert unpickle.unpickle(key, "x") == {}


DOUBLED = b")" + b"2\x86" * 60  # a tuple of itself twice, sixty times over: 2**60 places to print


def test_small_pickles_cannot_ask_for_much_work():
    """What a pickle shares a thousand times is neither printed nor copied."""
    storage = b"(X\7\0\0\0storagectorch\nFloatStorage\n%sX\3\0\0\0cpuK\4tQ"
    rebuild = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage % b"X\1\0\0\0" + b"0K\0" + DOUBLED + b"K\1\x85tR."
    for data in (rebuild, storage % DOUBLED + b"."):
        with pytest.raises(InputError) as error:
            unpickle.unpickle(b"\x80\2" + data, "x")
        assert len(str(error.value)) < 200
    pairs = b"(" + b"K\1N\x86" * 1000 + b"l\x85q\1"
    for kind in (b"ccollections\nOrderedDict\n", b"ctorch\nSize\n"):
        copies = unpickle.unpickle(b"\x80\2" + kind + b"q\0" + pairs + b"(" + b"h\0h\1R" * 3 + b"l.", "x")
        assert all(isinstance(copy, unpickle.Stub) for copy in copies)
    long = b"\x8b" + struct.pack("<i", 1 << 13) + b"\x7f" * (1 << 13)  # an integer too long to print
    assert unpickle.unpickle(b"\x80\2}" + long + b"Ns.", "x") == {}
    assert weights.plain({"a": 1 << 65_000, "b": 3, "c": True}) == {"a": None, "b": 3, "c": True}


def test_a_pickle_may_have_so_many_instructions(monkeypatch):
    monkeypatch.setattr(unpickle, "MAX_STEPS", 10)
    assert unpickle.unpickle(b"\x80\2" + b"N0" * 3 + b"N.", "x") is None
    with pytest.raises(InputError, match="more than 10 instructions"):
        unpickle.unpickle(b"\x80\2" + b"N0" * 20 + b"N.", "x")


def test_settings_are_bounded():
    loop = unpickle.Stub("omegaconf.dictconfig.DictConfig", ())
    loop.state = {"_content": {"a": loop}}
    with pytest.raises(InputError, match="nested too deeply"):
        weights.plain(loop)
    wide = ["x"] * 150
    with pytest.raises(InputError, match="nested too deeply"):
        weights.plain([wide] * 150)


@given(st.data())
@settings(deadline=None, derandomize=True, max_examples=60)
def test_damaged_bytes_are_refused_or_read(tmp_path_factory, data):
    """Any flip or cut of a good file gives a model or one sentence, and never another exception."""
    folder = tmp_path_factory.mktemp("bytes")
    torch.save({"state_dict": {"a": torch.ones(3, 2)}, "hyper_parameters": {"x": 1}}, folder / "x.ckpt")
    whole = bytearray((folder / "x.ckpt").read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, 40))
    (folder / "x.ckpt").write_bytes(whole[: len(whole) - cut])
    try:
        for lazy in weights.open_weights(folder / "x.ckpt").tensors.values():
            lazy.read()
    except InputError as error:
        assert "\n" not in str(error)
