"""Quantized linear layers on PyTorch's own integer and fp8 kernels: the numbers of `compress.quantization`, for real.

The kernels are those under torchao's `quantize_`. torchao itself isn't used: it scales by the largest value / 127.5
where training scaled by the largest / 127, and quantizes the weight a second time, so that what is trained would not be
what is deployed; compiled for a CPU, it computes the int8 product in floats.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paretune.objectives.runtimes.torch_program import Numerics, unpack_pairs

_FP8_MAX = torch.finfo(torch.float8_e4m3fn).max

_CUDA_ROWS = 32
"""cuBLAS wants more than 16 rows for an int8 product; fewer are padded to this many."""


class SparseLinear(nn.Module):
    """A linear layer that leaves out the zeros of a weight with two of them among every four inputs (cuSPARSELt).

    Args:
        weight: (outputs, inputs), float16, bfloat16 or int8; see `has_two_zeros_of_four`.
        bias: Of each output, in the weight's format, or None; None for int8.
        device: A GPU from Ampere on.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None, device: torch.device) -> None:
        super().__init__()
        self._outputs = len(weight)
        self._integer = weight.dtype == torch.int8
        # What PyTorch's own class for such weights knows of the kernels' shapes.
        tile, self._rows = (32, 16) if self._integer else (16, 8)
        padded = _pad(weight, tile, tile)
        self._inputs = padded.shape[1]
        self.register_buffer("weight", torch._cslt_compress(padded.to(device)))
        self.register_buffer("bias", None if bias is None else F.pad(bias, (0, len(padded) - len(bias))).to(device))

    def forward(self, x: Tensor) -> Tensor:
        """The product; int32 for int8."""
        rows = x.reshape(-1, x.shape[-1])
        padding = (0, self._inputs - rows.shape[1], 0, -len(rows) % self._rows)
        dense = (F.pad(rows, padding) if any(padding) else rows).contiguous().t()
        if self._integer:  # PyTorch's own tests ask for int32 in this way alone
            product = torch._cslt_sparse_mm(self.weight, dense, out_dtype=torch.int32).t()
        else:
            product = torch._cslt_sparse_mm(self.weight, dense, bias=self.bias, transpose_result=True)
        return product[: len(rows), : self._outputs].reshape(*x.shape[:-1], self._outputs)


def has_two_zeros_of_four(weight: Tensor) -> bool:
    """Whether at least two weights of every four neighbouring inputs are zero.

    A last block with fewer inputs counts as filled up with zeros, as `SparseLinear` does.

    Args:
        weight: (outputs, inputs).
    """
    blocks = F.pad(weight, (0, -weight.shape[1] % 4)).reshape(-1, 4)
    return bool((blocks.count_nonzero(dim=1) <= 2).all())


class QuantizedLinear(nn.Module):
    """A linear layer whose product runs in few bits; takes floats of any format and gives that format back.

    Args:
        outputs: Without those that the kernel's shapes need beyond them.
        bias: Of each output, float32, or None.
    """

    bias: Tensor | None

    def __init__(self, outputs: int, bias: Tensor | None) -> None:
        super().__init__()
        self._outputs = outputs
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        product = self._multiply(x.reshape(-1, x.shape[-1])).float()[:, : self._outputs]
        product = product if self.bias is None else product + self.bias
        return product.to(x.dtype).reshape(*x.shape[:-1], self._outputs)

    @abstractmethod
    def _multiply(self, rows: Tensor) -> Tensor:
        """The product, (rows, at least outputs), for `rows` of shape (rows, inputs)."""


class Int8Linear(QuantizedLinear):
    """int8 times int8, accumulated in int32; each row of the input gets a scale of its own (`torch._int_mm`).

    Args:
        weight: (outputs, inputs), int8.
        scale: Of each output, float32.
        bias: Of each output, float32, or None.
        device: Where it will run.
        sparse: Run on the kernels of `SparseLinear` if the weight is for them.
    """

    weight: Tensor
    scale: Tensor

    def __init__(
        self, weight: Tensor, scale: Tensor, bias: Tensor | None, device: torch.device, *, sparse: bool = False
    ) -> None:
        super().__init__(len(weight), bias)
        self._on_cuda = device.type == "cuda"
        self._sparse: SparseLinear | None = None
        if sparse and has_two_zeros_of_four(weight):
            self._sparse = SparseLinear(weight, None, device)
            self.register_buffer("scale", scale.flatten())
            return
        padded = _pad(weight, 8, 8) if self._on_cuda else weight
        self.register_buffer("weight", padded)
        self.register_buffer("scale", F.pad(scale.flatten(), (0, len(padded) - len(weight))))

    def _multiply(self, rows: Tensor) -> Tensor:
        rows = rows.float()
        scale = (rows.abs().amax(dim=1, keepdim=True) / 127).clamp_min(1e-8)
        levels = (rows * scale.reciprocal()).round().clamp(-128, 127).to(torch.int8)
        if self._sparse is not None:
            product: Tensor = self._sparse(levels)
        elif self._on_cuda:
            wider, longer = self.weight.shape[1] - rows.shape[1], max(0, _CUDA_ROWS - len(rows))
            product = torch._int_mm(F.pad(levels, (0, wider, 0, longer)), self.weight.t())[: len(rows)]
        else:
            product = torch._int_mm(levels, self.weight.t())
        return product.float() * scale * self.scale


class Fp8Linear(QuantizedLinear):
    """e4m3 times e4m3 with a scale for each row of the input and each output (`torch._scaled_mm`); bfloat16 comes out.

    Args:
        weight: (outputs, inputs), float8_e4m3fn.
        scale: Of each output, float32.
        bias: Of each output, float32, or None.
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        super().__init__(len(weight), bias)
        # Padded as bytes: few operations know the type itself.
        padded = _pad(weight.view(torch.uint8), 16, 16)
        self.register_buffer("weight", padded.view(torch.float8_e4m3fn))
        self.register_buffer("scale", F.pad(scale.flatten(), (0, len(padded) - len(weight)), value=1.0).reshape(1, -1))

    def _multiply(self, rows: Tensor) -> Tensor:
        rows = rows.float()
        scale = (rows.abs().amax(dim=1, keepdim=True) / _FP8_MAX).clamp_min(1e-8)
        numbers = (rows / scale).clamp(-_FP8_MAX, _FP8_MAX)
        numbers = F.pad(numbers, (0, self.weight.shape[1] - rows.shape[1])).to(torch.float8_e4m3fn)
        # Scales by row are offered with a bfloat16 result alone.
        return torch._scaled_mm(numbers, self.weight.t(), scale_a=scale, scale_b=self.scale, out_dtype=torch.bfloat16)


class Int4Linear(QuantizedLinear):
    """bfloat16 times int4 with a bfloat16 scale for each block of inputs (`torch._weight_int4pack_mm`).

    The kernel's grid is affine: (level - 8) * scale + zero. With zeros of 0 it is the symmetric one that was trained.

    Args:
        weight: Two weights a byte, as `torch_program.pack_pairs` packs them; (outputs, inputs / 2), uint8.
        scale: (outputs, inputs / block), float32.
        zero: Likewise, the level that stands for 0.
        bias: Of each output, float32, or None.
        block: Inputs that share a scale: 32, 64, 128 or 256.
        device: Where it will run: the packing depends on it.
    """

    weight: Tensor
    scale: Tensor

    def __init__(
        self, weight: Tensor, scale: Tensor, zero: Tensor, bias: Tensor | None, block: int, device: torch.device
    ) -> None:
        super().__init__(len(weight), bias)
        self._block = block
        self._on_cuda = device.type == "cuda"
        padded = _pad(weight, 8 if self._on_cuda else 16, 1)
        if self._on_cuda:
            # The most tiles of 16 inputs that are loaded at once, of those that the kernel knows.
            tiles = next(tiles for tiles in (8, 4, 2) if 2 * weight.shape[1] % (16 * tiles) == 0)
            packed = torch._convert_weight_to_int4pack(padded.to(device), tiles)
        else:
            packed = torch._convert_weight_to_int4pack_for_cpu(unpack_pairs(padded), 1)
        pairs = torch.stack([scale, (8 - zero) * scale], dim=-1).transpose(0, 1)
        pairs = F.pad(pairs, (0, 0, 0, len(padded) - len(weight))).to(torch.bfloat16)
        self.register_buffer("weight", packed)
        self.register_buffer("scale", pairs.contiguous())

    def _multiply(self, rows: Tensor) -> Tensor:
        rows = rows.to(torch.bfloat16).contiguous()
        if self._on_cuda:
            return torch._weight_int4pack_mm(rows, self.weight, self._block, self.scale)
        return torch._weight_int4pack_mm_for_cpu(rows, self.weight, self._block, self.scale)


def quantized_linear(
    name: str, numerics: Numerics, tensors: Mapping[str, Tensor], device: torch.device, *, sparse: bool = False
) -> nn.Module:
    """The layer `name` of a model file, on its kernel.

    Args:
        name: Module name.
        numerics: How its weight is stored.
        tensors: The file's.
        device: Where it will run.
        sparse: Whether int8 weights with two zeros of four run on kernels for that.
    """
    weight, scale, bias = tensors[f"{name}.weight"], tensors[f"{name}.scale"], tensors.get(f"{name}.bias")
    made: nn.Module
    if numerics.block:
        zero = tensors.get(f"{name}.zero", torch.tensor(8))
        made = Int4Linear(weight, scale, zero.float(), bias, numerics.block, device)
    elif numerics.number == "fp8":
        made = Fp8Linear(weight, scale, bias)
    else:
        made = Int8Linear(weight, scale, bias, device, sparse=sparse)
    return made.to(device)


def _pad(weight: Tensor, rows: int, columns: int) -> Tensor:
    """Zeros at the end, up to multiples of what a kernel takes."""
    return F.pad(weight, (0, -weight.shape[1] % columns, 0, -len(weight) % rows)).contiguous()
