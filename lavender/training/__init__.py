"""Fine-tuning a student with the alignment loss."""
