"""Speed, memory and agreement of a model's fast forms and of other libraries, side by side; `vpd-fast bench` runs it.

A variant is one way to compute the network. Each lives in a process of its own (`worker`), so that its memory is known
and its threads and allocators are its own. The processes take turns (`runner`): only one computes at a time.

- `vpd-fast bench`: `catalog` (variants by name), `variants`, `peers`; `worker` and `in_process`, where they run;
  `runner`, `report` and `plots`.
- Suites of benchmarks/: `suites`, `attention` and `libraries` (PyTorch's), `regression`.
- Scripts of benchmarks/: `engine_pass` (a pass, cut into its operations), `operations` (what they compute), `peaks`.
- All of them: `timing`, `statistics`, `parity`, `environment`, `telemetry`. `tuning` is `vpd-fast tune`.
"""
