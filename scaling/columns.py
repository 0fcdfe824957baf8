"""The columns of a run table: one row is one training run, and every quantity has one name and one unit."""

from dataclasses import dataclass
from typing import Literal

FINISHED, DIVERGED, KILLED, RUNNING = "finished", "diverged", "killed", "running"
STATUSES = (FINISHED, DIVERGED, KILLED, RUNNING)
"""Of a run. Only finished ones have a loss that laws are fitted to; diverged ones bound the stable rates from above."""


@dataclass(frozen=True)
class Column:
    name: str
    meaning: str
    kind: Literal["number", "text"] = "number"
    aliases: tuple[str, ...] = ()
    """Other names that a foreign table may have for it, as `normalised` writes them; the first found is taken."""


COLUMNS = (
    Column("run", "name of the run", "text", ("runid", "runname", "name", "expname", "id", "experiment")),
    Column("source", "file or folder it was read from", "text"),
    Column("status", "finished, diverged, killed or running", "text", ("state",)),
    Column("labels", "what was noticed while reading it, separated by '; '", "text"),
    Column("seed", "of the initialisation and the order of data"),
    Column("total", "parameters stored", aliases=("ntotal", "params", "parameters", "modelsize", "paramstotal")),
    Column(
        "non_embedding", "parameters without embedding and head",
        aliases=("nnonemb", "nnonembedding", "nonembeddingparamsize", "nonembeddingparams", "n"),
    ),
    Column("active", "parameters that a token passes through", aliases=("nactive", "activeparams")),
    Column("once", "parameters used once for each token, of a recurrent model", aliases=("nonce",)),
    Column("recurrent", "parameters used `recurrences` times for each token", aliases=("nrec", "nrecurrent")),
    Column("hidden_size", "width of the stream", aliases=("h", "hidden", "dmodel", "width")),
    Column("num_layers", "unrolled depth", aliases=("numl", "layers", "depth", "nlayers")),
    Column("tokens", "seen by the end", aliases=("d", "datasize", "dataset", "tokensseen", "trainingtokens")),
    Column("unique_tokens", "different tokens among those seen", aliases=("dunique", "u", "uniquedata")),
    Column("seq_len", "tokens of a sequence", aliases=("sequencelength", "context", "seqlength")),
    Column("batch_tokens", "tokens of a global batch", aliases=("batchtokens", "tokensperbatch", "b")),
    Column("batch_sequences", "sequences of a global batch", aliases=("bs", "bsz", "batchsize", "globalbatchsize")),
    Column("steps", "optimizer steps", aliases=("ti", "iterations", "trainiters", "numsteps")),
    Column("lr", "peak learning rate", aliases=("peaklr", "learningrate", "maxlr")),
    Column("final_lr", "learning rate at the end", aliases=("minlr", "endlr")),
    Column("schedule", "kind of learning-rate schedule", "text", ("lrschedule", "scheduler")),
    Column("warmup_tokens", "tokens of the warm-up"),
    Column("weight_decay", "as AdamW multiplies it with the rate", aliases=("wd", "weightdecay")),
    Column("optimizer", "its name", "text", ("optim",)),
    Column("beta1", "of Adam"),
    Column("beta2", "of Adam"),
    Column("flops_per_token", "of training: forward and backward", aliases=("m", "flopspertoken")),
    Column("flops", "of the whole run and its ancestors", aliases=("c", "compute", "trainingflop", "trainingflops")),
    Column("streams", "parallel streams P", aliases=("p", "parallelstreams")),
    Column("recurrences", "uses of a recurrent block", aliases=("r", "loops")),
    Column("parent", "run that this one continues or was grown from", "text"),
    Column("parent_tokens", "tokens of training before this run began, its ancestors'", aliases=("d1",)),
    Column("precision", "of compute", "text", ("dtype",)),
    Column("tokenizer", "name or fingerprint", "text", ("vocab",)),
    Column("data", "name or fingerprint of the data mixture", "text", ("datamix", "dataset", "corpus")),
    Column(
        "loss", "at the end, nats for each token unless `loss_kind` says otherwise",
        aliases=("finalloss", "smoothloss", "lmloss", "validationloss", "valloss", "evalloss", "trainloss"),
    ),
    Column("loss_error", "standard error of the loss", aliases=("lossse", "losserr", "lossstderr")),
    Column("loss_kind", "held-out or smoothed training loss, and of which set", "text"),
)  # fmt: skip
NAMES = tuple(each.name for each in COLUMNS)
TEXTS = frozenset(each.name for each in COLUMNS if each.kind == "text")


def normalised(name: str) -> str:
    """A column's name without case, spaces and punctuation, as aliases are written."""
    return "".join(character for character in name.lower() if character.isalnum())
