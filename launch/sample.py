"""Generate text: `sample.py CHECKPOINT --prompt TEXT [--prompt TEXT ...]`."""

import argparse
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__:  # run as a script: the project's root is where its packages are found
    sys.path[0] = str(Path(__file__).resolve().parents[1])

if TYPE_CHECKING:
    from runtime.model.decoder import Decoder
    from runtime.model.generation import Sampling

REPLACEMENT = "\ufffd"
LONGEST_CHARACTER = 4  # bytes in UTF-8, and so the most byte tokens a character can wait for


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sample",
        description="Continue prompts with a trained model, on one process, until the end-of-text token.",
        epilog="Exit codes: 0 done, 2 bad input.",
    )
    parser.add_argument(
        "checkpoint", help="a run (its newest intact checkpoint), a checkpoint, an fsspec URL, or a Hugging Face folder"
    )
    parser.add_argument(
        "--prompt", action="append", metavar="TEXT", help='may be repeated; "" (the default) begins a new document'
    )
    parser.add_argument("--max-tokens", type=int, default=200, metavar="N", help="for each prompt (default 200)")
    parser.add_argument("--temperature", type=float, default=0.8, metavar="T", help="0 is greedy (default 0.8)")
    parser.add_argument("--top-k", type=int, metavar="K", help="draw from the K most probable tokens")
    parser.add_argument("--top-p", type=float, metavar="P", help="draw from the fewest tokens that reach P together")
    parser.add_argument("--seed", type=int, default=0, help="of every prompt's draws (default 0)")
    parser.add_argument("--weights", choices=("model", "ema"), default="model")
    parser.add_argument("--tokenizer", metavar="FILE", help="a tokenizer.json, where the checkpoint has none")
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Stream a continuation of every prompt to stdout; returns the exit code."""
    arguments = parser().parse_args(argv)
    try:
        _run(arguments)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader has had enough
        sys.stderr.close()
    except KeyboardInterrupt:
        return 130
    return 0


def _run(arguments: argparse.Namespace) -> None:
    from runtime.model.generation import Sampling

    if arguments.max_tokens < 1:
        raise ValueError(f"--max-tokens {arguments.max_tokens} is not 1 or more")
    sampling = Sampling(arguments.temperature, arguments.top_k, arguments.top_p)
    model = open_model(arguments.checkpoint, arguments.weights, arguments.tokenizer, arguments.device)
    for number, prompt in enumerate(arguments.prompt or [""]):
        if number:
            print("\n")
        print(prompt, end="", flush=True)
        for piece in model.stream(prompt, arguments.max_tokens, sampling, arguments.seed):
            print(piece, end="", flush=True)
    print()


def sample_lines(
    checkpoint: str | os.PathLike[str],
    prompts: list[str],
    *,
    max_tokens: int = 200,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    weights: str = "model",
) -> list[str]:
    """Each prompt with its continuation, as `main` prints them. ValueError for bad input."""
    from runtime.model.generation import Sampling

    sampling = Sampling(temperature, top_k, top_p)
    model = open_model(checkpoint, weights)
    return [prompt + "".join(model.stream(prompt, max_tokens, sampling, seed)) for prompt in prompts]


@dataclass(frozen=True)
class TextModel:
    """A decoder with its tokenizer (of the `tokenizers` library) and the id that ends a text, if known."""

    decoder: "Decoder"
    tokenizer: Any
    end_of_text: int | None

    def stream(self, prompt: str, max_tokens: int, sampling: "Sampling", seed: int) -> Iterator[str]:
        """The continuation of a prompt in pieces, as soon as each has its last byte.

        The draws depend on the seed and this prompt alone. An empty prompt is the end of the text before.
        """
        import torch

        from runtime.data.tokenizer import vocabulary_size
        from runtime.model.generation import generate

        ids = self.tokenizer.encode(prompt).ids if prompt else []
        if not ids:
            if self.end_of_text is None:
                raise ValueError("an empty prompt needs an end-of-text token, and none is known; give a prompt")
            ids = [self.end_of_text]
        size = self.decoder.config.vocab_size
        if max(ids) >= size:
            raise ValueError(f"the tokenizer gives id {max(ids)}, and the model's vocabulary has {size}")
        tokens = generate(
            self.decoder,
            ids,
            max_tokens,
            sampling,
            torch.Generator().manual_seed(seed),
            stop=() if self.end_of_text is None else (self.end_of_text,),
            vocab_size=min(size, vocabulary_size(self.tokenizer)),
        )
        yield from text_pieces(self.tokenizer, ids, tokens)


def open_model(
    checkpoint: str | os.PathLike[str], weights: str = "model", tokenizer: str | None = None, device: str | None = None
) -> TextModel:
    """The model of a checkpoint of any known format, ready to generate. ValueError for bad input."""
    from pathlib import Path

    import torch

    from runtime.checkpoint import formats
    from runtime.checkpoint.interchange import load_tokenizer, read_text
    from runtime.data.tokenizer import end_of_document
    from runtime.model.decoder import Decoder

    device = _device(device)
    found = formats.read(checkpoint, weights)
    text = found.tokenizer if tokenizer is None else read_text(Path(tokenizer))
    if text is None:
        raise ValueError(f"{checkpoint} has no tokenizer; give one with --tokenizer FILE")
    loaded = load_tokenizer(text, tokenizer or checkpoint)
    end = found.end_of_text if tokenizer is None else end_of_document(loaded)
    with torch.device("meta"):
        decoder = Decoder(found.config)
    decoder.load_state_dict(found.tensors, assign=True)
    return TextModel(decoder.to(device).eval(), loaded, end)


def _device(name: str | None) -> Any:
    import torch

    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {name} is not usable here: {reason}") from None


def text_pieces(tokenizer: Any, prompt: list[int], tokens: Iterator[int]) -> Iterator[str]:
    """Text of tokens one by one, holding back a character until its last byte is there.

    What a token adds is the difference of two decodings that begin one piece earlier, the prompt's last tokens
    included, so that decoders which treat a first token in a special way see none.
    """
    ids = prompt[-LONGEST_CHARACTER:]
    begin, shown = 0, len(ids)
    for token in tokens:
        ids.append(token)
        before, now = tokenizer.decode(ids[begin:shown]), tokenizer.decode(ids[begin:])
        if now.endswith(REPLACEMENT) and len(ids) - shown < LONGEST_CHARACTER:
            continue
        yield now[len(before) :]
        begin, shown = shown, len(ids)
    yield tokenizer.decode(ids[begin:])[len(tokenizer.decode(ids[begin:shown])) :]


if __name__ == "__main__":
    sys.exit(main())
