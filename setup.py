"""Builds the compiled kernels, `unmask.kernels._cpu` and `unmask.kernels._cuda`; the rest is in pyproject.toml.

UNMASK_CPU=auto   (default) build them; where no compiler works, say so and install without
UNMASK_CPU=1      fail when they cannot be built
UNMASK_CPU=0      leave them out
UNMASK_CUDA=…     likewise for the CUDA kernels; auto builds them where there is nvcc, in CUDA_HOME or on the PATH
"""

import os
import platform
import shutil
import subprocess
import sys
from glob import glob

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup


def choice(name: str) -> str:
    value = os.environ.get(name, "auto")
    if value not in ("0", "1", "auto"):
        sys.exit(f"{name} must be 0, 1 or auto, got {value!r}")
    return value


CPU, CUDA = choice("UNMASK_CPU"), choice("UNMASK_CUDA")
HEADERS = [*glob("csrc/**/*.h", recursive=True), *glob("csrc/**/*.cuh", recursive=True)]

# The CPU kernels are compiled once per instruction set and chosen at run time; csrc/cpu/isa.cpp lists the same names.
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
ISAS = {"portable": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    ISAS |= {"avx2": AVX2, "avx512": AVX512, "avx512_bf16": [*AVX512, "-mavx512bf16"]}
CPU_OPERATORS = "add_norm", "attention", "divergence", "expected_embedding", "sample_head", "swiglu"
CPU_KERNELS = [f"csrc/cpu/{operator}.cpp" for operator in CPU_OPERATORS]
CPU_FLAGS = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd"]

# Machine code for Ampere and Hopper; whatever comes later translates the last one's PTX.
CUDA_KERNELS = sorted(glob("csrc/cuda/*.cu"))
CUDA_TARGETS = ["arch=compute_80,code=sm_80", "arch=compute_90a,code=sm_90a", "arch=compute_90,code=compute_90"]


def nvcc() -> str | None:
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    folders = os.pathsep.join(os.path.join(home, "bin") for home in homes)
    return shutil.which("nvcc", path=folders) or shutil.which("nvcc")


class BuildKernels(build_ext):
    """Compiles the kernels as their compilers want them; turns a failure into a notice unless they were demanded."""

    def build_extension(self, ext):
        name, want = ("CUDA", CUDA) if ext.name.endswith("_cuda") else ("CPU", CPU)
        try:
            if name == "CUDA":
                self.compile_cuda(ext)
            else:
                self.compile_cpu(ext)
            super().build_extension(ext)
        except Exception as error:
            if want == "1":
                raise
            self.warn(f"installing without the compiled {name} kernels (UNMASK_{name}=1 makes this an error): {error}")

    def compile_cpu(self, ext):
        for isa, flags in ISAS.items():
            ext.extra_objects += self.compiler.compile(
                CPU_KERNELS,
                output_dir=os.path.join(self.build_temp, isa),
                macros=[("UNMASK_ISA", isa)],
                extra_postargs=[*CPU_FLAGS, "-std=c++17", "-fvisibility=hidden", *flags],
                depends=ext.depends,
            )

    def compile_cuda(self, ext):
        """The objects, linked by nvcc with its static runtime into one that needs nothing but libdl and threads."""
        compiler = nvcc()
        if compiler is None:
            raise FileNotFoundError("nvcc must be in CUDA_HOME/bin or on the PATH")
        os.makedirs(self.build_temp, exist_ok=True)
        for source in CUDA_KERNELS:
            built = os.path.join(self.build_temp, os.path.basename(source) + ".o")
            targets = [f"-gencode={target}" for target in CUDA_TARGETS]
            flags = ["-std=c++17", "-O3", "--threads=2", "-diag-suppress=1675", "-Xcompiler=-fPIC,-fvisibility=hidden"]
            subprocess.run([compiler, *flags, *targets, "-c", source, "-o", built], check=True)
            ext.extra_objects.append(built)
        ext.extra_link_args += [cuda_runtime(compiler), "-lrt", "-lpthread", "-ldl"]


def cuda_runtime(compiler: str) -> str:
    """The static runtime of the toolkit, from the folders that this nvcc would link with."""
    command = [compiler, "--dryrun", "-x", "cu", os.devnull, "-o", os.devnull]
    plan = subprocess.run(command, capture_output=True, text=True)
    folders = [word.strip('"')[2:] for word in plan.stderr.split() if word.strip('"').startswith("-L")]
    for folder in folders:
        path = os.path.join(folder, "libcudart_static.a")
        if os.path.exists(path):
            return path
    raise FileNotFoundError(f"{compiler} must come with libcudart_static.a, looked in {folders}")


def extensions() -> list[Pybind11Extension]:
    found = []
    if CPU != "0":
        found.append(
            Pybind11Extension(
                "unmask.kernels._cpu",
                sorted({"csrc/bind_cpu.cpp", *glob("csrc/cpu/*.cpp")} - set(CPU_KERNELS)),
                depends=[*CPU_KERNELS, *HEADERS],
                extra_compile_args=CPU_FLAGS,
                libraries=["dl"] if sys.platform.startswith("linux") else [],
                cxx_std=17,
                optional=CPU != "1",
            )
        )
    if CUDA == "1" or (CUDA == "auto" and nvcc()):
        found.append(
            Pybind11Extension(
                "unmask.kernels._cuda",
                ["csrc/bind_cuda.cpp"],
                depends=[*CUDA_KERNELS, *HEADERS],
                cxx_std=17,
                optional=CUDA != "1",
            )
        )
    return found


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildKernels})
