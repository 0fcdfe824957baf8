"""Peak arithmetic of known devices, and the machines they come in, each with the document it was read in."""

import re
from dataclasses import dataclass

_A100 = "NVIDIA A100 datasheet (1758950-r4), dense"
_H100 = "NVIDIA H100 Tensor Core GPU Architecture whitepaper, table 2, dense"
_H100_NVL = "NVIDIA H100 datasheet, half of the sparse figure"
_H200 = "NVIDIA H200 datasheet, half of the sparse figure"
_BLACKWELL = "NVIDIA Blackwell Architecture Technical Brief, dense"
_L40S = "NVIDIA L40S datasheet, dense"
_MI300X = "AMD Instinct MI300X data sheet, dense"

# (whole name as torch.cuda.get_device_name gives it, bf16, tf32, source); FLOP/s on tensor cores.
# Names are matched whole, so a MIG slice or an export variant is unknown rather than wrong.
_DEVICES = [
    (r"NVIDIA A100-(SXM4|PCIE|PCIe)-(40|80)GB|NVIDIA A100 80GB PCIe", 312e12, 156e12, _A100),
    (r"NVIDIA H100 80GB HBM3", 989.4e12, 494.7e12, _H100),
    (r"NVIDIA H100 PCIe", 756e12, 378e12, _H100),
    (r"NVIDIA H100 NVL", 835.5e12, 417.5e12, _H100_NVL),
    (r"NVIDIA H200", 989.5e12, 494.5e12, _H200),
    (r"NVIDIA H200 NVL", 835.5e12, 417.5e12, _H200),
    (r"NVIDIA B200", 2250e12, 1100e12, _BLACKWELL),
    (r"NVIDIA GB200", 2500e12, 1250e12, _BLACKWELL),
    (r"NVIDIA L40S", 362.05e12, 183e12, _L40S),
    (r"AMD Instinct MI300X.*", 1307.4e12, 653.7e12, _MI300X),
]


@dataclass(frozen=True)
class Peak:
    """Dense peak of one device at one precision."""

    flops: float
    """FLOP/s."""
    source: str


def peak(device_name: str, precision: str) -> Peak | None:
    """The peak of a device at `precision`, "bf16" or "tf32"; None for any other precision or device.

    MFU against a wrong peak is worse than none (an unknown GPU taken for an A100 was once seen at
    152 %), so nothing is guessed, and pure fp32 arithmetic, which leaves the tensor cores idle, has no
    peak here.
    """
    for pattern, bf16, tf32, source in _DEVICES:
        if re.fullmatch(pattern, device_name):
            flops = {"bf16": bf16, "tf32": tf32}.get(precision)
            return Peak(flops, source) if flops else None
    return None


@dataclass(frozen=True)
class Node:
    """A vendor's machine of several devices: its own figures, which nothing here has measured."""

    name: str
    device: str
    """As torch.cuda.get_device_name gives it."""
    devices: int
    memory: float
    """Bytes of a device, in the vendor's decimal GB; torch sees a few per cent more."""
    link: float
    """Bytes/s between two devices of the machine, in one direction: half of what NVLink is sold as."""
    network: float
    """Bytes/s of a device to other machines, in one direction: its own port of the fabric."""
    source: str


NODES = {
    "a100": Node(
        "DGX A100 80GB",
        "NVIDIA A100-SXM4-80GB",
        devices=8,
        memory=80e9,
        link=300e9,
        network=25e9,
        source="NVIDIA A100 datasheet (80 GB, NVLink 600 GB/s); DGX A100 datasheet (8 ports of 200 Gb/s)",
    ),
    "h100": Node(
        "DGX H100",
        "NVIDIA H100 80GB HBM3",
        devices=8,
        memory=80e9,
        link=450e9,
        network=50e9,
        source="NVIDIA H100 datasheet (80 GB, NVLink 900 GB/s); DGX H100 datasheet (8 ports of 400 Gb/s)",
    ),
    "h200": Node(
        "DGX H200",
        "NVIDIA H200",
        devices=8,
        memory=141e9,
        link=450e9,
        network=50e9,
        source="NVIDIA H200 datasheet (141 GB, NVLink 900 GB/s); DGX H200 datasheet (8 ports of 400 Gb/s)",
    ),
    "b200": Node(
        "DGX B200",
        "NVIDIA B200",
        devices=8,
        memory=180e9,
        link=900e9,
        network=50e9,
        source="NVIDIA DGX B200 datasheet (1,440 GB, NVLink 14.4 TB/s, 8 ports of 400 Gb/s)",
    ),
}
"""By the name that `--device` takes."""


def node_of(name: str) -> Node | None:
    """The machine of a device, by its short name or by torch's; None for one that is not known."""
    found = (node for short, node in NODES.items() if name.lower() == short or name == node.device)
    return next(found, None)
