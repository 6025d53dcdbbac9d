"""Text-to-image pipelines: reading where they put each word, while they draw or for a photograph and its caption."""
