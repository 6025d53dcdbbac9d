"""Text-to-image pipelines: reading where they put each word, while they draw or when asked about a given picture."""
