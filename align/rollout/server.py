"""vLLM as the engine: a server in an environment of its own, on this machine or on one that sees the same files.

Before it samples, the server gets the weights: a folder of safetensors that it is told to read in place of its own. They go by
their hash, which the server keeps and gives back, so that nothing is brought twice, and a server that was started anew is noticed.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from copy import deepcopy
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from peft import PeftModel
from safetensors import safe_open
from torch import nn

from align import processes
from align.engine import base_model
from align.errors import AlignError
from align.progress import say
from align.rollout.sampling import Completion, Sampling, chances

SECONDS = 1800.0
"""How long an answer may take."""

PROMPTS, FOLLOWING = (6, 3, 1), 4
"""Tokens in the prompts of the probe, and how many are sampled after each."""

TOLERANCE = 0.1
"""Nats a token by which the log-probs of the probe may differ. A server in 16 bits rounds; another model is far beyond."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What a server may hold the weights in."""

TRIES = 20
"""How often, half a second apart, the server is asked to empty its cache, which it does when it is idle."""

NOT_YET = "on their way"
"""The version while weights are being brought."""


class Server:
    """What is asked of a vLLM server, by its address."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        # To a proxy that the environment names, 127.0.0.1 would be the proxy's own machine.
        self._opener = urllib.request.build_opener(*([urllib.request.ProxyHandler({})] if _is_here(url) else []))

    def get(self, path: str) -> dict[str, Any]:
        """Its answer."""
        return self._ask(urllib.request.Request(f"{self.url}/{path}"))

    def post(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """Its answer to `body`."""
        header = {"Content-Type": "application/json"}
        return self._ask(urllib.request.Request(f"{self.url}/{path}", json.dumps(body or {}).encode(), header))

    def _ask(self, request: urllib.request.Request) -> dict[str, Any]:
        try:
            with self._opener.open(request, timeout=SECONDS) as response:
                found = json.loads(response.read())
        except urllib.error.HTTPError as error:
            raise AlignError(self._refusal(request, error)) from error
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", None) or error
            raise AlignError(
                f"no vLLM server answers at {self.url} ({reason}); start it, then run the same command: it goes on from there"
            ) from error
        except ValueError as error:
            raise self.strange(request.selector, "no JSON") from error
        if not isinstance(found, dict):
            raise self.strange(request.selector, f"a {type(found).__name__}")
        return found

    def _refusal(self, request: urllib.request.Request, error: urllib.error.HTTPError) -> str:
        if error.code == 404:
            return (
                f"the server at {self.url} knows no {request.selector}: start vLLM 0.32 or newer, for rollouts (docs/rollouts.md)"
            )
        try:
            told = str(json.loads(error.read())["error"]["message"])
        except (ValueError, LookupError, TypeError, OSError, http.client.HTTPException):
            told = str(error.reason)
        return f"the vLLM server at {self.url} answered {request.selector} with {error.code}: {' '.join(told.split())}"

    def strange(self, path: str, what: str) -> AlignError:
        """The error for an answer that is not vLLM's."""
        return AlignError(f"the server at {self.url} answered {path} with {what}; expected is vLLM 0.32 or newer")


def _is_here(url: str) -> bool:
    """Whether it is an address by which a machine calls itself."""
    host = urlsplit(url).hostname or ""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class ServerEngine:
    """Completes prompts at a vLLM server, with the weights that `model` has at that moment.

    Args:
        url: the server's address.
        folder: where weights are left for it to read, and taken away afterwards.
    """

    def __init__(self, url: str, model: nn.Module, folder: Path) -> None:
        self.server, self.model, self.folder = Server(url), model, folder.resolve()
        self.exact: set[str] | None = None
        """Tensors that the server holds as they are in the file, by the first hand-over."""

    def complete(
        self,
        prompts: Sequence[list[int]],
        sampling: Sampling,
        stop_ids: Sequence[int],
        generator: torch.Generator | None = None,
        progress: Callable[[int], Any] | None = None,
    ) -> list[Completion]:
        """See `align.rollout.complete`. The server draws by a seed for each prompt, which `generator` draws.

        Raises:
            AlignError: there is no server, it is another's, or it does not take the weights.
        """
        version = self.bring(sampling)
        # As many numbers as our engine would draw, so that the generator goes on as with it.
        first = chances(len(prompts), sampling, generator)[:, 0]
        completions = self._answers(prompts, [int(chance * 2**24) for chance in first.tolist()], sampling, stop_ids, progress)
        if self.version() != version:
            raise AlignError(
                f"the vLLM server at {self.server.url} got other weights while it sampled: it serves one run at a time"
            )
        return completions

    def version(self) -> str:
        """That of the server's weights."""
        found = self.server.get("weight_info").get("weight_version")
        if not isinstance(found, str):
            raise self.server.strange("/weight_info", "no version of its weights")
        return found

    # -- weights in ---------------------------------------------------------------------------------------------------------

    def bring(self, sampling: Sampling) -> str:
        """Make the server's weights those of the model, if they are not; returns their version."""
        version = self._brought(sampling) if processes.number() == 0 else None
        return processes.first(version)  # all have the same weights

    def _brought(self, sampling: Sampling) -> str:
        aside = self.folder / "weights"
        shutil.rmtree(aside, ignore_errors=True)
        try:
            version = write_weights(self.model, aside)
            if self.version() != version:
                self._hand_over(aside, version, sampling)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        return version

    def _hand_over(self, weights: Path, version: str, sampling: Sampling) -> None:
        post = self.server.post
        post("update_weight_version", {"new_version": NOT_YET})
        post("collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(weights)}})
        self._forget_prefixes()
        self._check_tensors(weights)
        self._check_probe(sampling)
        post("update_weight_version", {"new_version": version})

    def _forget_prefixes(self) -> None:
        """Empty the cache of keys and values, which the old weights made. What a run that was cut left unanswered ends first."""
        for _ in range(TRIES):
            if self.server.post("reset_prefix_cache").get("success"):
                return
            time.sleep(0.5)
        raise AlignError(f"the vLLM server at {self.server.url} is at work for somebody else: it serves one run at a time")

    def _check_tensors(self, weights: Path) -> None:
        """Compare by checksum what the server holds as it is in the file; what it fuses, pads or packs is left to the probe."""
        found = self.server.post("weight_checker", {"action": "checksum"}).get("checksums")
        if not isinstance(found, dict):
            raise self.server.strange("/weight_checker", "no checksums")
        theirs = {key.rpartition(":")[2]: digest for key, digest in found.items()}
        same = {name for name, tensor in _tensors(weights) if name in theirs and _has_digest(tensor, theirs[name])}
        if self.exact is None:
            say(f"weights are brought to {self.server.url}: {len(same)} of its {len(theirs)} tensors are compared by checksum")
            self.exact = same
        if old := sorted(self.exact - same):
            raise AlignError(f"the vLLM server at {self.server.url} has not taken the weights: {old[0]} is another; start it anew")

    def _check_probe(self, sampling: Sampling) -> None:
        """Compare the log-probs of what the server says next to random tokens with the model's own."""
        base, generator = base_model(self.model), torch.Generator().manual_seed(0)
        prompts = [torch.randint(base.config.vocab_size, (length,), generator=generator).tolist() for length in PROMPTS]
        asked = Sampling(FOLLOWING, sampling.temperature)
        answers = self._answers(prompts, range(len(prompts)), asked, [], None)
        gaps = [
            abs(theirs - ours)
            for prompt, answer in zip(prompts, answers, strict=True)
            for theirs, ours in zip(answer.logps, own_logps(self.model, prompt, answer.tokens, asked.temperature), strict=True)
        ]
        if not (difference := sum(gaps) / len(gaps)) <= TOLERANCE:
            raise AlignError(
                f"the vLLM server at {self.server.url} got the weights, and is {difference:.2g} nats a token from our log-probs "
                f"(at most {TOLERANCE} is rounding): it serves another model, or was not started for rollouts (docs/rollouts.md)"
            )

    # -- completions out ------------------------------------------------------------------------------------------------------

    def _answers(
        self,
        prompts: Sequence[list[int]],
        seeds: Sequence[int],
        sampling: Sampling,
        stop_ids: Sequence[int],
        progress: Callable[[int], Any] | None,
    ) -> list[Completion]:
        pool = ThreadPoolExecutor(max(1, min(sampling.batch_size, len(prompts))))
        try:
            asked = [pool.submit(self._answer, *one, sampling, list(stop_ids)) for one in zip(prompts, seeds, strict=True)]
            for answer in as_completed(asked):
                answer.result()
                if progress is not None:
                    progress(1)
            return [answer.result() for answer in asked]
        finally:
            pool.shutdown(cancel_futures=True)

    def _answer(self, prompt: list[int], seed: int, sampling: Sampling, stop_ids: list[int]) -> Completion:
        path = "v1/completions"
        found = self.server.post(path, {"prompt": prompt, "seed": seed, "stop_token_ids": stop_ids, **_request(sampling)})
        try:
            choice = found["choices"][0]
            tokens, logps, finished = choice["token_ids"], choice["logprobs"]["token_logprobs"], choice["finish_reason"] == "stop"
        except (LookupError, TypeError):
            raise self.server.strange(f"/{path}", "no tokens and log-probs") from None
        if not tokens or len(tokens) != len(logps):
            raise self.server.strange(f"/{path}", f"{len(tokens)} tokens and {len(logps)} log-probs")
        # Those of vLLM are over what top-k and top-p left.
        whole = sampling.top_p == 1 and not sampling.top_k
        return Completion(tokens, finished, logps if whole else [])


def _request(sampling: Sampling) -> dict[str, Any]:
    """`sampling` in vLLM's words. The penalties switch off what the model's generation config may ask for."""
    return {
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "frequency_penalty": 0.0,
        "presence_penalty": 0.0,
        "stop": list(sampling.stop_strings),
        "include_stop_str_in_output": True,
        "ignore_eos": True,
        "skip_special_tokens": False,
        "logprobs": 0,
        "return_token_ids": True,
    }


@torch.no_grad()
def own_logps(model: nn.Module, prompt: list[int], tokens: list[int], temperature: float) -> list[float]:
    """Log-probs (nats) of `tokens` after `prompt` by the model's own forward; see `Completion.logps`."""
    base, was_training = base_model(model), model.training
    ids = torch.tensor([prompt + tokens], device=next(base.parameters()).device)
    model.eval()
    try:
        logits = type(base).forward(base, input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
    finally:
        model.train(was_training)
    return (logits / (temperature or 1)).log_softmax(1).gather(1, ids[0, len(prompt) :, None])[:, 0].tolist()


def write_weights(model: nn.Module, folder: Path) -> str:
    """Write the whole weights of `model`, adapters merged, as ``from_pretrained`` reads them; returns their sha256.

    Raises:
        AlignError: they cannot be whole.
    """
    whole: Any = base_model(model)
    if getattr(whole, "is_quantized", False):
        raise AlignError("rollout_server: the policy's base is quantized, and a server gets whole weights; take tuning lora")
    if isinstance(model, PeftModel):
        if model.active_peft_config.is_prompt_learning:
            raise AlignError("rollout_server: virtual tokens cannot be merged into weights for a server; take another tuning")
        whole = deepcopy(model).merge_and_unload()  # a copy: taking an adapter out again would round
    whole.save_pretrained(folder)
    hashed = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            hashed.update(hashlib.file_digest(file, "sha256").digest())
    return hashed.hexdigest()


def _tensors(folder: Path) -> Any:
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (it is no dictionary)
                yield name, file.get_tensor(name)


def _has_digest(tensor: torch.Tensor, digest: str) -> bool:
    """Whether it is what vLLM computed, in any of `DTYPES`."""
    held = (tensor.to(dtype).contiguous().view(-1).view(torch.uint8) for dtype in DTYPES)
    return any(hashlib.sha256(it.numpy().data).hexdigest() == digest for it in held)
