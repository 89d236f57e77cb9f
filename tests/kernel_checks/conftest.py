"""Triton's interpreter cuts float32 down to bfloat16 where a GPU rounds to nearest even, so its errors would be twice those of any device. Here it rounds."""

import os

import torch


def round_to_bfloat16() -> None:
    import triton.language as tl
    from triton.runtime import interpreter

    cut = interpreter._convert_float

    def convert(values, given, wanted, mode):
        if given == tl.float32 and wanted == tl.bfloat16:
            return torch.from_numpy(values.copy()).to(torch.bfloat16).view(torch.int16).numpy().view("uint16")
        return cut(values, given, wanted, mode)

    interpreter._convert_float = convert


if os.environ.get("TRITON_INTERPRET") == "1":
    round_to_bfloat16()
