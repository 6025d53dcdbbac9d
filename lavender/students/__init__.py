"""Vision-language models: reading where the words of their answers look, and teaching them to look elsewhere."""
