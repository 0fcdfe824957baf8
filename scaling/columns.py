"""The columns of a run table: one row is one training run, and every quantity has one name and one unit."""

from dataclasses import dataclass
from typing import Literal

FINISHED, DIVERGED, KILLED, RUNNING = "finished", "diverged", "killed", "running"
STATUSES = (FINISHED, DIVERGED, KILLED, RUNNING)
"""Of a run. Only finished ones have a loss that laws are fitted to; diverged ones bound the stable rates from above."""

DUPLICATE = "duplicate of "
"""How the label of a run begins that is in a table twice."""


@dataclass(frozen=True)
class Column:
    name: str
    meaning: str
    kind: Literal["number", "text"] = "number"
    aliases: tuple[str, ...] = ()
    """Other names that a foreign table may have for it, as `normalised` writes them; the first found is taken."""
    symbols: tuple[str, ...] = ()
    """Names in which the case counts, and which are too short to be sure of: taken where nothing else is found."""
    least: float = 0.0
    """Below this a typical value must have another unit, or be another thing of the same name."""
    most: float = float("inf")


COLUMNS = (
    Column(
        "run", "name of the run", "text",
        ("runname", "runid", "name", "displayname", "expname", "experimentname", "experiment", "id",
         "jobname", "modelname"),
    ),
    Column("source", "file or folder it was read from", "text"),
    Column("status", "finished, diverged, killed or running", "text", ("state", "runstate", "outcome")),
    Column("labels", "what was noticed while reading it, separated by '; '", "text"),
    Column("seed", "of the initialisation and the order of data", aliases=("randomseed", "initseed", "dataseed")),
    Column(
        "total", "parameters stored",
        aliases=(
            "ntotal", "totalparams", "totalparameters", "paramstotal", "parameterstotal", "ntotalparams", "params",
            "parameters", "nparams", "nparameters", "numparams", "numparameters", "numberofparameters", "paramcount",
            "parametercount", "parameterscount", "paramscount", "param", "modelsize", "modelparams", "modelparameters",
            "size",
            "totalparametercount", "totalparamcount", "nwemb", "nwithemb", "nwithembedding", "nwithembeddings",
        ),
        least=1e3,
    ),
    Column(
        "non_embedding", "parameters without embedding and head",
        aliases=(
            "nnoemb", "nnoembed", "nnoembedding",
            "nnonemb", "nnonembed", "nnonembedding", "nonemb", "nonembparams", "nonembedparams", "nonembeddingparams",
            "nonembeddingparamsize", "nonembeddingparameters", "nonembeddingsize", "nonembeddingcount",
            "paramsnonemb", "paramsnonembed", "paramsnonembedding", "paramsnoembed", "paramsnoemb",
            "paramswithoutembedding", "paramswithoutembeddings", "numnonembeddingparams", "numnonembparams", "nne",
        ),
        symbols=("N", "n"), least=1e3,
    ),
    Column(
        "active", "parameters that a token passes through",
        aliases=("nactive", "nact", "activeparams", "activeparameters", "activatedparams", "activatedparameters",
                 "activeparamsize", "numactiveparams", "paramsactive", "activated"),
        symbols=("Na", "N_a"), least=1e3,
    ),
    Column("once", "parameters used once for each token, of a recurrent model", aliases=("nonce",), least=1),
    Column(
        "recurrent", "parameters used `recurrences` times for each token",
        aliases=("nrec", "nrecurrent", "recurrentparams"), least=1,
    ),
    Column(
        "hidden_size", "width of the stream",
        aliases=("hidden", "dmodel", "width", "hiddendim", "modeldim", "nembd", "embeddim", "dim"),
        symbols=("h",), least=1,
    ),
    Column(
        "num_layers", "unrolled depth",
        aliases=("numl", "layers", "depth", "nlayers", "nlayer", "numhiddenlayers", "numlayer"),
        symbols=("l",), least=1,
    ),
    Column(
        "tokens", "seen in this run by its end; a branch of the same model and data is one run with its parent",
        aliases=(
            "tokensseen", "seentokens", "trainingtokens", "traintokens", "numtokens", "ntokens", "totaltokens",
            "tokenstotal", "trainedtokens", "tokenstrained", "consumedtokens", "tokenbudget", "tokencount", "ntrain",
            "numtraintokens", "dtokens", "toks", "ntoks", "traintoks", "pretrainingdatasize",
            "datasize", "datasetsize", "datatokens", "tokennum", "traindatasize", "trainsize",
        ),
        symbols=("D", "d"), least=1e5,  # a `d` below is a width
    ),
    Column(
        "unique_tokens", "different tokens among those seen",
        aliases=("dunique", "uniquedata", "uniquetokens", "numuniquetokens", "tokensunique", "uniquedatasize"),
        symbols=("U", "U_D"), least=1e3,
    ),
    Column(
        "seq_len", "tokens of a sequence",
        aliases=("sequencelength", "seqlength", "contextlength", "contextsize", "context", "ctx", "ctxlen",
                 "contextlen", "blocksize", "maxseqlen", "maxseqlength", "nctx"),
        least=1, most=1e8,
    ),
    Column(
        "batch_tokens", "tokens of a global batch",
        aliases=("tokensperbatch", "batchsizetokens", "batchsizeintokens", "tokenbatchsize", "globalbatchtokens",
                 "tokensperstep", "batchtokenssize", "globalbatchsizetokens"),
        symbols=("B",), least=1,
    ),
    Column(
        "batch_sequences", "sequences of a global batch",
        aliases=("globalbatchsize", "gbs", "globalbatch", "batchsizesequences", "batchsizeseqs", "sequencesperbatch",
                 "gbsz", "globalbsz", "globalbs", "batchsize", "bs", "bsz", "trainbatchsize", "batch"),
        least=1,
    ),
    Column(
        "steps", "optimizer steps",
        aliases=("ti", "iterations", "trainiters", "numsteps", "nsteps", "trainsteps", "trainingsteps", "maxsteps",
                 "totalsteps", "iters", "numiterations", "totaliterations", "maxiters", "numtrainsteps",
                 "iteration", "step", "globalstep"),
        least=1,
    ),
    Column(
        "lr", "peak learning rate",
        aliases=("peaklr", "maxlr", "lrpeak", "lrmax", "peaklearningrate", "maxlearningrate", "learningrate", "baselr"),
        least=1e-12, most=1e3,
    ),
    Column(
        "final_lr", "learning rate at the end",
        aliases=("minlr", "endlr", "lrmin", "lrfinal", "lrend", "finallearningrate", "minlearningrate", "mlr"),
        most=1e3,
    ),
    Column("schedule", "kind of learning-rate schedule", "text",
           ("lrschedule", "scheduler", "lrscheduler", "lrdecaystyle", "lrschedulertype", "scheduletype")),
    Column("warmup_tokens", "tokens of the warm-up"),
    Column("weight_decay", "as AdamW multiplies it with the rate", aliases=("wd", "weightdecay")),
    Column("optimizer", "its name", "text", ("optim", "optimizername", "optimizertype")),
    Column("beta1", "of Adam", aliases=("adambeta1", "b1")),
    Column("beta2", "of Adam", aliases=("adambeta2", "b2")),
    Column(
        "flops_per_token", "of training: forward and backward", aliases=("flopspertoken", "trainflopspertoken"),
        symbols=("M",), least=1e4,
    ),
    Column(
        "flops", "of the whole run and its ancestors",
        aliases=(
            "trainingflop", "trainingflops", "trainflops", "trainflop", "totalflops", "totaltrainflops",
            "totaltrainingflops", "totalflop", "flop", "compute",
            "computeflops", "computeflop", "trainingcompute", "traincompute", "totalcompute", "computebudget",
            "flopsbudget", "flopbudget", "budget", "flopstotal", "numflops",
        ),
        symbols=("C", "c"), least=1e6, most=1e32,
    ),
    Column(
        "streams", "parallel streams P", aliases=("parallelstreams", "numstreams", "nstreams"), symbols=("P",),
        least=1, most=1e4,
    ),
    Column(
        "recurrences", "uses of a recurrent block",
        aliases=("loops", "numloops", "nloops", "recurrence", "numrecurrences", "nrecurrences"), symbols=("r",),
        least=1, most=1e4,
    ),
    Column("parent", "run that this one continues or was grown from", "text", ("parentrun", "basemodel")),
    Column(
        "parent_tokens", "tokens of its ancestors, of another model or other data; not in `tokens`, unknown where none",
        aliases=("parenttokens", "basetokens", "pretrainingtokens", "pretrainedtokens"), symbols=("D1", "D_1"), least=1,
    ),
    Column("precision", "of compute", "text", ("dtype", "paramsdtype")),
    Column("tokenizer", "name or fingerprint", "text",
           ("tokenizername", "tokenizertype", "vocab", "vocabsize", "vocabularysize", "nvocab")),
    Column("data", "name or fingerprint of the data mixture", "text",
           ("datamix", "datamixture", "mixture", "dataset", "datasetname", "corpus", "trainset", "datapath",
            "trainingdata", "traindata")),
    Column(
        "critical_batch", "measured critical batch, in tokens",
        aliases=("criticalbatchsize", "criticalbatchtokens", "critbatch", "critbatchsize", "cbs", "bcrit"), least=1,
    ),
    Column(
        "timescale", "of weight decay, batch_tokens / (lr weight_decay tokens), as a share of the training",
        aliases=("weightdecaytimescale", "wdtimescale", "adamwtimescale", "ematimescale", "tauepoch", "tauema"),
    ),
    Column("loss", "at the end, nats for each token unless `loss_kind` says otherwise"),
    Column(
        "loss_error", "standard error of the loss",
        aliases=("lossse", "losserr", "lossstderr", "lossstandarderror", "losssem"),
    ),
    Column("loss_kind", "held-out or smoothed training loss, and of which set", "text", ("losstype",)),
)  # fmt: skip
NAMES = tuple(each.name for each in COLUMNS)
TEXTS = frozenset(each.name for each in COLUMNS if each.kind == "text")


def normalised(name: str) -> str:
    """A column's name without case, spaces and punctuation, as aliases are written."""
    return "".join(character for character in name.lower() if character.isalnum())
