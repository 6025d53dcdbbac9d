"""Attention maps of words, and their loss, without the [batch, heads, text, keys] tensor.

One public operation per file: `row_maps` (words are query rows, as in a vision-language model), `column_maps` (words are key
columns, as in a diffusion model's cross-attention) and `map_loss`; `row_map_loss` goes from queries and keys to the loss. Each file
holds the operation's contract, its reference and its portable implementation; `*_triton` beside it has the kernels, which are
imported when they are used. `dispatch` chooses between implementations, `tiles` is what the Triton kernels share.
"""
