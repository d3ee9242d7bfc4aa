"""Run the PTX that Triton compiles for NVIDIA GPUs on a CPU, instruction by instruction, over CPU tensors.

| file | what is there |
|---|---|
| `parser.py` | the text of a kernel as parameters, labels and instructions |
| `program.py` | instructions with numbered registers, as the interpreter takes them |
| `interpreter.py` | compiles the interpreter at its first use, and calls it |
| `descriptors.py` | descriptors of tensors, as the interpreter takes them |
| `calls.py`, `faults.py` | the calls that are interpreted, and faults to plant into their kernels |
| `check.py` | the program that does it for a GPU, in a process in which Triton compiles |
| `launcher.py` | a launch of fastlm.kernels: compiled ahead of time, its parameters laid out, interpreted |

The interpreter, in C++, is in `interpreter/`:

| file | what is there |
|---|---|
| `lanes.h`, `program.*` | registers and types; the names of instructions, decoded into handlers, types and modifiers |
| `memory.*`, `races.*` | bounds, alignment, and whose an element is; vector clocks over shared and tensor memory |
| `warp.*`, `block.*`, `run.cpp` | lanes that diverge; warps that take turns; the blocks of a grid |
| `arithmetic.cpp`, `conversions.cpp`, `moves.cpp`, `exchanges.cpp`, `control.cpp` | the handlers of plain instructions |
| `matrices.cpp`, `warp_groups.cpp`, `matrix_tiles.*` | mma and ldmatrix; wgmma; the fragments of both |
| `tensor_memory.*`, `tensor_core.*`, `shared_operands.h` | tcgen05: its memory, its products, and their descriptors |
| `copies.cpp`, `tensor_copies.*`, `mbarriers.*` | cp.async; copies by descriptors; when they and products are complete |

The interpreter runs the warps of a block in turns of random length. It knows bounds and alignment, barriers, matrix products
and asynchronous copies, which land as early or as late as they may. It finds races: in shared and tensor memory by vector
clocks, in global memory where a block touches what another one stored. So a missing barrier, wait or fence, an access out of
bounds and a wrong layout show, as a `Fault` or as a wrong number. It knows nothing of speed, nor how approximations round, nor
of what ptxas does. It asks for no fence between a warp's read and a copy that overwrites it.
"""
