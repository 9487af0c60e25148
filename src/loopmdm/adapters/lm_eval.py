"""lm-evaluation-harness: importing this module registers the model "loopmdm"; it takes any `Denoiser`.

    python -m loopmdm.adapters.lm_eval run --model loopmdm --model_args pretrained=DIR,samples=64 --tasks arc_easy
    lm_eval.simple_evaluate(DiffusionLM(denoiser, tokenizer), tasks=[...])

A masked diffusion model has no exact likelihood. `loglikelihood` is minus the Monte Carlo upper bound of -log p of the
continuation given the context (`loopmdm.likelihood`, bound "count", LLaDA's), so it is low on average, by the gap of
the bound, and noisy. Masks are functions of (seed, context): answers to one question are compared under the same masks,
and a request's number does not depend on the others, on their order or (up to rounding) on the batch.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from tqdm import tqdm

from ..diffusion import likelihood, rolling
from ..errors import InputError, whole
from ..model.denoiser import Denoiser
from ..model.lm import LoopMDM
from ..sampling.engine import generate

TOKENIZER_FILE = "tokenizer.json"
NEW_TOKENS = 256


class Tokenizer(Protocol):
    """Of tokenizers or transformers, or anything with these two."""

    def encode(self, text: str, add_special_tokens: bool = ...) -> Any: ...

    def decode(self, ids: list[int]) -> str: ...


@register_model("loopmdm")
class DiffusionLM(LM):
    """A `Denoiser` and its tokenizer as lm-eval's `LM`.

    Args:
        pretrained: a LoopMDM folder (a run's, its model/ or a converted one) or a Hub name; or a `Denoiser`.
        tokenizer: a tokenizer.json, a folder with one, or an object with encode and decode; None is the one beside
            the weights.
        samples: masks a request, for both likelihoods. A continuation of one token is exact with one.
        num_loops: S; None is the model's `max_loops`.
        bound: "count" or "time", as in `likelihood`.
        is_greedy: whether to decode greedily, one token a step, for lm-eval's second number; without it that is False.
        context: tokens of the window before that a later window of a long text is given (`rolling`).
        steps, block_length, policy, cfg_scale: of `generate_until`, as in `generate`.
        max_new_tokens: of `generate_until` where the task does not say; so many are denoised, then the text is cut.
        eos_id: id, or ids, that end a generated text.
        batch_size: rows of a forward pass.
        seed: of masks and tokens.
        device: of the model; without a GPU "cuda" is the CPU, as for lm-eval's own models.
        max_length: in tokens; may only shorten the model's own.
        max_batch_size: lm-eval passes it; not used.

    Raises:
        InputError: no model or tokenizer there, a number out of range.
    """

    def __init__(
        self,
        pretrained: str | Path | Denoiser,
        tokenizer: str | Path | Tokenizer | None = None,
        *,
        samples: int = 32,
        num_loops: int | None = None,
        bound: str = "count",
        is_greedy: bool = True,
        context: int = 0,
        steps: int | None = None,
        block_length: int | None = None,
        policy: str = "confidence",
        cfg_scale: float = 0.0,
        max_new_tokens: int = NEW_TOKENS,
        eos_id: int | Sequence[int] | None = None,
        batch_size: int | str = 16,
        seed: int = 0,
        device: str | None = None,
        max_length: int | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        named = isinstance(pretrained, (str, Path))
        self.folder = _folder(Path(pretrained)) if named else None  # type: ignore[arg-type]
        self.model: Denoiser = LoopMDM.from_pretrained(self.folder) if self.folder is not None else pretrained  # type: ignore[assignment]
        if device is not None and device.startswith("cuda") and not torch.cuda.is_available():
            device = None  # lm-eval's command line says "cuda:0" unless told otherwise
        if device is not None and isinstance(self.model, torch.nn.Module):
            self.model.to(device)
        self.tokenizer = _tokenizer(self.folder if tokenizer is None else tokenizer)
        self.samples = whole("samples", samples)
        self.batch_size = 16 if isinstance(batch_size, str) and not batch_size.isdigit() else int(batch_size)
        whole("batch_size", self.batch_size)
        limits = [n for n in (self.model.max_length, max_length) if n is not None]
        self.max_length = min(limits) if limits else None
        if self.max_length is not None:
            whole("max_length", self.max_length, 2)
        self.num_loops, self.bound, self.is_greedy, self.context = num_loops, bound, is_greedy, context
        self.options = {"steps": steps, "block_length": block_length, "policy": policy, "cfg_scale": cfg_scale}
        self.max_new_tokens, self.eos_id, self.seed = whole("max_new_tokens", max_new_tokens), eos_id, seed

    @property
    def tokenizer_name(self) -> str:
        return str(getattr(self.tokenizer, "name_or_path", self.folder or type(self.tokenizer).__name__))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        if not hasattr(self.tokenizer, "apply_chat_template"):
            raise InputError(f"{type(self.tokenizer).__name__} has no chat template; give a tokenizer of transformers")
        return str(
            self.tokenizer.apply_chat_template(
                chat_history, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        )

    def encode(self, text: str) -> list[int]:
        found = self.tokenizer.encode(text, add_special_tokens=False)
        return list(getattr(found, "ids", found))

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(minus the bound of -log p(continuation | context) in nats, whether greedy decoding gives it)."""
        pieces: list[tuple[int, list[int], list[int]]] = []  # of request i: (i, context, continuation that fits)
        for i, request in enumerate(requests):
            pieces += [(i, *piece) for piece in self._pieces(*self._pair(*request.args))]
        scores, greedy = [0.0] * len(requests), [True] * len(requests)
        order = sorted(pieces, key=lambda p: (len(p[2]) == 1, len(p[1]) + len(p[2])), reverse=True)
        rest = {i: sum(1 for p in pieces if p[0] == i) for i in range(len(requests))}
        for group in tqdm(_groups(order, self.batch_size), disable=disable_tqdm, desc="loglikelihood"):
            for (i, _, _), score, same in zip(group, self._bounds(group), self._greedy(group), strict=True):
                scores[i] += score
                greedy[i] &= same
                rest[i] -= 1
                if not rest[i]:
                    self.cache_hook.add_partial("loglikelihood", requests[i].args, (scores[i], greedy[i]))
        return list(zip(scores, greedy, strict=True))

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Minus the bound of -log p of each text in nats, in windows of `max_length`."""
        out = []
        for request in tqdm(requests, disable=disable_tqdm, desc="loglikelihood_rolling"):
            ids = self.encode(request.args[0])
            score = 0.0
            if ids:
                found = rolling(
                    self.model,
                    torch.tensor(ids),
                    window=None if self.max_length is None else min(self.max_length, len(ids)),
                    context=self.context if self.max_length is not None and len(ids) > self.max_length else 0,
                    num_loops=self.num_loops,
                    bound=self.bound,
                    samples=self.samples,
                    seed=self.seed,
                    batch=self.batch_size,
                )
                score = -float(found.nats.sum())
            out.append(score)
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, score)
        return out

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Denoise a continuation of each context and cut it at the first of the task's `until` strings.

        Of the task's arguments `until`, `max_gen_toks`, `do_sample`, `temperature`, `top_p` and `top_k` are read; the
        temperature is 0 unless `do_sample` is true.
        """
        texts = [""] * len(requests)
        work = []
        for i, request in enumerate(requests):
            context, settings = request.args
            wanted = whole("max_gen_toks", int(settings.get("max_gen_toks", self.max_new_tokens)))
            if self.max_length is not None:
                wanted = min(wanted, self.max_length - 1)
            ids = self.encode(context)
            ids = ids[len(ids) - self.max_length + wanted :] if self._over(len(ids) + wanted) else ids  # type: ignore[operator]
            warm = bool(settings.get("do_sample", False))
            temperature = float(settings.get("temperature", 1.0)) if warm else 0.0
            top_k, top_p = (settings.get("top_k"), settings.get("top_p")) if warm else (None, None)
            work.append((i, ids, wanted, (temperature, top_k or None, top_p)))
        work.sort(key=lambda w: (w[2], str(w[3]), len(w[1])), reverse=True)
        for group in tqdm(_alike(work, self.batch_size), disable=disable_tqdm, desc="generate_until"):
            _, _, wanted, (temperature, top_k, top_p) = group[0]
            made = generate(
                self.model,
                [ids for _, ids, _, _ in group],
                max_new_tokens=wanted,
                num_loops=self.num_loops,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                eos_id=self.eos_id,
                row_seeds=[self.seed + _digest(ids) for _, ids, _, _ in group],
                **self.options,  # type: ignore[arg-type]
            )
            for (i, ids, _, _), row in zip(group, made.sequences(), strict=True):
                texts[i] = self._cut(row[len(ids) :], requests[i].args[1].get("until"))
                self.cache_hook.add_partial("generate_until", requests[i].args, texts[i])
        return texts

    def _cut(self, ids: list[int], until: str | Iterable[str] | None) -> str:
        ends = {self.eos_id} if isinstance(self.eos_id, int) else set(self.eos_id or ())
        stop = next((n for n, token in enumerate(ids) if token in ends), len(ids))
        text = self.tokenizer.decode(ids[:stop])
        for word in [until] if isinstance(until, str) else until or ():
            text = text.split(word)[0] if word else text
        return text

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Both as ids; spaces that end the context go to the continuation, whose words tokenizers begin with one."""
        stripped = context.rstrip()
        continuation = context[len(stripped) :] + continuation
        if not stripped:
            return [], self.encode(continuation)
        whole_, head = self.encode(stripped + continuation), self.encode(stripped)
        return whole_[: len(head)], whole_[len(head) :]

    def _over(self, length: int) -> bool:
        return self.max_length is not None and length > self.max_length

    def _pieces(self, context: list[int], continuation: list[int]) -> list[tuple[list[int], list[int]]]:
        """What fits the model: contexts cut on the left, a continuation that is too long in parts (chain rule)."""
        if not self._over(len(continuation) + bool(context)):
            room = len(context) if self.max_length is None else self.max_length - len(continuation)
            return [(context[max(0, len(context) - room) :], continuation)] if continuation else []
        size, out = (self.max_length or 2) // 2, []
        for start in range(0, len(continuation), size):
            part = continuation[start : start + size]
            before = [*context, *continuation[:start]]
            out.append((before[max(0, len(before) - (self.max_length or 0) + len(part)) :], part))
        return out

    def _bounds(self, group: list[tuple[int, list[int], list[int]]]) -> list[float]:
        length = max(len(c) + len(x) for _, c, x in group)
        rows = torch.full((len(group), length), self.model.pad_id)
        real, counted = torch.zeros_like(rows, dtype=torch.bool), torch.zeros_like(rows, dtype=torch.bool)
        for row, (_, context, continuation) in enumerate(group):
            ids = context + continuation
            rows[row, : len(ids)], real[row, : len(ids)] = torch.tensor(ids), True
            counted[row, len(context) : len(ids)] = True
        exact = self.bound == "count" and all(len(x) == 1 for _, _, x in group)  # one token: one mask, no noise
        found = likelihood(
            self.model,
            rows,
            num_loops=self.num_loops,
            bound=self.bound,
            samples=1 if exact else self.samples,
            attention_mask=None if bool(real.all()) else real,
            maskable=counted,
            seed=self.seed,
            index=torch.tensor([_digest(context) for _, context, _ in group]),
            batch=self.batch_size,
        )
        return [-float(nats) for nats in found.nats]

    def _greedy(self, group: list[tuple[int, list[int], list[int]]]) -> list[bool]:
        if not self.is_greedy:
            return [False] * len(group)
        rows = [context + [self.model.mask_id] * len(continuation) for _, context, continuation in group]
        made = generate(
            self.model,
            rows,
            steps=max(len(x) for _, _, x in group),
            num_loops=self.num_loops,
            policy="confidence",
            temperature=0.0,
            row_seeds=[self.seed] * len(group),
        )
        return [row[len(c) :] == x for row, (_, c, x) in zip(made.sequences(), group, strict=True)]


def _digest(ids: Sequence[int]) -> int:
    """A number of 32 bits for some ids."""
    return zlib.crc32(torch.tensor(list(ids), dtype=torch.int64).numpy().tobytes())


def _groups(pieces: list[Any], size: int) -> list[list[Any]]:
    """Runs of at most `size` pieces; those of one token stay among themselves."""
    split = next((n for n, p in enumerate(pieces) if len(p[2]) != 1), len(pieces))
    return [part[i : i + size] for part in (pieces[:split], pieces[split:]) for i in range(0, len(part), size)]


def _alike(work: list[Any], size: int) -> list[list[Any]]:
    """Runs of at most `size` requests of the same length and temperature."""
    out: list[list[Any]] = []
    for item in work:
        if out and len(out[-1]) < size and out[-1][0][2:] == item[2:]:
            out[-1].append(item)
        else:
            out.append([item])
    return out


def _folder(path: Path) -> Path:
    """A run's model/ where `path` is the run."""
    return path / "model" if (path / "model" / "config.json").is_file() else path


def _tokenizer(given: str | Path | Tokenizer | None) -> Any:
    if given is None:
        raise InputError("a Denoiser needs its tokenizer: give a tokenizer.json or an object with encode and decode")
    if not isinstance(given, (str, Path)):
        return given
    from tokenizers import Tokenizer as FastTokenizer

    path = Path(given) / TOKENIZER_FILE if Path(given).is_dir() else Path(given)
    if not path.is_file():
        raise InputError(f"there is no {path}; give the tokenizer that the model learnt with")
    try:
        tokenizer = FastTokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing narrower
        raise InputError(f"{path} is not a tokenizer ({error})") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
