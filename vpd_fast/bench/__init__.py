"""Speed, memory and agreement of a model's fast forms and of other libraries, side by side; `vpd-fast bench` runs it.

A variant is one way to compute the network. Each lives in a process of its own (`worker`), so that its memory is known
and its threads and allocators are its own. The processes take turns (`runner`): only one computes at a time.
"""
