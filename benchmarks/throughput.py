"""Speed of a training step: ours, Hugging Face's LlamaForCausalLM and a plain torch loop, of the same shapes.

    python benchmarks/throughput.py --shape small --pairs 20 --threads 1
    python benchmarks/throughput.py --shape 8B --contenders ours-compiled ours-float8

All contenders run in one process, interleaved in rounds, each round in the other direction, and every ratio is the
median over rounds of (their time / our time in that round), with a bootstrap interval: a machine that is slow for a
while is slow for both. Tokens -> loss -> backward -> clipping -> fused AdamW -> zero_grad is a step for each of them.
"""

import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.bench import Shape, arguments, batches, headline, parse, ratio, this_device, timed, write
from runtime.config import ParallelConfig
from runtime.model.counts import count, flops_per_token
from runtime.model.decoder import Decoder
from runtime.model.initialization import initialize
from runtime.observe.devices import peak
from runtime.observe.proposal import USABLE
from runtime.parallel.float8 import apply_float8, check_available
from runtime.parallel.parallelize import compile_block, compile_loss
from runtime.parallel.recompute import recompute

Step = Callable[[Tensor, Tensor], Tensor]
"""One optimizer step on tokens and targets [b, s]; the mean loss before it."""


@contextmanager
def born(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Modules that are built inside lie there at once: a host takes minutes to draw billions of first values."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(before)


def optimize(model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor]) -> Step:
    """The part of a step that all contenders share."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step(tokens: Tensor, targets: Tensor) -> Tensor:
        value = loss(tokens, targets)
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return value.detach()

    return step


def ours(shape: Shape, device: torch.device, dtype: torch.dtype, compiled: bool, float8: str | None = None) -> Step:
    with born(device, dtype):
        decoder = Decoder(shape.config())
    initialize(decoder, 0)
    if float8:
        apply_float8(decoder.blocks, float8, emulate=device.type == "cpu")
    for block in decoder.blocks:  # in the order of `parallelize`
        recompute(block, "full" if shape.recompute else "none")
        if compiled:
            compile_block(block)
    if compiled:
        compile_loss(decoder, device)

    def loss(tokens: Tensor, targets: Tensor) -> Tensor:
        return decoder(tokens, targets).total / targets.numel()

    return optimize(decoder, loss)


def hugging_face(shape: Shape, device: torch.device, dtype: torch.dtype, compiled: bool) -> Step:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        vocab_size=shape.vocab_size,
        max_position_embeddings=shape.seq_len,
        attn_implementation="sdpa",
        use_cache=False,
    )
    with born(device, dtype):
        model = LlamaForCausalLM(config).train()
    if shape.recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    forward = torch.compile(model) if compiled else model
    # shift_labels: the targets are shifted already
    return optimize(model, lambda tokens, targets: forward(tokens, labels=targets, shift_labels=targets).loss)


class PlainBlock(nn.Module):
    """A block as one writes it from torch's own parts."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.head_dim = shape.hidden_size // shape.num_heads
        kv_size = shape.num_kv_heads * self.head_dim
        self.norms = nn.ModuleList(nn.RMSNorm(shape.hidden_size, eps=1e-5) for _ in range(2))
        self.qkv = nn.Linear(shape.hidden_size, shape.hidden_size + 2 * kv_size, bias=False)
        self.out = nn.Linear(shape.hidden_size, shape.hidden_size, bias=False)
        self.gate_up = nn.Linear(shape.hidden_size, 2 * shape.intermediate_size, bias=False)
        self.down = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)
        self.sizes = (shape.hidden_size, kv_size, kv_size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        heads = [each.unflatten(-1, (-1, self.head_dim)) for each in self.qkv(self.norms[0](x)).split(self.sizes, -1)]
        query, key = (self.rotate(each, cos, sin).transpose(1, 2) for each in heads[:2])
        grouped = query.shape[1] != key.shape[1]
        y = F.scaled_dot_product_attention(query, key, heads[2].transpose(1, 2), is_causal=True, enable_gqa=grouped)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        gate, up = self.gate_up(self.norms[1](x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)

    @staticmethod
    def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


class PlainDecoder(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.recompute = shape.recompute
        self.embedding = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.blocks = nn.ModuleList(PlainBlock(shape) for _ in range(shape.num_layers))
        self.norm = nn.RMSNorm(shape.hidden_size, eps=1e-5)
        self.head = nn.Linear(shape.hidden_size, shape.vocab_size, bias=False)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.embedding(tokens)
        head_dim = self.blocks[0].head_dim
        frequencies = 10000.0 ** (-torch.arange(0, head_dim, 2, device=x.device) / head_dim)
        angles = torch.outer(torch.arange(tokens.shape[1], device=x.device), frequencies).unsqueeze(1)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for block in self.blocks:
            x = checkpoint(block, x, cos, sin, use_reentrant=False) if self.recompute else block(x, cos, sin)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1).float(), targets.flatten())


def plain(shape: Shape, device: torch.device, dtype: torch.dtype, compiled: bool) -> Step:
    with born(device, dtype):
        model = PlainDecoder(shape)
    return optimize(model, torch.compile(model) if compiled else model)


CONTENDERS: dict[str, Callable[[Shape, torch.device, torch.dtype], Step]] = {
    "ours": partial(ours, compiled=False),
    "ours-compiled": partial(ours, compiled=True),
    "ours-float8": partial(ours, compiled=True, float8="tensorwise"),
    "ours-float8-rowwise": partial(ours, compiled=True, float8="rowwise"),
    "hf": partial(hugging_face, compiled=False),
    "hf-compiled": partial(hugging_face, compiled=True),
    "plain": partial(plain, compiled=False),
    "plain-compiled": partial(plain, compiled=True),
}

DEFAULT = [name for name in CONTENDERS if "float8" not in name]
"""Without those that need torchao and are emulated on a CPU."""

PAIRS = [
    ("ours", "hf"),
    ("ours", "plain"),
    ("ours-compiled", "hf-compiled"),
    ("ours-compiled", "plain-compiled"),
    ("ours", "hf-compiled"),
    ("ours-compiled", "ours"),
    ("ours-float8", "ours-compiled"),
    ("ours-float8-rowwise", "ours-compiled"),
]
"""Ratios to report: how many times as fast the first is as the second."""


def most_at_once(shape: Shape, element: int, memory: float) -> int:
    """How many contenders fit a device of so many bytes, when each keeps weights and two moments, and one at a time
    has gradients, logits, and these and their gradient in float32. `element`: bytes of a number that they compute with.
    """
    parameters, logits = count(shape.config()).total, shape.batch * shape.seq_len * shape.vocab_size
    at_work = parameters * element + logits * (element + 2 * 4)
    return max(int((USABLE * memory - at_work) // (3 * parameters * element)), 0)


@dataclass
class Result:
    first_loss: float
    gpu_memory: int | None
    """Bytes at the peak of a step: its own state, and what the step adds."""
    seconds: list[float]


def prepare(name: str, shape: Shape, device: torch.device, dtype: torch.dtype, warmup: int) -> tuple[Step, Result]:
    """Build a contender and run it until it is compiled and its optimizer has its state."""
    on_gpu = device.type == "cuda"
    before = torch.cuda.memory_allocated() if on_gpu else 0
    torch.manual_seed(0)
    step, source = CONTENDERS[name](shape, device, dtype), batches(shape, device)
    losses = [step(*next(source)).item() for _ in range(warmup)]
    memory = None
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        step(*next(source))
        memory = torch.cuda.max_memory_allocated() - before
    return step, Result(losses[0], memory, [])


def measure(names: list[str], shape: Shape, device: torch.device, dtype: torch.dtype, rounds: int) -> dict[str, Result]:
    """Interleaved times of these contenders."""
    steps, results = {}, {}
    for name in names:
        steps[name], results[name] = prepare(name, shape, device, dtype, warmup=3)
    source = batches(shape, device)
    for turn in range(rounds):
        batch = next(source)
        for name in names if turn % 2 == 0 else reversed(names):
            results[name].seconds.append(timed(steps[name], batch))
    return results


def report(shape: Shape, device: torch.device, dtype: torch.dtype, results: dict[str, Result]) -> dict:
    """Print the tables and return them."""
    config, tokens = shape.config(), shape.batch * shape.seq_len
    flops = flops_per_token(config, shape.seq_len)
    known = peak(torch.cuda.get_device_name(device), "bf16") if device.type == "cuda" else None
    print(f"{count(config).total:,} parameters, {flops:,} FLOPs a token, {tokens:,} tokens a step, {dtype}")
    if known:
        print(f"peak {known.flops / 1e12:.0f} TFLOP/s in bf16, which MFU is of in float8 too ({known.source})")
    rows, ratios = {}, {}
    print(f"{'contender':16}{'ms/step':>10}{'tokens/s':>12}{'TFLOP/s':>10}{'MFU':>8}{'GiB':>8}{'first loss':>12}")
    for name, result in results.items():
        seconds = statistics.median(result.seconds)
        rate = tokens / seconds
        rows[name] = {
            "seconds": seconds, "tokens_per_second": rate, "flops_per_second": rate * flops,
            "mfu": rate * flops / known.flops if known else None, "gpu_memory": result.gpu_memory,
            "first_loss": result.first_loss, "all_seconds": result.seconds,
        }  # fmt: skip
        mfu = f"{rows[name]['mfu']:.1%}" if known else "-"
        memory = f"{result.gpu_memory / 2**30:.1f}" if result.gpu_memory else "-"
        print(
            f"{name:16}{seconds * 1e3:10.1f}{rate:12,.0f}{rate * flops / 1e12:10.3f}{mfu:>8}{memory:>8}"
            f"{result.first_loss:12.4f}"
        )
    for fast, slow in PAIRS:
        if fast in results and slow in results:
            found = ratios[f"{fast} / {slow}"] = ratio(results[fast].seconds, results[slow].seconds)
            print(f"{fast} is {found[0]:.3f} x as fast as {slow}  [{found[1]:.3f}, {found[2]:.3f}]")
    return {"contenders": rows, "ratios": ratios}


def main(argv: list[str] | None = None) -> int:
    parser = arguments(__doc__, 15, "rounds, each with one step of every contender")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=DEFAULT)
    options, shape = parse(parser, argv)
    for name in options.contenders:
        if "float8" in name:
            try:
                check_available(ParallelConfig(float8="rowwise"))
            except ValueError as error:
                parser.error(f"--contenders {name}: {error}")
    dtype = torch.bfloat16 if this_device().type == "cuda" else torch.float32
    if this_device().type == "cuda":
        memory = torch.cuda.get_device_properties().total_memory
        most, asked = most_at_once(shape, dtype.itemsize, memory), len(options.contenders)
        if asked > most:
            parser.error(
                f"--contenders: {asked} of shape {options.shape} do not fit the GPU's {memory / 1e9:.0f} GB at once; "
                f"accepted are at most {most}, as in --contenders {' '.join(options.contenders[:most]) or '(none)'}"
            )
    results = measure(options.contenders, shape, this_device(), dtype, options.pairs)
    print(headline(options.shape, shape))
    found = report(shape, this_device(), dtype, results)
    write(options.json, shape, {"dtype": str(dtype), **found})
    return 0


if __name__ == "__main__":
    sys.exit(main())
