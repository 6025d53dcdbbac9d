"""The long run: photographs and captions in, a target store out."""
