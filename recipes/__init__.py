"""How the embedded models of `lavender.miniworld` were made: their architectures, their training and their cards."""
