"""Sampling tokens from a decoder, with its key-value cache."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.model.cache import KeyValueCache
from runtime.model.decoder import Decoder


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn: temperature 0 takes the most probable one.

    `top_k` keeps the k most probable tokens, `top_p` the fewest whose probability reaches p (nucleus sampling,
    Holtzman et al. 2020, arXiv 1904.09751, section 3.1), both after the temperature. ValueError out of range.
    """

    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature {self.temperature} is not a number from 0 up")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top-k {self.top_k} is not 1 or more")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top-p {self.top_p} is not above 0 and at most 1")

    def draw(self, logits: Tensor, generator: torch.Generator) -> int:
        """A token id from logits [V]. ValueError if they are not finite.

        The probabilities are float64 on the CPU, so that a seed means the same on every device.
        """
        if not logits.isfinite().all():
            raise ValueError("the model's logits are not finite; its weights are damaged or have diverged")
        if self.temperature == 0:
            return int(logits.argmax())
        logits = logits.double().cpu()
        probabilities = ((logits - logits.max()) / self.temperature).softmax(-1)
        if self.top_k is not None and self.top_k < len(probabilities):
            kept = probabilities.topk(self.top_k).indices
            probabilities = torch.zeros_like(probabilities).scatter(0, kept, probabilities[kept])
        if self.top_p is not None:
            probabilities = _nucleus(probabilities / probabilities.sum(), self.top_p)
        return int(torch.multinomial(probabilities, 1, generator=generator))


def _nucleus(probabilities: Tensor, mass: float) -> Tensor:
    """Zero all but the fewest largest probabilities that add up to `mass`; the largest always stays."""
    ordered, order = probabilities.sort(descending=True)
    outside = ordered.cumsum(0) - ordered >= mass
    return probabilities.scatter(0, order, ordered.masked_fill(outside, 0.0))


@torch.inference_mode()
def generate(
    decoder: Decoder,
    prompt: list[int],
    max_tokens: int,
    sampling: Sampling,
    generator: torch.Generator,
    *,
    stop: Collection[int] = (),
    vocab_size: int | None = None,
    use_cache: bool = True,
) -> Iterator[int]:
    """Up to `max_tokens` ids that continue a prompt of at least one, ending before an id of `stop`.

    Only ids below `vocab_size`, the tokenizer's, are drawn: a model's vocabulary may be padded. Without the
    cache every step runs the whole sequence again, which is the reference for it.
    """
    assert prompt, "generation starts from at least one token"
    device = decoder.embedding.weight.device
    cache = KeyValueCache(len(decoder.depth_plan)) if use_cache else None
    tokens = list(prompt)
    fed = 0
    for _ in range(max_tokens):
        logits = decoder(torch.tensor([tokens[fed:]], device=device), cache=cache)[0, -1, :vocab_size]
        fed = len(tokens) if use_cache else 0
        token = sampling.draw(logits, generator)
        if token in stop:
            return
        tokens.append(token)
        yield token
