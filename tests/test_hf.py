"""LoopMDM in transformers: the registered classes, their files, what loss they return, and a step of the Trainer."""

import copy
import json
import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install loopmdm[hf]")

import loopmdm  # noqa: E402
from loopmdm.adapters import as_denoiser, hf  # noqa: E402
from loopmdm.config import ModelConfig  # noqa: E402
from loopmdm.errors import InputError  # noqa: E402

from .helpers import ids, live, tiny  # noqa: E402

MASK = 10


def wrapped(config, seed=0):
    """A live LoopMDM inside the Hugging Face class, and the same one alone."""
    model = live(config, seed)
    outer = hf.LoopMDMForMaskedLM(hf.LoopMDMConfig.from_model_config(config)).eval()
    outer.model.load_state_dict(model.state_dict())
    return outer, model


CASES = {
    "llama": tiny("llama"),
    "dit": tiny("dit", time_conditioning=True),
    "tied": tiny("llama", tie_word_embeddings=True),
    "anchored, two blocks, shifted": ModelConfig.from_dict(
        {
            **tiny().to_dict(),
            "logit_shift": 1,
            "loop": {"start": 0, "length": 1, "boundary": "anchored", "also": [[2, 1]]},
        }
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_files_go_both_ways(tmp_path, name):
    config, tokens = CASES[name], ids(2, 7)
    outer, model = wrapped(config)
    sigma = torch.full((2,), 0.7) if config.time_conditioning else None
    want = model(tokens, num_loops=2, sigma=sigma).logits
    model.save_pretrained(tmp_path / "ours")
    outer.save_pretrained(tmp_path / "theirs")
    assert (tmp_path / "theirs/model.safetensors").exists()
    for folder in ("ours", "theirs"):
        loaded, info = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / folder, output_loading_info=True)
        assert isinstance(loaded, hf.LoopMDMForMaskedLM) and not any(info.values())
        assert loaded.config.model_config() == config and loaded.model.logit_shift == config.logit_shift
        torch.testing.assert_close(loaded(tokens, num_loops=2, sigma=sigma).logits, want, atol=5e-6, rtol=0)
        assert (loaded.model.lm_head.weight is loaded.model.embed.weight) == config.tie_word_embeddings
        bare = transformers.AutoModel.from_pretrained(tmp_path / folder)
        hidden = model.hidden(tokens, num_loops=2, sigma=sigma)
        torch.testing.assert_close(bare(tokens, num_loops=2, sigma=sigma)[0], hidden, atol=5e-6, rtol=0)
    loaded.model.save_pretrained(tmp_path / "again")
    again = loopmdm.LoopMDM.from_pretrained(tmp_path / "again")
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())


def test_a_configuration_keeps_every_field(tmp_path):
    config = hf.LoopMDMConfig.from_model_config(CASES["anchored, two blocks, shifted"])
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved.items() >= config.model_config().to_dict().items() and saved["model_type"] == "loopmdm"
    assert transformers.AutoConfig.from_pretrained(tmp_path).model_config() == config.model_config()
    with pytest.raises(InputError, match="hidden_size 30 is not a multiple"):
        hf.LoopMDMConfig(vocab_size=9, hidden_size=30, num_hidden_layers=3, num_attention_heads=4, intermediate_size=8)


@pytest.mark.parametrize("shift", [0, 1])
def test_loss_is_the_mean_over_labels_or_the_nelbo(shift):
    outer, model = wrapped(tiny(logit_shift=shift))
    clean = ids(3, 8, masks=0.0)
    mask = torch.rand(3, 8, generator=torch.Generator().manual_seed(3)) < 0.5
    real = torch.ones(3, 8, dtype=torch.long)
    real[1, 6:], real[2, :2] = 0, 0
    mask[2, 2] = True  # with a shift the first real token is read at itself
    mask &= real.bool()
    seen, labels = clean.masked_fill(mask, MASK), clean.masked_fill(~mask, -100)
    out = outer(seen, real, labels=labels, num_loops=2)
    want = F.cross_entropy(model(seen, real, num_loops=2).logits[mask], clean[mask])
    assert out.logits.shape == (3, 8, 11)
    assert shift or math.isclose(out.loss.item(), want.item(), rel_tol=1e-5)  # logits lie where they are computed
    t = torch.tensor([0.2, 0.9, 0.5])
    bound = loopmdm.nelbo(model, clean, attention_mask=real.bool(), num_loops=2, t=t, mask=mask).loss
    assert math.isclose(outer(seen, real, labels=labels, num_loops=2, t=t).loss.item(), bound.item(), rel_tol=1e-5)
    outer.train()
    assert outer(seen, real, labels=labels, num_loops=torch.tensor(2)).logits is None
    assert outer(seen, return_dict=False)[0].shape == (3, 8, 11)
    nothing = outer(seen, labels=torch.full_like(labels, -100)).loss
    assert nothing.item() == 0


def test_a_time_conditioned_model_is_told_the_time():
    outer, model = wrapped(tiny("dit", time_conditioning=True))
    clean, t = ids(2, 8, masks=0.0), torch.tensor([0.3, 0.8])
    mask = torch.arange(16).view(2, 8) % 3 == 0
    seen, labels = clean.masked_fill(mask, MASK), clean.masked_fill(~mask, -100)
    bound = loopmdm.nelbo(model, clean, num_loops=2, t=t, mask=mask).loss
    assert math.isclose(outer(seen, labels=labels, num_loops=2, t=t).loss.item(), bound.item(), rel_tol=1e-5)
    with pytest.raises(InputError, match="conditioned on time"):
        outer(seen, labels=labels)


def test_labels_that_cannot_be():
    outer, _ = wrapped(tiny())
    tokens = ids(2, 7)
    with pytest.raises(InputError, match="labels holds 10, which the model never predicts"):
        outer(tokens, labels=tokens.masked_fill(torch.ones_like(tokens, dtype=torch.bool), MASK))
    with pytest.raises(InputError, match="labels holds -1, which"):
        outer(tokens, labels=torch.full_like(tokens, -1))
    with pytest.raises(InputError, match=r"labels is \[2, 6\]"):
        outer(tokens, labels=tokens[:, :6])


def test_collator():
    config = tiny()
    rows = [list(range(1, 9)), [1, 2, 3], {"input_ids": torch.arange(5)}]
    make = hf.DiffusionCollator(config, seed=4)
    first, second = make(rows), make(rows)
    assert not torch.equal(first["input_ids"], second["input_ids"])
    again = hf.DiffusionCollator(hf.LoopMDMConfig.from_model_config(config), seed=4)(rows)
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert first["attention_mask"].sum(-1).tolist() == [8, 3, 5]
    hit = first["labels"] != -100
    assert (first["input_ids"][hit] == MASK).all() and not (hit & (first["attention_mask"] == 0)).any()
    clean = torch.where(hit, first["labels"], first["input_ids"])
    assert clean[0].tolist() == rows[0] and clean[1, :3].tolist() == [1, 2, 3] and hit.any()
    drawn = [int(make(rows)["num_loops"]) for _ in range(40)]
    assert set(drawn) == {1, 2, 3}
    assert "t" not in hf.DiffusionCollator(config, objective="masked_mean", num_loops=2)(rows)
    with pytest.raises(InputError, match="objective is 'x'"):
        hf.DiffusionCollator(config, objective="x")


def test_processes_draw_parts_of_one_batch(monkeypatch):
    """Two processes of two rows see the masks that one process of four rows sees."""
    rows = [list(range(1, 9))] * 4
    whole = hf.DiffusionCollator(tiny(), seed=1)(rows)
    monkeypatch.setenv("WORLD_SIZE", "2")
    parts = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        parts.append(hf.DiffusionCollator(tiny(), seed=1)(rows[:2]))
    for key in ("input_ids", "labels", "t"):
        assert torch.equal(torch.cat([part[key] for part in parts]), whole[key])
    assert parts[0]["num_loops"] == parts[1]["num_loops"] == whole["num_loops"]


def test_one_step_of_the_trainer(tmp_path):
    """SGD on one batch in two parts: Trainer's step is the gradient of the mean of their NELBOs, by hand."""
    pytest.importorskip("accelerate", reason="accelerate is not installed: pip install loopmdm[train]")
    config = tiny()
    outer, model = wrapped(config)
    data = [{"input_ids": row} for row in ids(4, 9, masks=0.0)]
    args = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        optim="sgd",
        learning_rate=0.1,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        use_cpu=True,
        disable_tqdm=True,
        train_sampling_strategy="sequential",
    )
    seen = []

    class Keeping(hf.DiffusionCollator):
        def __call__(self, examples):
            seen.append(super().__call__(examples))
            return seen[-1]

    trainer = transformers.Trainer(outer, args, data_collator=Keeping(config, seed=2), train_dataset=data)
    result = trainer.train()
    model.train()
    losses = []
    for batch in seen[:2]:
        hit = batch["labels"] != -100
        clean = torch.where(hit, batch["labels"], batch["input_ids"])
        losses.append(loopmdm.nelbo(model, clean, t=batch["t"], mask=hit, num_loops=int(batch["num_loops"])).loss)
    (sum(losses) / 2).backward()
    assert math.isclose(result.training_loss, sum(losses).item() / 2, rel_tol=1e-5)
    for name, parameter in model.named_parameters():
        moved = dict(outer.model.named_parameters())[name]
        torch.testing.assert_close(moved, parameter - 0.1 * parameter.grad, atol=1e-6, rtol=1e-5)
    trainer.save_model(tmp_path / "saved")
    again = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "saved")
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in outer.state_dict().items())


def test_importing_loopmdm_does_not_import_transformers():
    code = "import sys, loopmdm, loopmdm.adapters; print('transformers' in sys.modules, 'lm_eval' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["False", "False"], done.stderr


def test_a_new_model_starts_as_the_identity():
    """transformers draws weights anew after the constructor; zero gates and heads must survive that."""
    fresh = hf.LoopMDMForMaskedLM(hf.LoopMDMConfig.from_model_config(tiny()))
    assert fresh.model.lm_head.weight.abs().max() == 0 and fresh.model.layers[0].mlp.down.weight.abs().max() == 0
    assert math.isclose(fresh.model.embed.weight.std().item(), 0.02, rel_tol=0.2)


# --- models of transformers as peers ----------------------------------------------------------------------------------


def qwen(kind, attention="sdpa", **changes):
    """transformers' own Qwen2 or Qwen3, small, every parameter drawn."""
    sizes = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "use_cache": False}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "attn_implementation": attention}
    config = getattr(transformers, f"{kind}Config")(**sizes, **changes)
    model, rng = getattr(transformers, f"{kind}ForCausalLM")(config).eval(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 1:
                p.copy_(
                    torch.rand(p.shape, generator=rng) + 0.5
                    if "norm" in name
                    else 0.3 * torch.randn(p.shape, generator=rng)
                )
            else:
                p.normal_(0, 1 if "embed" in name else p.shape[1] ** -0.5, generator=rng)
    return model


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["Qwen2", "Qwen3"])
def test_models_of_transformers_as_peers(kind, attention):
    """Causal as they come, with padding, called as not causal, with a mask of one's own; looped; gradients."""
    plain, tokens = qwen(kind, attention), torch.randint(0, 39, (3, 10), generator=torch.Generator().manual_seed(1))
    patched = loopmdm.patch(copy.deepcopy(plain))
    assert "causal where no mask is given" in loopmdm.report(patched)
    real = torch.ones(3, 10, dtype=torch.long)
    real[1, :4] = 0
    full = {"full_attention": torch.ones(3, 1, 10, 10, dtype=torch.bool)}
    for options in ({}, {"attention_mask": real}, {"is_causal": False}, {"attention_mask": full}):
        want, got = plain(tokens, **options).logits, patched(tokens, **options).logits
        rows = real.bool() if options.get("attention_mask") is real else torch.ones_like(real).bool()
        torch.testing.assert_close(got[rows], want[rows], atol=1e-5, rtol=0)
    once = loopmdm.loopify(copy.deepcopy(patched), 1, 2)
    assert torch.equal(once(tokens).logits, patched(tokens).logits)
    pair = [loopmdm.loopify(model, 1, 2, num_loops=3).train() for model in (plain, patched)]
    pair[1].gradient_checkpointing_enable()
    for model in pair:
        model(tokens, labels=tokens).loss.backward()
    for want, got in zip(*(model.parameters() for model in pair), strict=True):
        torch.testing.assert_close(got.grad, want.grad, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["Qwen2", "Qwen3"])
def test_padding_of_a_denoiser_leaves_a_causal_model_causal(kind):
    """The padding mask of `hidden` joins the causal one."""
    plain = qwen(kind)
    ours, theirs = (as_denoiser(model, mask_id=39) for model in (loopmdm.patch(copy.deepcopy(plain)), plain))
    tokens = torch.tensor([[1, 2, 3, 39, 39, 39], [0, 0, 0, 4, 39, 39]])
    real = torch.tensor([[1] * 6, [0] * 3 + [1] * 3])
    torch.testing.assert_close(ours.hidden(tokens, real), theirs.hidden(tokens, real), atol=1e-5, rtol=0)
    alone = ours.hidden(tokens[1:, 3:])
    torch.testing.assert_close(ours.hidden(tokens, real)[1:, 3:], alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("changes", "options", "said"),
    [
        ({}, {"use_cache": True}, "call the model with use_cache=False"),
        ({}, {"output_attentions": True}, "does not return attention weights"),
        ({"attention": "flex_attention"}, {}, "attention_mask is a BlockMask"),
        ({"hidden_act": "gelu"}, {}, "its activation is GELUActivation, not SiLU"),
        ({"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}, {}, "a sliding window of 4"),
        ({"attention_bias": True}, {}, "no layer of Qwen3ForCausalLM is one that loopmdm knows"),
    ],
)
def test_what_a_patched_model_of_transformers_refuses(changes, options, said):
    with pytest.raises(InputError, match=said) as error:
        loopmdm.patch(qwen("Qwen3", **changes))(torch.zeros(1, 4, dtype=torch.long), **options)
    assert "\n" not in str(error.value)


def test_a_cap_behind_the_head_is_not_left_out_silently():
    model = qwen("Qwen3")
    model.config.final_logit_softcapping = 30.0
    with pytest.raises(InputError, match="final_logit_softcapping"):
        as_denoiser(model, mask_id=39)
