"""How attention is read from the two libraries without changing what their models compute."""
