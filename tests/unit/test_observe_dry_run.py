"""What a dry run says, and that it leaves nothing behind."""

import os
import shutil
import subprocess

import pytest
import torch.distributed as dist

from launch.pretrain import main
from runtime.config import Config
from runtime.model.counts import count, flops_per_token
from runtime.observe.devices import NODES
from runtime.observe.dry_run import report
from runtime.observe.identity import SourceIdentity, git_revision, identity, with_segment
from runtime.observe.memory import estimate
from runtime.parallel.mesh import Layout, plan_layout
from runtime.resilience.exits import BAD_INPUT
from tests.presets import SMALL


def config_of(**sections) -> Config:
    raw = {
        "run": {"name": "small"},
        "model": {
            "num_layers": 2,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 4,
            "num_kv_heads": 2,
            "vocab_size": 501,
        },
        "data": {"sources": [{"path": "absent/train"}], "seq_len": 128},
        "batch": {"sequences": 128},
        "optim": {"lr": 2e-3},
        "schedule": {"horizon": "10M", "final": 0.1},
        "evaluation": {"sets": [{"name": "held", "path": "absent/held"}], "every": "2M"},
    }
    for name, section in sections.items():
        raw[name] = {**raw.get(name, {}), **section}
    return Config.model_validate(raw)


@pytest.mark.parametrize(
    "world_size, sections",
    [
        (1, {}),
        (1, {"parallel": {"compile": True}}),
        (3, {"batch": {"sequences": 129}}),
        (64, {}),
        (64, {"parallel": {"tensor": 2, "data_replicate": 4, "recompute": "selective"}}),
    ],
)
def test_a_dry_run_reports_any_world_and_writes_nothing(world_size, sections, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = config_of(**sections)
    text = report(config, world_size)
    batch_tokens = config.batch.sequences * 128
    counts = count(config.model)
    for number in (counts.total, counts.non_embedding, batch_tokens, -(-10_000_000 // batch_tokens)):
        assert f"{number:,}" in text
    assert f"{flops_per_token(config.model, 128):.4g}" in text
    assert f"{flops_per_token(config.model, 128) * batch_tokens:.4g}" in text
    kinds = ("parameters", "gradients", "optimizer", "gathered", "activations", "logits", "total")
    lines = text.splitlines()
    for kind in kinds:
        assert any(line.startswith(kind) for line in lines)
    assert "0.002" in text and "0.0002" in text, "the peak and the final learning rate"
    assert "every 2,000,000 tokens: held" in text
    assert list(tmp_path.iterdir()) == []
    assert not dist.is_initialized()


def test_each_optimizer_has_its_own_state():
    """Muon keeps one number for each of a hidden matrix, all else two; and it makes matrices whole in the step."""
    hidden = 2 * (2 * 64 * 64 + 2 * 64 * 64 + 3 * 64 * 192)
    sizes = {"num_layers": 2, "hidden_size": 64, "intermediate_size": 192, "num_heads": 4, "num_kv_heads": 4}
    found = {}
    for name in ("adamw", "muon", "schedule_free"):
        config = config_of(model=sizes, optim={"name": name}, batch={"micro_sequences": 1})
        layout = plan_layout(config.parallel, 2, config.model, config.data.seq_len, config.batch.sequences)
        found[name] = estimate(config, layout, device_type="cuda").by_kind
    total = count(config.model).total
    assert found["adamw"]["optimizer"] == pytest.approx(4 * 2 * total / 2, rel=0.01)
    assert found["schedule_free"]["optimizer"] == pytest.approx(4 * 2 * total / 2, rel=0.01)
    assert found["muon"]["optimizer"] == pytest.approx(4 * (2 * total - hidden) / 2, rel=0.01)


def test_an_impossible_mesh_is_refused_before_anything_is_built():
    with pytest.raises(ValueError, match=r"parallel\.tensor"):
        report(config_of(parallel={"tensor": 3}), 3)


WIDE = {"hidden_size": 2048, "intermediate_size": 8192, "num_heads": 16, "num_kv_heads": 8, "vocab_size": 32000}


def speed(node: str | None, **parallel: object) -> list[str]:
    """The lines of the section on step time, without padding; a wide model on eight processes."""
    config = config_of(
        model=WIDE, data={"seq_len": 4096}, batch={"sequences": 16}, parallel={"precision": "bf16", **parallel}
    )
    text = report(config, 8, node=NODES[node] if node else None)
    return [" ".join(line.split()) for line in text.split("Step time")[1].split("Schedule")[0].splitlines()[1:] if line]


def test_a_dry_run_names_a_faster_mesh():
    lines = speed("h100", tensor=8, recompute="full")
    assert lines[0].startswith("machine DGX H100 8 devices")
    (first,) = [place for place, line in enumerate(lines) if line.startswith("a faster mesh")]
    keys = {line.split()[-1] for line in lines[first : first + 4]}
    assert {"parallel.tensor=1", "parallel.recompute=none"} <= keys
    before, after = [line for line in lines if line.startswith("tokens per second")]
    assert int(after.split()[3].replace(",", "")) > int(before.split()[3].replace(",", ""))
    assert "waiting for communication" in lines[1]


def test_a_dry_run_says_that_no_device_is_known():
    assert speed(None) == ["no device is known --device a100, b200, h100 or h200 names one"]
    assert speed("h100", precision="fp32") == ['unknown parallel.precision = "fp32" has no known peak']


@pytest.mark.parametrize(
    "arguments, said", [(["--dry-run", "--device", "h1000"], "--device h1000"), (["--device", "h100"], "--dry-run")]
)
def test_a_device_that_is_not_known_is_refused(arguments, said, tmp_path, capsys):
    preset = tmp_path / "small.toml"
    preset.write_text(SMALL + '[schedule]\nhorizon = "1K"\n')
    assert main([str(preset), *arguments]) == BAD_INPUT
    assert said in capsys.readouterr().err


def test_shards_shrink_with_the_world():
    def parameters(world_size):
        lines = report(config_of(), world_size).splitlines()
        (line,) = [line for line in lines if line.startswith("parameters") and "fp32 shards" in line]
        return float(line.split()[1])

    assert parameters(1) / parameters(4) == pytest.approx(4, rel=0.05)


def run_json(**changes) -> dict:
    config = config_of(**changes)
    contents = identity(
        config,
        sources=[SourceIdentity("absent/train", "f00d", 20_000_000, weight=1.0)],
        evaluation_sets=[SourceIdentity("absent/held", "beef", 1_000_000, name="held")],
        order_fingerprint="0123",
        tokenizer_fingerprint="4567",
    )
    layout = Layout(world_size=4, data_replicate=1, data_shard=2, tensor=2)
    return with_segment(contents, 0, config, layout, start_tokens=0, device="cpu", precision="fp32")


def test_run_json_has_what_a_scaling_study_asks_of_a_run():
    """The columns of a run table; D, the losses and the status come from the rows."""
    contents = run_json()
    (segment,) = contents["segments"]
    counts = count(config_of().model)
    columns = {
        "run_id": contents["id"],
        "seed": contents["seed"],
        "N_total": segment["counts"]["total"],
        "N_nonemb": segment["counts"]["non_embedding"],
        "N_active": segment["counts"]["active"],
        "D_unique": sum(each["tokens"] for each in contents["data"]["sources"]),
        "seq_len": segment["seq_len"],
        "batch_tokens": segment["batch_tokens"],
        "peak_lr": contents["schedule"]["peak_lr"],
        "final_lr": contents["schedule"]["final_lr"],
        "schedule": contents["schedule"]["kind"],
        "warmup_tokens": contents["schedule"]["warmup_tokens"],
        "wd": contents["optimizer"]["weight_decay"],
        "optimizer": contents["optimizer"]["name"],
        "betas": contents["optimizer"]["betas"],
        "flops_per_token": segment["flops_per_token"],
        "P": segment["streams"],
        "r": segment["recurrences"],
        "dtype": segment["precision"],
        "tokenizer": contents["tokenizer"]["fingerprint"],
        "data_mix": contents["data"]["fingerprint"],
    }
    assert all(value is not None for value in columns.values())
    assert columns["N_total"] == counts.total and columns["N_nonemb"] == counts.non_embedding
    assert columns["batch_tokens"] == 128 * 128 and columns["final_lr"] == pytest.approx(2e-4)
    assert columns["P"] == columns["r"] == 1
    assert {"python", "torch", "numpy", "meristem"} <= contents["versions"].keys()
    assert "parent" not in contents and "peak" not in segment


def test_run_json_tells_streams_and_how_often_a_block_is_used():
    tied = {"num_layers": 6, "tying": {"plan": "middle_cycle", "loops": 2}, "streams": {"count": 4}}
    (segment,) = run_json(model=tied)["segments"]
    assert (segment["streams"], segment["recurrences"]) == (4, 2)


def test_a_resume_keeps_the_identity_and_notes_the_new_mesh():
    first = run_json()
    config = config_of()
    again = identity(config, sources=[], previous=first)
    assert (again["id"], again["created"]) == (first["id"], first["created"])
    layout = Layout(world_size=1, data_replicate=1, data_shard=1, tensor=1)
    again = with_segment(again, 0, config, layout, start_tokens=0, device="cpu", precision="fp32")
    again = with_segment(again, 1, config, layout, start_tokens=500, device="cpu", precision="fp32")
    assert [each["index"] for each in again["segments"]] == [0, 1]
    assert again["segments"][0]["mesh"]["world_size"] == 1


def test_the_git_revision_is_that_of_this_source_or_absent():
    revision = git_revision()
    assert revision is None or (len(revision["revision"]) >= 40 and isinstance(revision["changed"], bool))


@pytest.mark.skipif(shutil.which("git") is None, reason="no git")
def test_asking_for_the_revision_leaves_the_repository_alone(tmp_path, monkeypatch):
    """A status that renews git's index holds its lock, and a commit beside it fails."""
    root = tmp_path / "repository"
    source = root / "runtime" / "observe" / "identity.py"
    source.parent.mkdir(parents=True)
    source.write_text("")
    author = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
    for command in (("init",), ("add", "."), (*author, "commit", "-m", "first")):
        subprocess.run(("git", *command), cwd=root, check=True, capture_output=True)
    os.utime(source, (0, 0))  # as unchanged, but the index does not know it
    before = (root / ".git" / "index").read_bytes()
    monkeypatch.setattr("runtime.observe.identity.__file__", str(source))
    revision = git_revision()
    assert revision is not None and not revision["changed"]
    assert (root / ".git" / "index").read_bytes() == before
