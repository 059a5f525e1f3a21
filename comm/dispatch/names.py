"""The names that users give. No torch."""

from __future__ import annotations

from typing import Literal

DispatcherName = Literal["auto", "flat", "dedup", "two_hop", "deep_ep"]
PayloadName = Literal["exact", "bf16", "fp8", "logfmt8", "logfmt10"]
