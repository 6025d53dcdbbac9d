"""What a student is fed: conversations as text, words that are compared, tensors."""
