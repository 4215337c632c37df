"""safetensors files that depend on what is in them alone, and the modes of files that libraries write.

Written here rather than by the library: its metadata come out in another order each time, and its files are for their
owner alone whatever the umask says. Format: https://github.com/huggingface/safetensors#format
"""

import json
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DTYPE_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.complex64: "C64", torch.bool: "BOOL",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8",
}  # fmt: skip


def tensor_file_chunks(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file, a tensor at a time, so that one at a time is copied to the CPU; `metadata` in
    the order of its keys."""
    # Widest elements first keeps every tensor aligned to its own element size without holes.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    offset = 0
    for name in order:
        tensor = tensors[name]
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end],
        }  # fmt: skip
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in order:
        if tensors[name].numel():
            dense = tensors[name].to("cpu").resolve_conj().resolve_neg().contiguous()
            # Not reshape: a contiguous tensor of one element may keep any stride, which a view as bytes refuses.
            yield dense.as_strided((dense.numel(),), (1,)).view(torch.uint8).numpy().data


def write_tensor_file(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """A safetensors file at `path`, in place of what is there. Raises OSError, as for a full disk."""
    with path.open("wb") as file:
        for chunk in tensor_file_chunks(tensors, metadata):
            file.write(chunk)


def share_files(folder: Path) -> None:
    """Gives the weight files in and below `folder` the mode that the umask gave the folder they lie in: safetensors
    writes them through temporary files, which their owner alone may read."""
    for path in folder.rglob("*.safetensors"):
        if path.is_file() and not path.is_symlink():
            path.chmod(stat.S_IMODE(path.parent.stat().st_mode) & 0o666)
