"""Pictures with texts, from any file."""

from .samples import Conversation, Message, Pair, Region, Sample, as_conversation, read_pairs, read_samples

__all__ = ["Conversation", "Message", "Pair", "Region", "Sample", "as_conversation", "read_pairs", "read_samples"]
