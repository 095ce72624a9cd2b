"""Where pictures and captions come from: one file per kind of source, `opening` tells them apart."""

from lora_kit.data.sources.opening import count_records, open_records

__all__ = ["count_records", "open_records"]
