"""Deliberate bugs, each of which some test must notice. Old texts occur exactly once in their files."""

from __future__ import annotations

from typing import NamedTuple


class Mutant(NamedTuple):
    """A bug: `old` becomes `new` in `file`, and one of the tests chosen by pytest's arguments `tests` must fail."""

    file: str
    old: str
    new: str
    tests: str

    @property
    def rebuilds(self) -> bool:
        """Whether the CPU's native module has to be compiled again."""
        return self.file.startswith("csrc/cpu/")

    @property
    def is_of_kernels(self) -> bool:
        """Whether its tests interpret or emulate kernels, or compile them."""
        return self.file.startswith(("csrc/", "kernels/"))


_CPU = "-k cpu"
_TRITON = "-k triton"

MUTANTS = {
    # Kernels compiled ahead of time
    "an unaligned tensor has the kernel of aligned ones": Mutant(
        "kernels/specialization.py",
        "ALIGNED * (address % 16 == 0)",
        "ALIGNED",
        "tests/kernels/test_cubins.py",
    ),
    "a parameter follows the one before without a gap": Mutant(
        "kernels/specialization.py",
        'struct.calcsize("@" + ',
        'struct.calcsize("=" + ',
        "tests/kernels/test_cubins.py",
    ),
    "kernels of other sources are launched": Mutant(
        "kernels/cubins.py",
        "if self.sources != hash_of_sources():\n            raise",
        "if False:\n            raise",
        "tests/kernels/test_cubins.py",
    ),
    # Which implementation runs on a GPU
    "times of a far shape decide": Mutant(
        "vpd_fast/ops/_choices.py",
        "if best is not None and best[0] <= NEAR",
        "if best is not None",
        "tests/ops/test_choices.py",
    ),
    "a table of another GPU decides": Mutant(
        "kernels/tables.py",
        "        if not table.fits(gpu):\n",
        "        if False:\n",
        "tests/kernels/test_tables.py",
    ),
    "the slowest implementation is asked first": Mutant(
        "kernels/tables.py",
        'times = sorted((_time(time), str(name)) for name, time in row["us"].items())',
        'times = sorted(((_time(time), str(name)) for name, time in row["us"].items()), reverse=True)',
        "tests/kernels/test_tables.py tests/ops/test_choices.py",
    ),
    "cuDNN rounds the sums of float32 results": Mutant(
        "kernels/_library.py",
        "    if out != dtype:",
        "    if False:",
        "tests/ops/test_gpu_decisions.py",
    ),
    # Triton kernels
    "triton zero point rounds down": Mutant(
        "kernels/_prologue.py",
        "tl.floor(tl.maximum(-low, 0.0) * inverse + 0.5)",
        "tl.floor(tl.maximum(-low, 0.0) * inverse)",
        f"tests/ops/test_linear.py {_TRITON}",
    ),
    "triton rounds half up": Mutant(
        "kernels/_prologue.py",
        "number = (number + 12582912.0) - 12582912.0",
        "number = tl.floor(number + 0.5)",
        f"tests/ops/test_linear.py tests/ops/test_linear_gpu_formats.py tests/ops/test_conv2d.py {_TRITON}",
    ),
    "triton variance counts columns beyond the row": Mutant(
        "kernels/_prologue.py",
        "difference = tl.where(in_row[None, :], a - mean[:, None], 0.0)",
        "difference = a - mean[:, None]",
        f"tests/ops/test_linear.py {_TRITON}",
    ),
    "triton shift moves the border": Mutant(
        "kernels/_prologue.py",
        "a = tl.where(in_image[:, None] & in_row[None, :], a, 0.0)",
        "a = tl.where(in_row[None, :], a, 0.0)",
        f"tests/ops/test_conv2d.py {_TRITON}",
    ),
    "triton merge of statistics forgets distances of means": Mutant(
        "kernels/group_norm_affine.py",
        "within + count * difference * difference",
        "within",
        f"tests/ops/test_group_norm_affine.py {_TRITON}",
    ),
    "triton merges squares about the first run": Mutant(
        "kernels/group_norm_affine.py",
        "share - off * off",
        "share",
        f"tests/ops/test_group_norm_affine.py {_TRITON}",
    ),
    "triton merges the first runs only": Mutant(
        "kernels/group_norm_affine.py",
        "RUNS if ONCE else tl.maximum(runs, runs2)",
        "RUNS",
        f"tests/ops/test_group_norm_affine.py {_TRITON}",
    ),
    "triton ranges forget the minimum of silu": Mutant(
        "kernels/group_norm_affine.py",
        "(most > SILU_ARGMIN)",
        "(most < SILU_ARGMIN)",
        f"tests/ops/test_group_norm_affine.py {_TRITON}",
    ),
    "triton argmax takes the last of equals": Mutant(
        "kernels/upsample_argmax.py",
        "better = (value > best) |",
        "better = (value >= best) |",
        "tests/ops/test_upsample_argmax.py tests/kernels/test_upsample_argmax.py",
    ),
    # CUDA kernels, emulated
    "cuda epilogue without the zero point": Mutant(
        "csrc/cuda/gemm_epilogue.cuh",
        "float(sum - row.zero * weight_sum)",
        "float(sum)",
        "tests/native/test_cuda_gemm.py -k sizes",
    ),
    "cuda relu drops NaN": Mutant(
        "csrc/cuda/gemm_epilogue.cuh",
        "return x < 0.0f ? 0.0f : x;",
        "return x > 0.0f ? x : 0.0f;",
        "tests/native/test_cuda_gemm.py -k not_finite",
    ),
    "cuda softmax counts padded tokens": Mutant(
        "csrc/cuda/cross_attention_maps.cuh",
        "lane % 4 * 2 + i % 2 >= tokens) x",
        "lane % 4 * 2 + i % 2 > tokens) x",
        "tests/native/test_cuda_emulation.py",
    ),
    "only the last padded tokens are masked, however many there are": Mutant(
        "csrc/cuda/cross_attention_maps_wgmma.cuh",
        "if (tokens > TOKENS - 16)",
        "if (tokens > BELOW)",
        "tests/native/test_cuda_maps_wgmma.py -k every_kernel",
    ),
    "rows of a head overwrite those of the head before": Mutant(
        "csrc/cuda/cross_attention_maps_wgmma.cuh",
        "if (lane == 0) store_wait();\n        sync_warp();",
        "sync_warp();",
        "tests/native/test_cuda_maps_wgmma.py -k 'heads or order'",
    ),
    "the second of two rows of a map is that of the first": Mutant(
        "csrc/cuda/attention_maps_output.cuh",
        "sums[(first + row) * pitch + column]",
        "sums[first * pitch + column]",
        "tests/native/test_cuda_maps_wgmma.py -k queries",
    ),
    "queries are given back when half of the warps have read them": Mutant(
        "csrc/cuda/cross_attention_maps_wgmma.cuh",
        "shared.queries.initialize(WARPGROUPS * WARPS_PER_GROUP)",
        "shared.queries.initialize(WARPGROUPS * WARPS_PER_GROUP / 2)",
        "tests/native/test_cuda_maps_wgmma.py -k 'heads or order'",
    ),
    "cuda output position with rows and columns swapped": Mutant(
        "csrc/cuda/gemm_epilogue.cuh",
        "at.image * p.out.image + at.y * p.out.row + at.x * p.out.column",
        "at.image * p.out.image + at.x * p.out.row + at.y * p.out.column",
        "tests/native/test_cuda_gemm.py -k 'sizes or geometry'",
    ),
    "tma box one row short": Mutant(
        "csrc/cuda/gemm_wgmma.cu",
        "stride << plan.log_y,",
        "(stride << plan.log_y) - 1,",
        "tests/native/test_cuda_gemm.py -k 'sizes or geometry'",
    ),
    "both blocks of a cluster send the same half of the weight": Mutant(
        "csrc/cuda/gemm_persistent.cuh",
        "tile.column + rank * SHARE",
        "tile.column",
        "tests/native/test_cuda_persistent.py -k matrix",
    ),
    "a stage is given back before the other block is done with it": Mutant(
        "csrc/cuda/gemm_persistent.cuh",
        "CLUSTER * Size::GROUPS * Size::WARPGROUP / WARP",
        "Size::GROUPS * Size::WARPGROUP / WARP",
        "tests/native/test_cuda_persistent.py -k 'matrix or orders'",
    ),
    "results leave shared memory while it is written": Mutant(
        "csrc/cuda/gemm_persistent.cuh",
        "if (i >= Size::BUFFERS) {",
        "if (i > Size::BUFFERS) {",
        "tests/native/test_cuda_persistent.py -k matrix",
    ),
    "only the first short run of stored rows has statistics": Mutant(
        "csrc/cuda/gemm_persistent.cuh",
        "exists && begin < STORED_ROWS;",
        "exists && begin < together;",
        "tests/native/test_cuda_persistent.py -k statistics",
    ),
    "statistics of a run forget how far its warps are apart": Mutant(
        "csrc/cuda/gemm_statistics.cuh",
        "part(warp, 2) + ROWS_PER_WARP * difference * difference",
        "part(warp, 2)",
        "tests/native/test_cuda_gemm.py -k statistics",
    ),
    # CPU kernels
    "cpu normalised tail keeps lanes beyond the row": Mutant(
        "csrc/cpu/row_prologue.h",
        "if (t.norm && left < LANES) {",
        "if (t.norm && left < 0) {",
        "tests/ops/test_linear.py -k 'cpu and far_from_zero'",
    ),
    "cpu range forgets numbers that are not finite": Mutant(
        "csrc/cpu/row_prologue.h",
        "(high - low) / 255.0f + reduce_sum(range.unusual)",
        "(high - low) / 255.0f",
        f"tests/ops/test_linear.py {_CPU}",
    ),
    "cpu argmax lets padded channels win": Mutant(
        "csrc/cpu/upsample_argmax.cpp",
        "to[s * channels + c] = -INFINITY;",
        "to[s * channels + c] = 0.0f;",
        f"tests/ops/test_upsample_argmax.py {_CPU}",
    ),
    "cpu argmax mixes infinities with weights of zero": Mutant(
        "csrc/cpu/upsample_argmax.cpp",
        "if (special) return argmax_of_row<0, true>;",
        "",
        f"tests/ops/test_upsample_argmax.py {_CPU}",
    ),
    # Operators' references and weights
    "statistics of the sample": Mutant(
        "vpd_fast/ops/statistics.py",
        "correction=0)",
        "correction=1)",
        "tests/ops/test_group_norm_affine.py -k 'known_statistics and reference'",
    ),
    "int8 weights truncate": Mutant(
        "vpd_fast/ops/packing.py", "weight.round_()", "weight.trunc_()", "tests/engine/test_optimize.py"
    ),
    "geglu runs of another length": Mutant(
        "vpd_fast/ops/packing.py",
        "torch.arange(n).split(PANEL // 2)",
        "torch.arange(n).split(PANEL)",
        f"tests/ops/test_linear.py {_CPU}",
    ),
    "taps beyond the image": Mutant(
        "vpd_fast/ops/resampling.py",
        "np.minimum(low + 1, n_in - 1)",
        "np.minimum(low + 1, n_in)",
        "tests/ops/test_resampling.py",
    ),
    # Engine
    "phases of upsampling in another order": Mutant(
        "vpd_fast/engine/rewrites.py",
        "return both.permute(2, 0, 4, 5, 3, 1)",
        "return both.permute(0, 2, 4, 5, 3, 1)",
        "tests/engine/test_rewrites.py",
    ),
    "bias of values lost": Mutant("vpd_fast/engine/rewrites.py", "wo @ bv + ", "", "tests/engine/test_rewrites.py"),
    "batch norm without eps": Mutant(
        "vpd_fast/engine/rewrites.py",
        "running_var + norm.eps",
        "running_var",
        "tests/engine/test_rewrites.py",
    ),
    "defaults win over the user's policy": Mutant(
        "vpd_fast/engine/policy.py",
        "return PRECISIONS[precision], reason",
        "break",
        "tests/engine/test_optimize.py",
    ),
    "graphs ignore strides": Mutant(
        "vpd_fast/engine/graphs.py",
        "(x.shape, x.stride(), x.dtype)",
        "(x.shape, x.dtype)",
        "tests/engine/test_graphs.py",
    ),
    "replays on a CPU forget results in new memory": Mutant(
        "vpd_fast/engine/cpu_graphs.py",
        "if func._opname not in _ALLOCATIONS:",
        'if func._opname == "new_zeros":',
        "tests/engine/test_cpu_graphs.py",
    ),
    "a graph on a CPU is called by two threads at once": Mutant(
        "vpd_fast/engine/cpu_graphs.py",
        "graph = idle.pop() if idle else None",
        "graph = idle[-1] if idle else None",
        "tests/engine/test_cpu_graphs.py",
    ),
    "a stream waits for what runs before it begins": Mutant(
        "vpd_fast/inference/pipeline.py",
        "if not batches.busy:",
        "if True:",
        "tests/inference/test_streams.py -k slowly",
    ),
    "the newest graph is dropped": Mutant(
        "vpd_fast/engine/graphs.py",
        "self._graphs.popitem(last=False)",
        "self._graphs.popitem()",
        "tests/engine/test_graphs.py",
    ),
    "layers without settings are ignored": Mutant(
        "vpd_fast/engine/storage.py",
        "        if parts:\n            raise ValueError(",
        "        if parts and not layers:\n            raise ValueError(",
        "tests/engine/test_storage.py -k bad_folders",
    ),
    # Files
    "a pickle opcode that is not known is skipped": Mutant(
        "vpd_fast/checkpoints/pickles.py",
        "            if operation is None:\n                raise PickleError(",
        "            if operation is None:\n                return\n                raise PickleError(",
        "tests/checkpoints/test_hostile_files.py",
    ),
    "keys of pickled dictionaries nest without end": Mutant(
        "vpd_fast/checkpoints/pickles.py",
        "        if layer:\n            raise PickleError(",
        "        if False:\n            raise PickleError(",
        "tests/checkpoints/test_hostile_files.py -k dictionary_keys",
    ),
    "weights that are NaN are loaded": Mutant(
        "vpd_fast/models/finite.py",
        "return bool(tensor.sum().isfinite()) or",
        "return True or",
        "tests/checkpoints/test_weights.py -k finite",
    ),
    "models lie in the files that they were loaded from": Mutant(
        "vpd_fast/checkpoints/load.py",
        "if not mmap:",
        "if False:",
        "tests/checkpoints/test_weights.py -k mapped_and_not",
    ),
    "one of two weights of the same name is taken": Mutant(
        "vpd_fast/checkpoints/names.py",
        "if name in renamed:",
        "if False:",
        "tests/checkpoints/test_names.py -k become_one",
    ),
    "what engine.json says of layers is believed": Mutant(
        "vpd_fast/engine/storage.py",
        "if type(found) is not type(value) or found != value:",
        "if False:",
        "tests/engine/test_storage.py -k spoiled_layers",
    ),
    "files are written in place": Mutant(
        "vpd_fast/files.py",
        "temporary[path] = temporary_path(path)",
        "temporary[path] = path",
        "tests/test_files.py",
    ),
    # Training
    "a checkpoint has its name before it is whole": Mutant(
        "vpd_fast/training/checkpoint.py",
        "temporary = temporary_path(path)",
        "temporary = path",
        "tests/training/test_checkpoint.py",
    ),
    "warm-up a step too long": Mutant(
        "vpd_fast/training/schedules.py",
        "(1 - (1 - step / warmup_steps) * (1 - warmup_ratio))",
        "(1 - (1 - (step - 1) / warmup_steps) * (1 - warmup_ratio))",
        "tests/training/test_schedules.py",
    ),
    "depth's schedule counts from 0": Mutant(
        "vpd_fast/training/schedules.py",
        "done = (step + 1) / half",
        "done = step / half",
        "tests/training/test_schedules.py",
    ),
    "silog without its variance": Mutant(
        "vpd_fast/training/losses.py", "lambda_: float = 0.5", "lambda_: float = 1.0", "tests/training/test_losses.py"
    ),
    "ignored pixels leave the mean": Mutant(
        "vpd_fast/training/losses.py",
        "return total / target.numel()",
        "return total / (target != ignore_index).sum()",
        "tests/training/test_losses.py",
    ),
    "a UNet's norms always train slowly": Mutant(
        "vpd_fast/training/groups.py",
        '0.1 if "unet" in name and not quirks else 1.0',
        '0.1 if "unet" in name else 1.0',
        "tests/training/test_groups.py",
    ),
    "accumulated losses are not averaged": Mutant(
        "vpd_fast/training/trainer.py",
        "loss = self.train_step(ahead) / count",
        "loss = self.train_step(ahead)",
        "tests/training/test_trainer.py -k accumulation",
    ),
    "ranks read the same samples": Mutant(
        "vpd_fast/data/loading.py",
        "(first + i) * self.world_size + self.rank",
        "(first + i) * self.world_size",
        "tests/data/test_loading.py",
    ),
    # Inference
    "the last window starts beyond the image": Mutant(
        "vpd_fast/inference/windows.py",
        "max(min(i * stride, length - crop), 0)",
        "max(i * stride, 0)",
        "tests/inference/test_windows.py",
    ),
    "one window too many": Mutant(
        "vpd_fast/inference/windows.py",
        "max(length - crop + stride - 1, 0) // stride + 1",
        "max(length - crop + stride, 0) // stride + 1",
        "tests/inference/test_windows.py",
    ),
}
