"""How fast a device computes and reads, and how much it holds: published figures, or measured on this CPU."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

GB = 1e9
CUDA_CONTEXT = 0.6 * GB  # bytes that the driver and the libraries take on a card before any tensor is there
HOST_SECONDS = 10e-6  # that Python takes to launch one operation, as measured on x86 cores with tiny tensors


@dataclass(frozen=True)
class Device:
    """Rates in operations and bytes a second; `utilisation` is the share of the peak that large products reach."""

    name: str
    float32: float  # multiply-adds count two
    bfloat16: float
    bandwidth: float  # of the memory
    memory: float  # bytes
    source: str
    utilisation: float = 0.45
    link: float = 0.0  # bytes a second to the other devices of the machine, one way
    reserved: float = CUDA_CONTEXT  # bytes that are taken before the model
    host_seconds: float = HOST_SECONDS
    overlaps: bool = True  # the host launches the next operation while the device computes
    measured: bool = False
    slowness: float = 1.0  # by how much a small model's step takes longer than these rates say, where it was tried
    thin: tuple[float, float] | None = None  # bytes a second at which thin products read float32 and bfloat16 weights

    @property
    def whole_memory(self) -> float:
        """What the device has, in bytes, less a twentieth, which allocators lose to gaps."""
        return 0.95 * self.memory

    def seconds_of(self, flops: float, moved: float, *, narrow: bool) -> float:
        """The time of one operation by the roofline: as long as its products take, or its bytes, whichever is more."""
        if not flops:
            return self.slowness * moved / self.bandwidth
        rate = self.utilisation * (self.bfloat16 if narrow else self.float32)
        reading = self.thin[narrow] if self.thin else self.bandwidth
        return self.slowness * max(flops / rate, moved / reading)


NVIDIA = "https://www.nvidia.com/en-us/data-center"
# Dense rates without sparsity; float32 is that of the plain units, since torch leaves TF32 off.
DEVICES: Mapping[str, Device] = {
    device.name: device
    for device in (
        Device("h200", 67e12, 989e12, 4.8e12, 141 * GB, f"{NVIDIA}/h200/", link=450 * GB),
        Device("h100", 67e12, 989e12, 3.35e12, 80 * GB, f"{NVIDIA}/h100/", link=450 * GB),
        Device("a100-80gb", 19.5e12, 312e12, 2.039e12, 80 * GB, f"{NVIDIA}/a100/", link=300 * GB),
        Device("a100-40gb", 19.5e12, 312e12, 1.555e12, 40 * GB, f"{NVIDIA}/a100/", link=300 * GB),
        Device("l40s", 91.6e12, 362e12, 0.864e12, 48 * GB, f"{NVIDIA}/l40s/", link=32 * GB),
        Device(
            "rtx-4090",
            82.6e12,
            165e12,
            1.008e12,
            24 * GB,
            "https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf",
            link=32 * GB,
        ),
    )
}
CPU = "cpu"


def measured_cpu() -> Device:
    """This CPU with the threads that torch uses: short products, a pass over memory, and small operations, timed."""
    import torch

    def product(dtype: torch.dtype) -> float:
        x, w = torch.randn(512, 1024, dtype=dtype), torch.randn(1024, 1024, dtype=dtype)
        return 2 * 512 * 1024 * 1024 / seconds_of_call(lambda: x @ w.T)

    def thin(dtype: torch.dtype) -> float:
        x, w = torch.randn(8, 1024, dtype=dtype), torch.randn(4096, 1024, dtype=dtype)
        return w.numel() * w.element_size() / seconds_of_call(lambda: x @ w.T)

    def traffic() -> float:
        x = torch.randn(1 << 22)
        return 2 * x.numel() * x.element_size() / seconds_of_call(lambda: x * 1.5)

    with torch.no_grad():
        small = torch.randn(8)
        operation = seconds_of_call(lambda: [torch.nn.functional.silu(small) for _ in range(100)]) / 100
        wide, narrow, moved = product(torch.float32), product(torch.bfloat16), traffic()
        reading = thin(torch.float32), thin(torch.bfloat16)
    return Device(
        CPU,
        wide,
        narrow,
        moved,
        os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        f"measured now, with {torch.get_num_threads()} threads",
        utilisation=1.0,
        reserved=_resident(),
        host_seconds=3 * operation,  # with the Python of a model's own code around it
        overlaps=False,
        measured=True,
        thin=reading,
    )


def seconds_of_call(work: Callable[[], object], tries: int = 7) -> float:
    """The median time of a few calls: by the clock, or by the processor where others took turns on it."""
    found = []
    work()
    for _ in range(tries):
        start, used = time.perf_counter(), time.process_time()
        work()
        found.append(min(time.perf_counter() - start, time.process_time() - used))
    return sorted(found)[tries // 2]


def _resident() -> float:
    """What this process holds: Python, torch and transformers, which a run loads too."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return float(pages * os.sysconf("SC_PAGE_SIZE"))
    except OSError:
        return 0.8 * GB
