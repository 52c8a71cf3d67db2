"""Builds the compiled CPU kernels, `unmask.kernels._cpu`; everything else is in pyproject.toml.

UNMASK_CPU=auto  (default) build them; where no compiler works, say so and install without
UNMASK_CPU=1     fail when they cannot be built
UNMASK_CPU=0     leave them out
"""

import os
import platform
import sys
from glob import glob

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup

WANT = os.environ.get("UNMASK_CPU", "auto")
if WANT not in ("0", "1", "auto"):
    sys.exit(f"UNMASK_CPU must be 0, 1 or auto, got {WANT!r}")

# The kernels are compiled once per instruction set and chosen at run time; csrc/cpu/isa.cpp lists the same names.
AVX2 = ["-mavx2", "-mfma"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
ISAS = {"portable": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    ISAS |= {"avx2": AVX2, "avx512": AVX512, "avx512_bf16": [*AVX512, "-mavx512bf16"]}
KERNELS = [f"csrc/cpu/{operator}.cpp" for operator in ("divergence", "expected_embedding", "sample_head")]
FLAGS = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd"]


class BuildKernels(build_ext):
    """Compiles KERNELS once per instruction set; turns a failure into a notice unless the kernels were demanded."""

    def build_extension(self, ext):
        try:
            for isa, flags in ISAS.items():
                ext.extra_objects += self.compiler.compile(
                    KERNELS,
                    output_dir=os.path.join(self.build_temp, isa),
                    macros=[("UNMASK_ISA", isa)],
                    extra_postargs=[*FLAGS, "-std=c++17", "-fvisibility=hidden", *flags],
                    depends=ext.depends,
                )
            super().build_extension(ext)
        except Exception as error:
            if WANT == "1":
                raise
            self.warn(f"installing without the compiled CPU kernels (UNMASK_CPU=1 makes this an error): {error}")


def extension() -> Pybind11Extension:
    return Pybind11Extension(
        "unmask.kernels._cpu",
        sorted({"csrc/bind_cpu.cpp", *glob("csrc/cpu/*.cpp")} - set(KERNELS)),
        depends=[*KERNELS, *glob("csrc/**/*.h", recursive=True)],
        extra_compile_args=FLAGS,
        libraries=["dl"] if sys.platform.startswith("linux") else [],
        cxx_std=17,
        optional=WANT != "1",
    )


setup(ext_modules=[] if WANT == "0" else [extension()], cmdclass={"build_ext": BuildKernels})
