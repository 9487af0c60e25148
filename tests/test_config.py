"""Configurations: presets, their parameter counts, and the words of every refusal."""

import dataclasses
import json

import numpy as np
import pytest
import torch

import loopmdm
from loopmdm.cli.common import overrides
from loopmdm.config import PRESETS, LoopConfig, ModelConfig, check_loops, preset
from loopmdm.errors import InputError, whole
from loopmdm.model.lm import LoopMDM

from .helpers import tiny


def parameters(config):
    with torch.device("meta"):
        return sum(p.numel() for p in LoopMDM(config).parameters())


def test_the_paper_s_parameter_counts():
    assert parameters(preset("paper-170m")) == 169_627_218
    # bert-base-uncased: its 30522 ids hold [MASK] already
    assert parameters(preset("paper-170m", vocab_size=30522, mask_token_id=103)) == 139_292_986


def test_the_paper_s_preset():
    config = preset("paper-170m")
    assert (config.vocab_size, config.mask_token_id) == (50258, 50257)
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (12, 768, 12)
    assert (config.loop.start, config.loop.length, config.loop.max_loops) == (1, 2, 12)
    assert config.loop.boundary == "plain" and not config.time_conditioning
    assert [config.depth(s) for s in (1, 2, 12, 24)] == [12, 14, 34, 58]  # 10 + 2 S
    assert config.norm_eps == 1e-5 and config.dropout == 0.1 and config.residual_in_fp32


@pytest.mark.parametrize(
    ("name", "sizes"),
    {
        "smdm-6m": (6, 4, 256, 1024),
        "smdm-19m": (8, 6, 384, 1536),
        "smdm-34m": (8, 8, 512, 2048),
        "smdm-113m": (12, 12, 768, 3072),
        "smdm-170m": (18, 12, 768, 3072),
        "smdm-206m": (16, 14, 896, 3584),
        "smdm-1028m": (20, 14, 1792, 7168),
    }.items(),
)
def test_smdm_presets(name, sizes):
    """Layers, heads, d, ffn; and the name's size is the count without embedding and head."""
    config = preset(name)
    assert sizes == (
        config.num_hidden_layers,
        config.num_attention_heads,
        config.hidden_size,
        config.intermediate_size,
    )
    layers, _, d, f = sizes
    body = parameters(config) - 2 * config.vocab_size * d
    assert body == layers * (4 * d * d + 3 * d * f + 2 * d) + d
    assert abs(body / 1e6 - int(name[5:-1])) < 0.6 + 0.005 * body / 1e6


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_json(name):
    config = preset(name)
    text = json.dumps(config.to_dict())
    assert ModelConfig.from_dict(json.loads(text)) == config
    assert hash(config) == hash(ModelConfig.from_dict(json.loads(text)))


def test_defaults_and_overrides():
    config = ModelConfig(100, 64, 4, 4, 128)
    assert (config.mask_token_id, config.pad_token_id, config.head_dim, config.num_key_value_heads) == (99, 99, 16, 4)
    assert config.gated and not config.replace(hidden_act="gelu").gated
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.dropout = 0.5
    changed = config.replace(start=0, length=4, boundary="anchored", dropout=0.1)
    assert changed.loop == LoopConfig(0, 4, 12, "anchored") and changed.dropout == 0.1
    assert config.loop == LoopConfig(1, 2, 12, "plain")


def test_another_loop_and_its_fields():
    """A whole LoopConfig, or its mapping, in `replace`; what is given beside it is set in it."""
    config = preset("tiny-llama")
    assert config.replace(loop=LoopConfig(0, 1), max_loops=3).loop == LoopConfig(0, 1, 3)
    assert config.replace(loop=LoopConfig(0, 1, also=((2, 1),))).loop == LoopConfig(0, 1, also=((2, 1),))
    assert config.replace(loop={"start": 0}, boundary="anchored").loop == LoopConfig(0, boundary="anchored")
    with pytest.raises(InputError, match="loop is 3"):
        config.replace(loop=3, max_loops=2)


def test_numpy_s_numbers():
    config = preset("tiny-llama", hidden_size=np.int64(64), max_loops=np.int32(5))
    assert json.loads(json.dumps(config.to_dict()))["hidden_size"] == 64 and config.loop.max_loops == 5
    assert type(check_loops(np.int64(2))) is int and type(whole("steps", np.uint8(3))) is int
    for wrong in (np.bool_(True), np.float64(2.0), np.int64(0), np.array([2, 3])):
        for check in (check_loops, lambda n: whole("n", n)):
            with pytest.raises(InputError, match="whole number"):
                check(wrong)
    with pytest.raises(InputError, match="hidden_size is"):
        preset("tiny-llama", hidden_size=np.float64(64))


def test_what_hangs_on_another_field_moves_with_it():
    config = preset("tiny-llama")
    assert config.replace(vocab_size=50).mask_token_id == 49
    assert config.replace(vocab_size=50, mask_token_id=3).mask_token_id == 3
    assert config.replace(hidden_size=64).head_dim == 16
    assert config.replace(num_attention_heads=8).num_key_value_heads == 8
    assert config.replace(hidden_size=64, head_dim=10).head_dim == 10
    assert config.replace(dropout=0.5).mask_token_id == config.mask_token_id


GOOD = {
    "vocab_size": 100,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 128,
}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_sise": 64}, "unknown configuration key 'hidden_sise'; did you mean 'hidden_size'"),
        ({"loop": {"max_loop": 3}}, "unknown configuration key 'loop.max_loop'; did you mean 'max_loops'"),
        ({"hidden_act": "swiglue"}, "hidden_act is 'swiglue'; did you mean 'swiglu'"),
        ({"hidden_act": "zzz"}, "known: gelu, gelu_tanh, relu2, swiglu"),
        ({"norm": "layer_norm"}, "did you mean 'layernorm'"),
        ({"qk_norm": "before"}, "did you mean 'before_rope'"),
        ({"positions": "alibi"}, "positions is 'alibi'"),
        ({"rope_layout": "neox"}, "rope_layout is 'neox'"),
        ({"rope_dtype": "bf16"}, "rope_dtype is 'bf16'"),
        ({"modulation": "film"}, "modulation is 'film'"),
        ({"hidden_act": None}, "hidden_act is None"),
        ({"loop": {"boundary": "anchord"}}, "did you mean 'anchored'"),
        ({"num_attention_heads": 5}, "hidden_size 64 is not a multiple of num_attention_heads 5; change one, or set"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ({"num_key_value_heads": 0}, "num_key_value_heads"),
        ({"head_dim": 15}, "head_dim 15 is odd; rotary"),
        ({"head_dim": 0}, "head_dim is 0"),
        ({"head_dim": -2}, "head_dim is -2"),
        ({"vocab_size": 0}, "vocab_size is 0; it must be a whole number of at least 1"),
        ({"cond_dim": 0}, "cond_dim is 0; it must be a whole number of at least 1"),
        ({"num_hidden_layers": 2.0}, "num_hidden_layers is 2.0; it must be a whole number"),
        ({"hidden_size": True}, "hidden_size is True"),
        ({"hidden_size": "64"}, "hidden_size is '64'"),
        ({"mask_token_id": 100}, "mask_token_id is 100, outside the vocabulary of 100"),
        ({"pad_token_id": -1}, "pad_token_id is -1, outside the vocabulary"),
        ({"mask_token_id": "[MASK]"}, "mask_token_id is '\\[MASK\\]'"),
        ({"num_key_value_heads": "2"}, "num_key_value_heads is '2'"),
        ({"rope_sign": 0}, "rope_sign is 0; it must be 1 or -1"),
        ({"initializer_range": 0}, "initializer_range is 0; it must be above 0"),
        ({"dropout": 1.0}, "dropout is 1.0; it must be in \\[0, 1\\)"),
        ({"dropout": "0.1"}, "dropout is '0.1'"),
        ({"rope_theta": None}, "rope_theta is None"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no'"),
        ({"loop": {"start": 3}}, "looped block covers layers 3..4, but the model has 4 layers \\(0..3\\)"),
        ({"loop": {"length": 4}}, "covers layers 1..4"),
        ({"loop": {"start": -1}}, "start must be at least 0"),
        ({"loop": {"length": 0}}, "length at least 1"),
        ({"loop": {"start": "1"}}, "start is '1'"),
        ({"loop": {"max_loops": 0}}, "max_loops is 0; the looped block is visited"),
        ({"loop": 3}, "loop is 3"),
        (
            {"loop": {"also": [[2, 1]]}},
            "also has 1 layers from layer 2 on; .*starts after the one before it, .*layer 3 or",
        ),
        ({"loop": {"also": [[3, 0]]}}, "also has 0 layers from layer 3"),
        ({"loop": {"length": 1, "also": [[3, 1], [3, 1]]}}, "also has 1 layers from layer 3 on; .*layer 4 or later"),
        ({"loop": {"also": [[3, 2]]}}, "covers layers 3..4, but the model has 4 layers"),
        ({"loop": {"also": [3, 2]}}, r"loop.also is \[3, 2\]; it must be a list of \[start, length\]"),
        ({"loop": {"also": [[3, 1, 2]]}}, "it must be a list of"),
        ({"loop": {"also": [["3", 1]]}}, "it must be a list of"),
        ({"loop": {"also": None}}, "loop.also is None"),
    ],
)
def test_refusals(changes, words):
    with pytest.raises(InputError, match=words) as caught:
        ModelConfig.from_dict({**GOOD, **changes})
    assert "\n" not in str(caught.value) and isinstance(caught.value, ValueError)


def test_further_looped_blocks():
    config = ModelConfig.from_dict({**GOOD, "num_hidden_layers": 9, "loop": {"also": [[3, 1], [6, 3]]}})
    assert config.loop.also == ((3, 1), (6, 3)) and config.loop.runs == ((1, 2), (3, 1), (6, 3))
    assert config.loop.num_layers == 6 and [config.depth(S) for S in (1, 2, 4)] == [9, 15, 27]
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert json.loads(json.dumps(config.to_dict())) == config.to_dict() and hash(config)
    assert config.replace(also=()).loop.also == () and config.replace(max_loops=2).loop.also == config.loop.also


def test_further_looped_blocks_on_the_command_line():
    assert overrides(["also=6:2,9:1"]) == {"also": ((6, 2), (9, 1))}
    assert overrides(["loop.also=none"]) == {"also": ()}
    assert preset("paper-170m", **overrides(["also=6:2, 9:1"])).loop.num_layers == 5
    for words in ("6", "6:2:1", "a:b", "6:2,,", "6-2"):
        with pytest.raises(InputError, match="also"):
            preset("paper-170m", **overrides([f"also={words}"]))


def test_odd_head_dim_is_fine_without_rotary():
    assert ModelConfig.from_dict({**GOOD, "head_dim": 15, "positions": "learned"}).head_dim == 15


def test_missing_keys():
    with pytest.raises(InputError, match="lacks hidden_size, num_hidden_layers"):
        ModelConfig.from_dict({"vocab_size": 3, "num_attention_heads": 1, "intermediate_size": 1})


def test_unknown_names_point_to_the_nearest():
    with pytest.raises(InputError, match="unknown preset 'paper-17m'; did you mean 'paper-170m'"):
        preset("paper-17m")
    with pytest.raises(InputError, match="did you mean 'paper-170m'"):
        LoopMDM.from_preset("paper170m")
    with pytest.raises(InputError, match=r"known: paper-170m, .*tiny-llama"):
        preset("qqqq")
    with pytest.raises(InputError, match="did you mean 'dropout'"):
        preset("tiny-dit", dropuot=0.5)


def test_tiny_helper_is_valid_in_every_variant():
    assert tiny("dit", start=0, length=4).loop.length == 4


def test_every_public_name_loads():
    assert {"LoopMDM", "nelbo", "generate", "ModelConfig", "LoopedBlock", "InputError"} <= set(dir(loopmdm))
    for name in dir(loopmdm):
        assert getattr(loopmdm, name) is not None or name.startswith("__")
    for name in loopmdm._HOME:
        assert name in ("PRESETS", "POLICIES") or getattr(loopmdm, name).__module__.startswith("loopmdm.")
    with pytest.raises(AttributeError, match="no attribute 'nelbow'"):
        _ = loopmdm.nelbow


def test_a_chosen_number_of_groups_survives_another_width():
    config = ModelConfig(vocab_size=9, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=8,
                         num_key_value_heads=2)  # fmt: skip
    assert config.replace(hidden_size=64).num_key_value_heads == 2
    assert config.replace(num_attention_heads=8).num_key_value_heads == 8


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vocab_size": 1}, "beside the mask it must hold at least one token"),
        ({"norm_eps": 0.0}, "norm_eps is 0.0; it must be above 0"),
        ({"rope_theta": float("inf")}, "rope_theta is inf; it must be above 0"),
    ],
)
def test_numbers_that_make_no_model(changes, words):
    with pytest.raises(InputError, match=words):
        preset("tiny-llama", **changes)
