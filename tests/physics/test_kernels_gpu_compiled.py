"""The GPU kernels as machine code for sm_80 and sm_90, compiled without a GPU from the very launches the calls make."""

import re
import subprocess
from collections import Counter
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import pytest
import torch

triton = pytest.importorskip("triton", reason="needs Triton, which exists for Linux")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource, CompiledKernel  # noqa: E402

from spire_dist.physics import kernels_gpu  # noqa: E402

CAPABILITIES = (80, 90)
BOXES = (64, 128, 100, 50)
"""Rows of whole sectors, of quads (100) and of neither (50); one tile of the dense sum, small or large."""


@cache
def compiled(capability: int, box: int) -> dict[str, CompiledKernel]:
    """The four kernels as launched for images of a box on a GPU of a compute capability, by name."""
    kernels: dict[str, CompiledKernel] = {}

    def compile_launch(kernel, *arguments, grid, warmup, num_warps, num_stages=3, **constants):
        """In place of a launch. Tells the compiler what a launch tells it of the arguments: types, multiples of 16, ones."""
        signature, facts = {}, {}
        for i, (name, value) in enumerate(zip(kernel.arg_names, arguments, strict=False)):
            if isinstance(value, torch.Tensor):
                signature[name] = {torch.float32: "*fp32", torch.float16: "*fp16"}[value.dtype]
                number = value.data_ptr()
            else:
                signature[name] = "fp32" if isinstance(value, float) else "i32"
                number = value
            if number == 1:
                constants[name] = number
            elif number % 16 == 0:
                facts[(i,)] = [["tt.divisibility", 16]]
        signature |= dict.fromkeys(constants, "constexpr")
        source = ASTSource(kernel, signature, constexprs=constants, attrs=facts)
        options = {"num_warps": num_warps, "num_stages": num_stages}
        kernels[kernel.__name__] = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)

    pose = torch.zeros(2, 3, 3), torch.zeros(2, 2)
    arrays = torch.zeros(2, 100, 3), torch.zeros(1, 100), torch.ones(100), *pose
    upstream = torch.zeros(2, box, box)
    with (
        TemporaryDirectory() as folder,
        patch.dict("os.environ", TRITON_CACHE_DIR=folder),
        patch.object(triton.runtime.jit.JITFunction, "run", compile_launch),
        patch.object(torch.Tensor, "is_cuda", True),
        patch.object(torch.cuda, "get_device_capability", lambda device: divmod(capability, 10)),
        patch.object(torch.cuda, "device_of", lambda tensor: patch.dict("os.environ")),
    ):
        kernels_gpu.splat_forward(*arrays, box, 1.5, 4.0)
        kernels_gpu.splat_backward(*arrays, 1.5, 4.0, upstream)
        kernels_gpu.dense_forward(*arrays, box, 1.5)
        kernels_gpu.dense_backward(*arrays, 1.5, upstream)
    return kernels


def instructions(kernel: CompiledKernel) -> Counter[str]:
    """How often each instruction stands in the machine code, padding left out."""
    found = re.findall(r"\t(?:@!?U?P\w+ )?([A-Z][\w.]*)", kernel.asm["sass"])
    return Counter(name for name in found if name != "NOP")


def resources(kernel: CompiledKernel) -> dict[str, int]:
    """Registers, stack, ... of one thread, as the CUDA tools report them."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(kernel.asm["cubin"])
        tool = triton.knobs.nvidia.cuobjdump.path
        text = subprocess.run([tool, "--dump-resource-usage", file], capture_output=True, text=True, check=True).stdout
    return {name: int(number) for name, number in re.findall(r"(\w+):(\d+)", text)}


@pytest.mark.parametrize("box", BOXES)
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_no_kernel_spills_registers(capability: int, box: int):
    for name, kernel in compiled(capability, box).items():
        used, code = resources(kernel), instructions(kernel)
        spills = sum(code[i] for i in code if i.startswith(("STL", "LDL")))
        print(
            f"sm_{capability} {box} px {name}: {used['REG']} registers, {spills} spills, {sum(code.values())} instructions"
        )
        assert code["EXIT"] > 0
        assert (used["STACK"], used["LOCAL"], spills) == (0, 0, 0)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_only_the_forward_splat_adds_atomically_and_without_waiting_for_the_sum(capability: int):
    for name, kernel in compiled(capability, 64).items():
        code = instructions(kernel)
        assert not [i for i in code if i.startswith("ATOM")]
        assert any(i.startswith("RED.") or i.startswith("REDG.") for i in code) == (name == "_splat_forward")


@pytest.mark.parametrize("box", [64, 100])
def test_four_pixels_are_added_and_loaded_at_once(box: int):
    kernels = compiled(90, box)
    added = [i for i in instructions(kernels["_splat_forward"]) if i.startswith(("RED.", "REDG."))]
    assert [i.split(".")[:4] for i in added] == [["REDG", "E", "ADD", "F32x4"]]
    assert instructions(kernels["_splat_backward"])["LDG.E.128"] > 0


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_dense_sums_use_tensor_cores(capability: int):
    for name in ("_dense_forward", "_dense_backward"):
        code = instructions(compiled(capability, 128)[name])
        assert any(i.startswith({80: "HMMA", 90: "HGMMA"}[capability]) for i in code)
