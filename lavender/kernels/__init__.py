"""Attention maps of words, and their loss, without the [batch, heads, text, keys] tensor.

One public operation per file: `row_maps` (words are query rows, as in a vision-language model), `column_maps` (words are key
columns, as in a diffusion model's cross-attention) and `map_loss`. Each file holds the operation's contract, its reference and
its portable implementation; `dispatch` chooses between implementations.
"""
