"""Attention maps of words, and their loss, without the [batch, heads, text, keys] tensor.

One folder per operation: `row_maps` (words are query rows, as in a vision-language model), `column_maps` (words are key
columns, as in a diffusion model's cross-attention) and `map_loss`; `row_map_loss` goes from queries and keys to the loss.

In a folder, `api` has the contract: it validates, chooses and calls. `call` is the checked call, one value that every
implementation takes: `reference`, the specification; `chunked`, for any device; `triton_kernels` and `cuda_launch`,
imported when they are used, with the operation around them in `op`. `operation` registers implementations with torch,
`dispatch` chooses between them, `grids` and `numerics` are what they share. `tiles` belongs to the Triton kernels;
`cuda/`, which compiles and launches, to those in CUDA C++, whose sources are in csrc/.
"""
