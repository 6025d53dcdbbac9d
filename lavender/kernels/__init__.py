"""Attention maps of words, and their loss, without the [batch, heads, text, keys] tensor.

One public operation per file: `row_maps` (words are query rows, as in a vision-language model), `column_maps` (words are key
columns, as in a diffusion model's cross-attention) and `map_loss`; `row_map_loss` goes from queries and keys to the loss. Each file
holds the operation's contract, its reference and its portable implementation. `*_triton` and `*_cuda` beside it have the kernels,
`*_fused` the operation around them; they are imported when they are used. `dispatch` chooses between implementations, `grids` and
`numerics` are what they share. `tiles` belongs to the Triton kernels; `cuda`, which launches, and `nvrtc`, which compiles, to those
in CUDA C++, whose sources are in csrc/.
"""
