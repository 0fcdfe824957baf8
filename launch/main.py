"""`meristem <verb>`: the same commands as `python launch/<verb>.py`."""

import importlib
import sys

VERBS = {
    "pretrain": "train a model, or resume a run",
    "prepare": "turn text into token files and a tokenizer",
    "sample": "generate text from a checkpoint",
    "branch": "anneal stable checkpoints, in a fan of runs of their own",
    "merge": "average checkpoints of a run",
    "sweep": "run a ladder of sizes, tokens, learning rates and batches",
    "compare": "say what runs cost to the same loss",
    "grow": "make a checkpoint's model larger",
    "fit": "from runs to laws of loss, learning rate and batch, and what they propose",
    "sharpness": "measure the curvature of a checkpoint's loss, and the rates it is stable at",
    "plan": "say what laws propose for a run to come, and write its configuration",
    "explain": "say what a configuration comes to",
    "check_coordinates": "check that a parametrisation transfers over widths and depths",
    "convert": "to and from Hugging Face and Megatron-core checkpoints",
}


def main(argv: list[str] | None = None) -> int:
    """Run one verb with the remaining arguments; returns its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: meristem VERB [arguments]; meristem VERB --help for one of them\n")
        print("\n".join(f"  {verb:<17} {meaning}" for verb, meaning in VERBS.items()))
        return 0
    if argv[0] not in VERBS:
        print(f"error: unknown verb {argv[0]!r}; known: {', '.join(VERBS)}", file=sys.stderr)
        return 2
    return importlib.import_module(f"launch.{argv[0]}").main(argv[1:])


if __name__ == "__main__":
    sys.exit(main())
